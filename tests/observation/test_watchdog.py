"""The watchdog acts once for each deadline that passes, and ends when told."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from waiting import wait_for

from obsinfra.observation.watchdog import Watchdog


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def alive() -> bool:
    return any(thread.name == "obsinfra-watchdog" for thread in threading.enumerate())


def test_a_deadline_that_passes_is_acted_on_once() -> None:
    overdue: list[int] = []
    watchdog = Watchdog(None, on_signal_fd=lambda: None, on_overdue=lambda: overdue.append(1))
    for count in (1, 2):
        watchdog.expect(0.01)
        wait_for(lambda count=count: len(overdue) == count, "the deadline")  # type: ignore[misc]
    watchdog.stop()
    assert len(overdue) == 2
    assert not alive()


def test_an_earlier_deadline_stays_and_a_boundary_settles_it() -> None:
    acted = threading.Event()
    watchdog = Watchdog(None, on_signal_fd=lambda: None, on_overdue=acted.set)
    watchdog.expect(0.05)
    watchdog.expect(1000)
    assert acted.wait(20)
    acted.clear()
    watchdog.expect(1000)
    watchdog.satisfied()
    watchdog.expect(0.05)  # would not come this soon if the settled one still counted as the earlier
    assert acted.wait(20)
    watchdog.expect(1000)
    watchdog.satisfied()
    watchdog.stop()
    assert not alive()


def test_a_signal_wakes_it_and_may_set_a_deadline(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    acted = threading.Event()

    def signalled() -> None:
        os.read(reader, 10)
        watchdog.expect(0.01)

    watchdog = Watchdog(reader, on_signal_fd=signalled, on_overdue=acted.set)
    os.write(writer, b"x")
    assert acted.wait(20)
    watchdog.stop()


def test_it_may_be_stopped_from_within_and_twice() -> None:
    stopped = threading.Event()

    def stop() -> None:
        watchdog.stop()
        stopped.set()

    watchdog = Watchdog(None, on_signal_fd=lambda: None, on_overdue=stop)
    watchdog.expect(0.01)
    assert stopped.wait(20)
    wait_for(lambda: not alive(), "its end")
    watchdog.stop()
