"""A slow machine is not a hung one: the drill waits as long as the run shows further steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from obsinfra.deployment import drill
from obsinfra.deployment.drill import Patience
from obsinfra.run.folder import RunFolder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(drill.time, "monotonic", lambda: now[0])
    return now


def test_each_further_step_begins_the_wait_anew(tmp_path: Path, clock: list[float]) -> None:
    folder = RunFolder(tmp_path / "slow")
    folder.create()
    patience = Patience(folder)
    for step in (1, 2, 3):
        clock[0] += drill.PATIENCE_SECONDS - 1
        folder.write_progress(step, 0)
        assert not patience.over
    clock[0] += drill.PATIENCE_SECONDS - 1
    folder.write_progress(3, 0)  # noted anew, but no further
    assert not patience.over
    clock[0] += 1
    assert patience.over


def test_what_is_no_number_of_steps_is_waited_for_once(clock: list[float]) -> None:
    patience = Patience()
    clock[0] += drill.PATIENCE_SECONDS - 1
    assert not patience.over
    clock[0] += 1
    assert patience.over


def test_a_run_that_shows_nothing_is_not_waited_for_longer(tmp_path: Path, clock: list[float]) -> None:
    patience = Patience(RunFolder(tmp_path / "none"))
    clock[0] += drill.PATIENCE_SECONDS
    assert patience.over
