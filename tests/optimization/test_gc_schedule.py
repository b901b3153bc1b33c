"""Garbage is collected between steps and nowhere else, and everything is as before afterwards."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from obsinfra.catalog import metrics as catalog
from obsinfra.errors import ConfigError
from obsinfra.optimization.gc_schedule import BoundaryGc, all_objects, create_gc_schedule


class Knot:
    """Refers to itself, so that only the collector frees it."""

    alive = 0

    def __init__(self) -> None:
        self.self = self
        Knot.alive += 1

    def __del__(self) -> None:
        Knot.alive -= 1


@pytest.fixture(autouse=True)
def _collector_as_before() -> Iterator[None]:
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    Knot.alive = 0
    yield
    assert (gc.isenabled(), gc.get_freeze_count()) == (enabled, frozen)
    gc.collect()


def step() -> None:
    """Leaves more garbage than Python would wait for."""
    for _ in range(2 * gc.get_threshold()[0]):
        Knot()


def test_knots_are_undone_between_steps_only() -> None:
    with BoundaryGc() as schedule:
        for _ in range(3):
            step()
            alive = Knot.alive
            assert alive >= 2 * gc.get_threshold()[0], "collected in the middle of a step"
            schedule.step_done()
            assert Knot.alive == 0
        assert sum(schedule.collections) == 3 and schedule.collections[2] == 0
        assert schedule.instruments.get(catalog.GC_COLLECTIONS, generation="0") == schedule.collections[0] > 0
        schedule.step_done()
        assert sum(schedule.collections) == 3, "nothing was due"


def test_a_full_collection_comes_at_intervals_and_freezes_what_is_kept() -> None:
    now = [0.0]
    with BoundaryGc(60.0, clock=lambda: now[0]) as schedule:
        kept = [Knot() for _ in range(10)]
        for at in (30.0, 61.0, 90.0, 122.0):
            now[0] = at
            step()
            schedule.step_done()
        assert schedule.collections[2] == 2
        assert gc.get_freeze_count() > 10 and len(kept) == Knot.alive


def test_a_forked_child_collects_as_python_does() -> None:
    read, write = os.pipe()
    with BoundaryGc():
        pid = os.fork()
        if pid == 0:
            os.write(write, b"on" if gc.isenabled() else b"off")
            os._exit(0)
        os.waitpid(pid, 0)
        assert not gc.isenabled()
    assert os.read(read, 3) == b"on"
    os.close(read)
    os.close(write)


def test_there_is_one_collector_to_be_in_charge_of() -> None:
    with BoundaryGc(), pytest.raises(ConfigError, match="a second BoundaryGc"), BoundaryGc():
        pass


def test_python_may_be_left_to_itself() -> None:
    with create_gc_schedule("python") as schedule:
        assert gc.isenabled()
        step()
        schedule.step_done()


def test_what_is_frozen_is_still_found_by_who_looks_for_it() -> None:
    now = [0.0]
    with BoundaryGc(60.0, clock=lambda: now[0]) as schedule:
        knot = Knot()
        now[0] = 61.0
        step()
        schedule.step_done()
        assert not any(thing is knot for thing in gc.get_objects()), "not frozen"
        assert any(thing is knot for thing in all_objects())
        now[0] = 122.0
        step()
        schedule.step_done()
        assert gc.get_freeze_count() > 0, "frozen again"
