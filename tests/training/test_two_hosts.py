"""An elastic run over two hosts that come, go, and lose each other."""

from __future__ import annotations

import re
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from torchrun_runs import RankedRun
from two_hosts import Host, two_hosts, why_not
from waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not is not None, reason=str(why_not))]

STEPS_PER_EPOCH = 23
QUICK = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=10"


def options(run: RankedRun, host: Host, meet_at: Host) -> tuple[object, ...]:
    """Of one host's launcher."""
    return (
        *("--nnodes", "1:2", "--nproc-per-node", 1, "--max-restarts", 9, "--local-addr", host.address),
        *("--rdzv-endpoint", f"{meet_at.address}:29400", "--rdzv-id", run.name, "--rdzv-conf", QUICK),
        *("--epochs", 100_000, "--schedule", "constant", "--snapshot-seconds", 0.2, "--threads", 1),
        *("--collective-timeout-seconds", 10, "--grace-seconds", 5, "--stack", "off", "--disable-testing"),
    )


def formed(run: RankedRun, times: int, ranks: int) -> dict[str, object]:
    """The group has formed again, for the n-th time, and trains: what was said of it."""

    def found() -> dict[str, object] | None:
        events = run.events(0, "system", "group_formed_again")
        info, progress = run.info(), run.folder.read_progress()
        there = len(events) >= times and info is not None and info.state == "running" and progress is not None
        return events[-1] if there and (progress.step or 0) > events[-1]["at_step"] else None

    event = wait_for(found, f"{ranks} ranks after {times} changes", seconds=100)
    assert event["ranks"] == ranks, event
    return event


def test_hosts_come_and_go_and_the_run_goes_on(tmp_path: Path) -> None:
    """One host; a second joins; it loses power; it comes back; the cable between them is cut.

    The one that keeps the rendezvous goes on each time from what was reached; the one that is cut off ends by
    itself. Each epoch has all its batches once, on however many ranks.
    """
    run = RankedRun(tmp_path, "r", "--model-name", "digits")
    with two_hosts() as (first, second), ExitStack() as stack:

        def start(host: Host):  # type: ignore[no-untyped-def]
            env = {"GLOO_SOCKET_IFNAME": host.interface}
            launched = run.launched(*options(run, host, first), env=env, inside=host.inside)
            return stack.enter_context(launched)

        kept = start(first)
        run.running(1, step=50)

        start(second)
        joined = formed(run, 1, ranks=2)
        assert (joined["cause"], joined["size_before"], joined["silent"]) == ("membership", 1, [])
        assert len(run.info().processes) == 2

        second.lose_power()
        alone = formed(run, 2, ranks=1)
        assert (alone["cause"], alone["size_before"], alone["silent"]) == ("killed", 2, [1])
        assert alone["at_step"] >= joined["at_step"]

        other = start(second)
        again = formed(run, 3, ranks=2)
        assert again["cause"] == "membership" and again["at_step"] > alone["at_step"]

        second.pull_the_plug()
        cut = formed(run, 4, ranks=1)
        assert cut["cause"] == "timeout" and cut["at_step"] >= again["at_step"]
        said, _ = other.communicate(timeout=100)
        assert other.returncode == 1 and "lost each other" in said, said
        assert second.processes() == []

        metrics = first.read(run.info().metrics_urls["0"])
        counted = dict(re.findall(r'obsinfra_group_restarts_total{cause="(\w+)".*} (\S+)', metrics))
        assert {cause: float(count) for cause, count in counted.items() if float(count)} == {
            "membership": 2.0,
            "killed": 1.0,
            "timeout": 1.0,
        }
        kept.send_signal(signal.SIGTERM)
        output, _ = kept.communicate(timeout=100)
    assert run.info().state == "stopped", output
    saved = {checkpoint.step for checkpoint in run.checkpoints("emergency")}
    assert {event["at_step"] for event in (joined, alone, again, cut)} <= saved
    validations = run.events(0, "training", "validation")
    assert validations
    assert all(event["at_step"] == STEPS_PER_EPOCH * (event["epoch"] + 1) for event in validations)
