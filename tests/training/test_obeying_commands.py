"""Commands to a training run, and what a second trainer may and may not do beside it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from training_runs import Training, cli, end, environment, kill_group
from waiting import wait_for

from obsinfra.control.client import send_command
from obsinfra.control.command import Ack, new_command

ENDLESS = ("--model-name=digits", "--epochs=100000", "--checkpoint-epochs=0", "--validate-every=0")


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[Training, subprocess.Popen[str]]]:
    """A run that trains until it is told to stop."""
    run = Training(tmp_path / "runs", "live", ENDLESS)
    process = run.start()
    try:
        wait_for(lambda: run.folder.run_json.exists() and run.state()[0] == "running", "a running trainer")
        yield run, process
    finally:
        kill_group(process)


def tell(run: Training, action: str) -> Ack:
    return send_command(run.folder, new_command(run.name, action, source="test", reason="why"), door="socket")


def test_checkpoint_emergency_checkpoint_and_stop_are_obeyed_between_two_steps(
    live: tuple[Training, subprocess.Popen[str]],
) -> None:
    run, process = live
    acks = [tell(run, action) for action in ("checkpoint", "emergency_checkpoint", "stop")]
    assert [ack.state for ack in acks] == ["done"] * 3
    code, stderr = end(process)
    assert code == 0, stderr
    assert run.state() == ("stopped", "command stop (test: why)")
    found = run.checkpoints()
    assert [(manifest.kind, manifest.reason) for manifest in found] == [
        ("regular", "test: why"),
        ("emergency", "test: why"),
        ("emergency", "test: why"),
    ]
    assert [str(manifest.path) for manifest in found] == [(ack.result or {})["checkpoint"] for ack in acks]
    assert [manifest.step for manifest in found] == [ack.step for ack in acks]
    assert {(ack.result or {})["from"] for ack in acks} == {"live state"}


@pytest.mark.slow
def test_every_action_can_be_typed_and_tells_what_it_did(
    live: tuple[Training, subprocess.Popen[str]],
) -> None:
    run, process = live

    def typed(*words: str, code: int = 0) -> str:
        done = cli("command", "live", *words, "--output-dir", run.output, env={"COLUMNS": "300"})
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    def told(*words: str) -> dict[str, Any]:
        ack = json.loads(typed(*words, "--json"))
        assert ack["state"] == "done" and ack["result"]["seconds"] >= 0
        return dict(ack["result"])

    step = told("checkpoint")["step"]
    assert "pause done at step" in typed("pause", "max_seconds=600")
    assert run.state() == ("paused", "cli: by hand")
    listed = cli("status", "live", "--output-dir", run.output).stdout
    assert "paused (cli: by hand)" in listed and "page" in listed
    assert "live paused" in " ".join(cli("runs", "--output-dir", run.output).stdout.split())
    assert told("dump_stacks", "native=no")["loop_in"] == "paused"
    assert told("resume")["was_paused"] is True
    profile = told("profile", "steps=3", "top=5")
    assert all(Path(profile[name]).stat().st_size > 100 for name in ("trace", "summary", "summary_json"))
    assert Path(told("memory_snapshot")["report"]).parent == run.folder.root / "reports"
    assert told("free_memory")["before_bytes"]["resident"] > 0
    scaled = told("scale_lr", "factor=0.5")
    assert scaled["after"] == [rate / 2 for rate in scaled["before"]]
    assert told("scale_lr", "undo=true")["after"] == pytest.approx(scaled["before"], rel=1e-3)
    assert told("set_log_level", "level=warning")["before"] == "info"
    assert told("set_log_level", "level=info")["before"] == "warning"
    assert told("set_threshold", "key=cpu", "value=99.5")["after"] == 99.5
    assert told("rollback")["to_step"] == step
    assert told("emergency_checkpoint")["from"] == "live state"

    assert "expected a whole number from 1 to 1000" in typed("profile", "steps=many", code=2)
    assert "unknown argument 'depth' of profile" in typed("profile", "depth=3", code=2)
    assert "expected key=value" in typed("profile", "5", code=2)
    assert "no checkpoint 'nonsense'" in typed("rollback", "checkpoint=nonsense", code=1)
    told("stop")
    assert end(process)[0] == 0
    outcomes = [(event["action"], event["outcome"]) for event in run.events("system", "command")]
    # All but the one that raised the level above that of such a line.
    assert outcomes.count(("rollback", "failed")) == 1 and len(outcomes) == 15


@pytest.mark.slow
def test_a_trainer_killed_while_paused_is_dead_and_resumes_running(
    live: tuple[Training, subprocess.Popen[str]],
) -> None:
    run, process = live
    assert tell(run, "checkpoint").state == tell(run, "pause").state == "done"
    kill_group(process)
    assert run.folder.present_state(run.folder.read_info()) == "dead"
    assert run.run("--max-steps=1", resume="live").returncode == 0
    assert run.state()[0] == "stopped"


@pytest.mark.slow
def test_run_json_tells_who_trains_and_where_to_look(live: tuple[Training, subprocess.Popen[str]]) -> None:
    run, process = live
    info = run.folder.read_info()
    assert info.processes["0"]["pid"] == process.pid and info.alive()
    assert (info.model, info.epochs, info.restarts, info.parent) == ("digits", 100_000, 0, None)
    scraped = httpx.get(info.metrics_urls["0"])
    assert 'obsinfra_run_state{model="digits",rank="0",run="live",state="running"} 1.0' in scraped.text
    progress = wait_for(lambda: (run.folder.root / "progress.json").exists(), "progress.json")
    assert progress
    assert 'model_name = "digits"' in run.folder.config_toml.read_text()


@pytest.mark.slow
def test_a_second_trainer_of_the_same_run_is_refused_and_the_first_goes_on(
    live: tuple[Training, subprocess.Popen[str]],
) -> None:
    run, process = live
    config = run.folder.config_toml.read_bytes()
    for second in (run.run(), run.run(resume="live")):
        assert second.returncode == 2
        (line,) = second.stderr.splitlines()
        assert line.startswith("error:") and f"in use by process {process.pid}" in line
        assert "obsinfra command live stop" in line
    assert run.folder.config_toml.read_bytes() == config
    assert run.folder.read_info().processes["0"]["pid"] == process.pid
    assert tell(run, "stop").state == "done"
    assert end(process)[0] == 0


@pytest.mark.slow
def test_two_runs_at_once_have_a_port_and_a_folder_each(
    live: tuple[Training, subprocess.Popen[str]],
) -> None:
    run, _ = live
    other = Training(run.output, "other", ENDLESS)
    process = other.start()
    try:
        wait_for(lambda: other.folder.run_json.exists() and other.state()[0] == "running", "the other one")
        assert other.folder.read_info().metrics_urls != run.folder.read_info().metrics_urls
        assert tell(other, "stop").state == "done"
        assert end(process)[0] == 0
    finally:
        kill_group(process)
    assert run.state()[0] == "running"


@pytest.mark.slow
def test_a_taken_metrics_port_gives_way_to_the_next(live: tuple[Training, subprocess.Popen[str]]) -> None:
    run, _ = live
    taken = int(run.folder.read_info().metrics_urls["0"].split(":")[2].split("/")[0])
    other = Training(run.output, "other", (*ENDLESS, "--max-steps=3", f"--metrics-port={taken}"))
    arguments = [argument for argument in other._command((), None) if argument != "--metrics-port=0"]
    done = subprocess.run(
        arguments, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f":{taken}/" not in done.stderr and "page" in done.stderr
