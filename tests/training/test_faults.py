"""NaN, an exception, no memory, exploding gradients: each is recorded, saved before, and said once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import Training

from obsinfra.errors import ConfigError
from obsinfra.training.faults import Fault, Faults


def digits(tmp_path: Path, *flags: str) -> Training:
    return Training(tmp_path / "runs", "run", ("--model-name=probes:digits", "--epochs=2", *flags))


def failure(run: Training) -> dict[str, Any]:
    """The event in errors.jsonl that says why the run ended."""
    (event,) = run.events("errors", "training_failed")
    return event


@pytest.mark.slow
def test_a_nan_loss_ends_the_run_with_one_line_and_finite_parameters_from_before(tmp_path: Path) -> None:
    run = digits(tmp_path, "--snapshot-seconds=0.000001")
    ended = run.run("--inject=nan@20")
    assert ended.returncode == 1
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("error:"))
    assert "before step 21: not finite; the last good state (step 20) was saved" in line
    assert "--on-nonfinite continue" in line
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("not finite") == 1
    (emergency,) = run.checkpoints("emergency")
    assert (emergency.step, emergency.reason) == (20, "non-finite loss before step 21")
    model = run.newest().state["model"]
    assert model and all(bool(torch.isfinite(tensor).all()) for tensor in model.values())
    assert run.state()[0] == "failed" and str(run.state()[1]).startswith("NonFiniteLossError: loss nan")
    assert "NonFiniteLossError" in failure(run)["error"]
    before = run.losses()

    assert run.run(resume="auto").returncode == 0
    # Step 20 is done again, without the fault this time; the fault spoils the loss after the probe saw it.
    assert run.losses()[21] == before[20]
    assert len(run.losses()) == 46 + 1
    assert run.state() == ("finished", None)


@pytest.mark.slow
def test_nonfinite_steps_may_be_passed_over(tmp_path: Path) -> None:
    run = digits(tmp_path, "--on-nonfinite=continue", "--inject=nan@5x3")
    assert run.run().returncode == 0
    assert run.state() == ("finished", None)
    assert len(run.events("errors", "nonfinite_loss")) == 3
    assert run.events("training", "validation")[-1]["accuracy"] > 0.3
    assert all(math.isfinite(float.fromhex(loss)) for loss in run.losses())


@pytest.mark.slow
def test_an_exception_is_saved_recorded_and_shown_once(tmp_path: Path) -> None:
    run = digits(tmp_path, "--inject=error@20", "--snapshot-seconds=0.000001")
    ended = run.run()
    assert ended.returncode == 1
    assert ended.stderr.count("Traceback") == 1
    assert ended.stderr.rstrip().endswith("InjectedError: injected at step 20")
    assert run.state() == ("failed", "InjectedError: injected at step 20")
    assert failure(run)["error"] == "InjectedError: injected at step 20"
    assert "before_forward" in json.dumps(failure(run)["exception"])
    (emergency,) = run.checkpoints("emergency")
    assert (emergency.step, emergency.reason) == (20, "InjectedError: injected at step 20")


@pytest.mark.slow
def test_running_out_of_memory_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    run = digits(tmp_path, "--snapshot-seconds=0.000001", "--oom-recovery=off")
    ended = run.run(at="9:out_of_memory")
    assert ended.returncode == 1
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("error:"))
    assert "CUDA out of memory. Tried to allocate 2.00 GiB." in line and "--micro-batch" in line
    assert "Traceback" not in ended.stderr
    assert run.state()[0] == "failed"
    assert "OutOfMemoryError: CUDA out of memory" in failure(run)["error"]
    (emergency,) = run.checkpoints("emergency")
    assert emergency.step == 8  # the ninth step had begun


@pytest.mark.slow
def test_an_explosion_without_a_sidecar_leads_to_one_emergency_checkpoint_named_after_the_alert(
    tmp_path: Path,
) -> None:
    run = digits(tmp_path, "--epochs=40", "--inject=explode@50x3", "--sample-seconds=0.1")
    assert run.run().returncode == 0
    (emergency,) = run.checkpoints("emergency")
    assert emergency.reason == "in-process: alert GradientExplosion"
    assert emergency.step > 50
    (firing,) = (
        event for event in run.events("errors", "alert_firing") if event["alert"] == "GradientExplosion"
    )
    assert firing["acts"] == "in-process"
    assert firing["value"] > 100
    (command,) = run.events("system", "command")
    assert (command["action"], command["outcome"]) == ("emergency_checkpoint", "done")


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (None, ()),
        ("", ()),
        ("nan@5", (Fault("nan", 5, 6),)),
        ("explode@10x3, hang@20", (Fault("explode", 10, 13), Fault("hang", 20, 21))),
    ],
)
def test_faults_are_parsed(text: str | None, faults: tuple[Fault, ...]) -> None:
    assert Faults.parse(text)._faults == faults


@pytest.mark.parametrize("text", ["nan", "nan@", "nan@-1", "melt@3", "nan@3x", "@3"])
def test_a_malformed_fault_is_named_with_the_known_ones(text: str) -> None:
    with pytest.raises(ConfigError, match="explode, nan, slow, leak, hang, error, oom") as caught:
        Faults.parse(text)
    assert repr(text) in str(caught.value)


def test_explode_multiplies_the_gradients_of_its_steps_only() -> None:
    weight = torch.ones(3, requires_grad=True)
    faults = Faults.parse("explode@4x2")
    norms = []
    for step in range(3, 7):
        weight.grad = torch.full((3,), 2.0)
        faults.on_gradients(step, [weight])
        norms.append(float(weight.grad[0]))
    assert norms == [2.0, 2_000_000.0, 2_000_000.0, 2.0]
