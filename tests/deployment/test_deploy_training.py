"""A training deployed from Python: it starts, is seen, stops with a checkpoint, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from waiting import wait_for

from obsinfra.deployment.deploy_training import DeploymentConfig, TrainingDeployment
from obsinfra.errors import ConfigError, ObsinfraError

ENDLESS = {"epochs": 100_000, "metrics_port": 0, "disable_testing": True, "seed": 3}


@pytest.mark.slow
def test_a_deployed_training_is_seen_stops_with_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    config = DeploymentConfig("digits", tmp_path / "runs", "deployed", stack="off", settings=ENDLESS)
    with TrainingDeployment(config) as training:
        wait_for(lambda: training.state() == "running", "it trains")
        assert training.wait(0) is None and training.stack.status() is None
        progress = wait_for(training.folder.read_progress, "progress")
    assert training.state() == "stopped"
    assert list((training.folder.checkpoints / "manifests").glob("*.json"))
    further = DeploymentConfig(
        "digits", tmp_path / "runs", "deployed", stack="off", resume=True, settings={**ENDLESS, "epochs": 1}
    )
    again = TrainingDeployment(further).start()
    assert again.wait(60) == 0 and again.state() == "finished"
    info = again.folder.read_info()
    reached = again.folder.read_progress()
    assert info.restarts == 1 and reached is not None and (reached.step or 0) >= (progress.step or 0)


def test_what_cannot_work_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown setting 'epoch'"):
        TrainingDeployment(DeploymentConfig(output_dir=tmp_path / "runs", settings={"epoch": 1}))
    with pytest.raises(ConfigError, match="batch_size"):
        TrainingDeployment(DeploymentConfig(output_dir=tmp_path / "runs", settings={"batch_size": -1}))
    with pytest.raises(ConfigError, match="run name"):
        TrainingDeployment(DeploymentConfig(output_dir=tmp_path / "runs", run="../up"))
    assert not (tmp_path / "runs").exists()


def test_a_training_that_does_not_start_says_why(tmp_path: Path) -> None:
    config = DeploymentConfig("no_such_model", tmp_path, "x", stack="off")
    training = TrainingDeployment(config)
    with pytest.raises(ObsinfraError, match=r"did not start[\s\S]*no_such_model"):
        training.start()
    assert training.state() == "new" and training.stop() == 2
