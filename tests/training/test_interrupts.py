"""Signals wherever the loop may be: a sound checkpoint, exit code 128 + n, and a run that resumes."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_runs import Training, cli, end, kill_group
from waiting import wait_for

from obsinfra.control.client import send_command
from obsinfra.control.command import new_command

pytestmark = pytest.mark.slow


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes a test starts; none outlives it."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        kill_group(process)


def digits(tmp_path: Path, *flags: str, factory: str = "digits") -> Training:
    return Training(tmp_path / "runs", "run", (f"--model-name=probes:{factory}", "--epochs=2", *flags))


def wait_until_running(run: Training) -> None:
    wait_for(lambda: run.folder.run_json.exists() and run.state()[0] == "running", "a running trainer")


def emergency(run: Training) -> tuple[int, str | None]:
    """Step and reason of the one emergency checkpoint."""
    (found,) = run.checkpoints("emergency")
    return found.step, found.reason


def pending_signals(process: subprocess.Popen[str]) -> int:
    """Mask of the signals that the kernel has not handed to the process yet."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:"))
    return int(mask, 16)


def wait_until_hung(run: Training) -> None:
    """Not only until the last loss is written: a signal may still reach the boundary of that step."""
    log = run.folder.logs / "training.jsonl"
    wait_for(lambda: log.exists() and run.events("training", "fault_injected"), "the hang")
    assert len(run.losses()) == 20


def stacks_of(run: Training) -> str:
    (found,) = run.folder.logs.glob("stacks-*.txt")
    return found.read_text()


def test_a_second_sigint_stops_at_once(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    run = digits(tmp_path)
    started.append(process := run.start(at="5:wait"))
    wait_for(run.mark.exists, "the fifth step")
    process.send_signal(signal.SIGINT)
    wait_for(lambda: not pending_signals(process), "the first to arrive")
    process.send_signal(signal.SIGINT)
    code, stderr = end(process)
    assert code == 130
    assert "Traceback" not in stderr
    assert run.mark.exists()  # the step under way never ended
    assert run.state() == ("stopped", "second SIGINT: stopped at once")
    assert run.checkpoints("emergency") == []


def test_signals_of_the_settings_stop_as_sigterm_does(tmp_path: Path) -> None:
    run = digits(tmp_path, "--stop-signals=SIGTERM,SIGUSR1")
    finished = run.run(at="5:SIGUSR1")
    assert finished.returncode == 128 + signal.SIGUSR1
    assert emergency(run) == (5, "signal SIGUSR1")
    assert run.state() == ("stopped", "signal SIGUSR1")
    assert f"--resume {run.name}" in finished.stderr


def test_a_signal_during_the_first_compilation_leaves_a_checkpoint(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    """Whether the compiler was through in time or not."""
    run = digits(tmp_path, "--compile=on", "--grace-seconds=2")
    started.append(process := run.start())
    wait_until_running(run)
    process.send_signal(signal.SIGTERM)
    code, stderr = end(process)
    assert code == 143, stderr
    step, reason = emergency(run)
    assert step <= 1 and reason is not None and reason.startswith("signal SIGTERM")
    assert run.state()[0] == "stopped"
    assert run.run("--compile=off", resume="auto").returncode == 0


def test_a_signal_does_not_wait_for_a_validation_and_the_resumed_run_validates_anew(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    run = digits(tmp_path, factory="slow_validation")
    started.append(process := run.start())
    wait_for(run.mark.exists, "the validation")
    process.send_signal(signal.SIGTERM)
    code, stderr = end(process)
    assert code == 143, stderr
    assert run.mark.exists()  # the validation never ended
    assert emergency(run) == (23, "signal SIGTERM")
    assert run.events("training", "validation") == []

    run.mark.unlink()
    started.append(process := run.start(resume="run"))
    for _ in range(2):
        wait_for(run.mark.exists, "a validation of the resumed run")
        run.mark.unlink()
    assert end(process)[0] == 0
    assert [event["epoch"] for event in run.events("training", "validation")] == [0, 1]
    whole = Training(tmp_path / "whole", "run", ("--model-name=probes:digits", "--epochs=2"))
    assert whole.run().returncode == 0
    assert run.losses() == whole.losses()


def test_a_signal_to_the_group_does_not_wait_for_stalled_data(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    run = digits(tmp_path, "--num-workers=2", "--accumulate=2", factory="stalling")
    started.append(process := run.start())
    wait_for(run.mark.exists, "the batch that does not come")
    os.killpg(process.pid, signal.SIGTERM)
    code, stderr = end(process)
    assert code == 143, stderr
    assert run.mark.exists()
    step, reason = emergency(run)
    assert reason == "signal SIGTERM"
    assert len(run.losses()) == 2 * step

    run.mark.unlink()
    started.append(process := run.start(resume="run"))
    while process.poll() is None:
        wait_for(lambda: process.poll() is not None or run.mark.exists(), "the stall or the end", 60)
        run.mark.unlink(missing_ok=True)
    assert end(process)[0] == 0
    whole = Training(
        tmp_path / "whole", "run", ("--model-name=probes:digits", "--epochs=2", "--accumulate=2")
    )
    assert whole.run().returncode == 0
    assert run.losses() == whole.losses()


def test_a_signal_during_a_hang_commits_the_last_snapshot_and_all_stacks(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    run = digits(tmp_path, "--grace-seconds=2")
    started.append(process := run.start("--inject=hang@20", "--snapshot-seconds=0.000001"))
    wait_until_hung(run)
    process.send_signal(signal.SIGTERM)
    code, stderr = end(process)
    assert code == 143, stderr
    step, reason = emergency(run)
    assert step == 20
    assert reason == "signal SIGTERM; no step boundary in time (in other)"
    assert run.state() == ("stopped", reason)
    assert "before_forward" in stacks_of(run)
    assert "loop_not_reached" in stderr and "stacks-" in stderr
    assert run.run(resume="run").returncode == 0
    assert len(run.losses()) == 46  # no step was lost, none was done twice


def test_a_command_during_a_hang_is_answered_with_the_snapshot_and_the_stacks(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    run = digits(tmp_path, "--grace-seconds=2", "--inject=hang@20", "--snapshot-seconds=0.000001")
    started.append(process := run.start())
    wait_until_hung(run)
    answer = cli("signal", "run", "emergency_checkpoint", "--output-dir", run.output)
    assert answer.returncode == 0, answer.stderr
    said, *rows = answer.stdout.splitlines()
    assert said == "emergency_checkpoint done at step 20"
    result = dict(row.split(maxsplit=1) for row in rows)
    assert result["from"] == "host snapshot"
    assert "before_forward" in Path(result["stacks"]).read_text()
    assert emergency(run)[0] == 20
    assert process.poll() is None
    stop = send_command(run.folder, new_command("run", "stop", source="test"), door="inbox")
    assert stop.state == "done"
    assert end(process)[0] == 0
    assert run.state()[0] == "stopped"
