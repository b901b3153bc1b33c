"""Two ranks under torchrun: seen as two, told as one, and stopped at the same step."""

from __future__ import annotations

import json
import signal
import urllib.request
from pathlib import Path

import pytest
from torchrun_runs import RankedRun
from training_runs import cli
from waiting import wait_for

from obsinfra.control.run_watch import RunWatch

pytestmark = pytest.mark.slow


def test_two_ranks_are_watched_each_and_obey_as_one(tmp_path: Path) -> None:
    run = RankedRun(tmp_path, "two", "--model-name", "digits", "--epochs", 100_000, "--schedule", "constant")
    with run.launched("--nproc-per-node", 2) as launcher:
        info = run.running(2)
        watch = RunWatch(tmp_path, lambda states: None)
        watch.start()
        targets = {target["labels"]["rank"]: target["targets"][0] for target in watch.targets()}
        watch.stop()
        assert sorted(targets) == ["0", "1"] == sorted(info.processes)
        for rank, address in targets.items():
            text = urllib.request.urlopen(f"http://{address}/metrics", timeout=20).read().decode()
            assert f'obsinfra_step{{model="digits",rank="{rank}",run="two"}}' in text

        def command(*words: str) -> None:
            done = cli("command", "two", *words, "--output-dir", tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr

        status = cli("status", "two", "--output-dir", tmp_path).stdout
        assert all(f"rank {rank}" in status and address in status for rank, address in targets.items())
        command("scale_lr", "factor=0.5")
        command("checkpoint")
        command("pause")
        assert run.info().state == "paused"
        command("dump_stacks")  # needs no boundary
        command("resume")
        command("rollback")
        wait_for(lambda: len(list(run.folder.logs.glob("stacks-*.txt"))) == 2, "both dumped their stacks")
        launcher.send_signal(signal.SIGTERM)
        output, _ = launcher.communicate(timeout=100)
    assert launcher.returncode == 128 + signal.SIGTERM, output
    for name in ("learning_rate_scaled", "rolled_back", "stopped_by_signal"):
        first, second = (run.events(rank, "training", name) for rank in range(2))
        assert len(first) == len(second) == 1
        assert first[0]["at_step"] == second[0]["at_step"] and (first[0]["rank"], second[0]["rank"]) == (0, 1)
    pauses = [run.events(rank, "system", "pause_ended") for rank in range(2)]
    assert pauses[0][0]["at_step"] == pauses[1][0]["at_step"]
    logged = [
        [
            json.loads(line)
            for line in cli("logs", "two", *flags, "--output-dir", tmp_path).stdout.splitlines()
        ]
        for flags in ((), ("--rank", "1"))
    ]
    both, second = logged
    assert {event["rank"] for event in both} == {0, 1} and {event["rank"] for event in second} == {1}
    times = [event["timestamp"] for event in both]
    assert times == sorted(times)
    refused = cli("logs", "two", "--rank", "2", "--output-dir", tmp_path)
    assert refused.returncode == 2 and "of rank 2" in refused.stderr
    after = json.loads(cli("status", "two", "--json", "--output-dir", tmp_path).stdout)
    assert (after["ranks"], sorted(after["metrics"])) == (2, ["0", "1"])
    info = run.info()
    assert (info.state, info.reason) == ("stopped", "signal SIGTERM")
    newest = run.checkpoints()[-1]
    assert (
        newest.kind == "emergency"
        and newest.step == run.events(1, "training", "stopped_by_signal")[0]["at_step"]
    )
    assert output.count("ended      stopped") == 1, output
    assert "train --nproc-per-node 2 --output-dir" in output
    assert "ranks 2" in " ".join(cli("status", "two", "--output-dir", tmp_path).stdout.split())
