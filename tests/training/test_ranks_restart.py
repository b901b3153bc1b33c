"""Ranks that die or hang under torchrun: what was reached is saved, they meet again, the run goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.request
from pathlib import Path

import psutil
import pytest
from torchrun_runs import RankedRun
from waiting import wait_for

from obsinfra.run.folder import RunInfo

pytestmark = pytest.mark.slow

ENDLESS = ("--epochs", 100_000, "--schedule", "constant", "--snapshot-seconds", 0.2)


def metric(info: RunInfo, name: str, **labels: str) -> float:
    """One value of rank 0's metrics."""
    text = urllib.request.urlopen(info.metrics_urls["0"], timeout=20).read().decode()
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    for line in text.splitlines():
        found = re.fullmatch(rf"{name}{{(.*)}} (\S+)", line)
        if found and all(part in found[1] for part in wanted):
            return float(found[2])
    raise AssertionError(f"no {name} {labels} in\n{text}")


def test_a_killed_rank_costs_what_came_after_the_last_snapshot(tmp_path: Path) -> None:
    """First rank 1, whose partner saves the snapshot; then rank 0, whose writer does."""
    run = RankedRun(tmp_path, "killed", "--model-name", "digits", *ENDLESS)
    with run.launched("--nproc-per-node", 2, "--max-restarts", 3) as launcher:
        first = run.running(2, step=50)
        reached = run.folder.read_progress().step
        os.kill(int(first.processes["1"]["pid"]), signal.SIGKILL)
        second = run.running(2, restarts=1)
        (saved,) = run.checkpoints("emergency")
        assert saved.step >= reached / 2  # a snapshot is at most a fifth of a second old
        assert metric(second, "obsinfra_group_restarts_total", cause="killed") == 1
        assert 0 < metric(second, "obsinfra_group_downtime_seconds") < 100
        (told,) = run.events(0, "system", "group_formed_again")
        assert (told["cause"], told["silent"], told["size_before"], told["at_step"]) == (
            "killed",
            [1],
            2,
            saved.step,
        )
        os.kill(int(second.processes["0"]["pid"]), signal.SIGKILL)
        third = run.running(2, restarts=2, step=saved.step + 1)
        assert metric(third, "obsinfra_group_restarts_total", cause="killed") == 2
        assert run.events(0, "system", "group_formed_again")[-1]["at_step"] >= saved.step
        launcher.send_signal(signal.SIGTERM)
        output, _ = launcher.communicate(timeout=100)
    assert run.info().state == "stopped", output
    stops = [run.events(rank, "training", "stopped_by_signal") for rank in range(2)]
    assert [len(events) for events in stops] == [1, 1]
    assert stops[0][0]["at_step"] == stops[1][0]["at_step"]


def test_a_rank_that_hangs_is_shown_and_the_group_goes_on_without_its_hang(tmp_path: Path) -> None:
    """The others' collective times out; stacks of all tell where everybody was."""
    run = RankedRun(tmp_path, "hung", "--model-name", "rank_faults:create_workload", *ENDLESS)
    options = ("--nproc-per-node", 2, "--max-restarts", 1, "--collective-timeout-seconds", 3)
    env = {"RANK_FAULT": "hang", "RANK_FAULT_MARK": str(tmp_path / "mark")}
    with run.launched(*options, "--grace-seconds", 4, env=env) as launcher:
        info = run.running(2, restarts=1)
        assert metric(info, "obsinfra_group_restarts_total", cause="timeout") == 1
        launcher.send_signal(signal.SIGTERM)
        output, _ = launcher.communicate(timeout=100)
    assert run.info().state == "stopped", output
    stacks = [path.read_text() for path in run.folder.logs.glob("stacks-*.txt")]
    assert any("rank_faults.py" in text and "in wait" in text for text in stacks), stacks
    kept = [run.events(rank, "system", "collectives_kept")[0] for rank in range(2)]
    entries = [json.loads(Path(event["path"]).read_text())["entries"] for event in kept]
    reached = [max(entry["collective_seq_id"] for entry in of_rank) for of_rank in entries]
    assert reached[0] > reached[1]  # what rank 0 waits in, the rank that hangs never came to
    assert kept[0]["last"] == f"{reached[0]} gloo:all_reduce {entries[0][-1]['input_sizes'][0]}"
    assert run.events(0, "system", "group_formed_again")[0]["at_step"] > 0


def test_ranks_whose_launcher_is_killed_save_the_run_and_end(tmp_path: Path) -> None:
    """It took along the store in which they meet: they could neither be told to stop nor be started again."""
    run = RankedRun(tmp_path, "orphans", "--model-name", "digits", *ENDLESS)
    with run.launched("--nproc-per-node", 2) as launcher:
        pids = [int(process["pid"]) for process in run.running(2, step=50).processes.values()]
        launcher.kill()
        launcher.wait()
        reached = run.folder.read_progress().step
        try:
            wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids), "both ranks have ended", 100)
        finally:
            for pid in pids:
                if psutil.pid_exists(pid):
                    os.kill(pid, signal.SIGKILL)
    info = run.info()
    # The rank that is second to see it may find the other one gone first.
    reasons = ("the launcher that kept it", "Connection closed by peer")
    assert info.state == "failed" and any(reason in (info.reason or "") for reason in reasons), info.reason
    (saved,) = run.checkpoints("emergency")
    assert saved.step >= reached
