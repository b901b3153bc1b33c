"""The main job end to end with real parts: crossing, alert, webhook, command, checkpoint, kill, resume."""

from __future__ import annotations

import json
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from stack_tools import get_json, needs_stack

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.manifest import Manifest
from obsinfra.control.journal import Journal
from obsinfra.deployment.drill import ALERT, EXPLODE_AT, Drill, DrillResult
from obsinfra.deployment.native_stack import NativeStack, StackInfo
from obsinfra.deployment.ports import StackPorts
from obsinfra.monitoring.chrome_trace import find_span_files
from obsinfra.run.folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("main-job") / "runs"


@pytest.fixture(scope="module")
def stack(runs: Path) -> Iterator[StackInfo]:
    """The real Prometheus, Alertmanager and sidecar on free loopback ports."""
    native = NativeStack(runs / ".stack")
    yield native.up(runs, ports=StackPorts(0, 0, 0), scrape_interval="1s")
    native.down()


@pytest.fixture(scope="module")
def result(runs: Path, stack: StackInfo) -> DrillResult:
    found = Drill(runs, stack, print).run()
    origin = found.timeline[0].at
    for moment in found.timeline:
        print(f"{moment.at - origin:8.3f} s  {moment.what}", file=sys.stderr)
    print(f"crossing → committed: {found.crossing_to_committed_seconds:.3f} s", file=sys.stderr)
    return found


@needs_stack
@pytest.mark.stack
class TestWithTheRealStack:
    def test_the_continuation_equals_a_run_that_was_never_interrupted(self, result: DrillResult) -> None:
        assert result.differing == ()
        assert result.tensors > 20
        assert result.final_step > result.killed_step >= result.saved_step > EXPLODE_AT

    def test_the_resumed_run_lost_nothing_that_was_saved(self, result: DrillResult) -> None:
        """It begins at the emergency checkpoint, or at a newer snapshot that outlived the trainer."""
        assert result.killed_step >= result.resumed_step >= result.saved_step
        assert f"resumed from the checkpoint of step {result.resumed_step}" in result.timeline[-1].what

    def test_everything_happened_in_order(self, result: DrillResult) -> None:
        moments = [moment.at for moment in result.timeline]
        assert moments == sorted(moments)
        assert len(moments) in (
            7,
            8,
        )  # the writer's own commit after the kill, where there was a newer snapshot

    def test_the_alert_was_raised_by_prometheus_itself(self, stack: StackInfo, result: DrillResult) -> None:
        query = f'max_over_time(ALERTS{{alertname="{ALERT}", alertstate="firing", run="{result.run}"}}[10m])'
        answer = get_json(f"{stack.prometheus_url}/api/v1/query?query={urllib.parse.quote(query)}")
        assert [series["metric"]["action"] for series in answer["data"]["result"]] == ["emergency_checkpoint"]

    def test_the_sidecar_delivered_it_once(self, stack: StackInfo, result: DrillResult) -> None:
        journal = Journal(stack.state_dir / "sidecar" / "journal.sqlite")
        commands = [entry for entry in journal.commands() if entry.command.run == result.run]
        journal.close()
        # A killed run's series goes stale, so the alert may resolve; it never asks twice for one firing.
        assert [entry.outcome for entry in commands] == ["done"]
        assert commands[0].ack is not None and commands[0].ack["step"] == result.saved_step

    def test_the_evaluator_in_the_trainer_left_it_to_the_sidecar(
        self, runs: Path, result: DrillResult
    ) -> None:
        reasons = [m.reason or "" for m in _checkpoints(runs, result) if m.kind == "emergency"]
        assert [why for why in reasons if why.startswith(f"sidecar: alert {ALERT}")] == reasons[:1]
        assert not any("in-process" in why for why in reasons)
        acks = list((runs / result.run / "control" / "acks").iterdir())
        assert [path.name[:3] for path in acks] == ["am-"]

    def test_one_trace_tells_the_story(self, stack: StackInfo, runs: Path, result: DrillResult) -> None:
        files = [
            *find_span_files(runs / result.run / "traces"),
            *find_span_files(stack.state_dir / "sidecar" / "traces"),
        ]
        spans = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        alerts = [span for span in spans if span["name"] == f"alert {ALERT}"]
        [alert] = [span for span in alerts if span["attributes"]["obsinfra.run"] == result.run]
        story = [span for span in spans if span["trace_id"] == alert["trace_id"]]
        assert {span["name"] for span in story} == {
            f"alert {ALERT}",
            "delivery emergency_checkpoint",
            "command emergency_checkpoint",
            "checkpoint",
        }
        assert {span["parent_id"] for span in story} == {None, alert["span_id"]}

    def test_every_checkpoint_left_behind_is_sound(self, runs: Path, result: DrillResult) -> None:
        for run in (result.run, f"{result.run}-uninterrupted"):
            found = create_backup_system(runs / run / "checkpoints").verify()
            assert found and all(one.problem is None for one in found)


def test_without_a_stack_the_trainer_closes_the_loop_itself(tmp_path: Path) -> None:
    result = Drill(tmp_path, None, print).run()
    assert result.differing == ()
    [manifest, *_] = [m for m in _checkpoints(tmp_path, result) if m.kind == "emergency"]
    assert manifest.reason == f"in-process: alert {ALERT}"
    print(f"crossing → committed: {result.crossing_to_committed_seconds:.3f} s", file=sys.stderr)


def _checkpoints(runs: Path, result: DrillResult) -> list[Manifest]:
    return create_backup_system(RunFolder(runs / result.run).checkpoints).list()
