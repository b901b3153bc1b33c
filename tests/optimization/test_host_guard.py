"""Host memory runs short: what is given back, in which order, how far, and what is foreseen."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from events import captured_events
from hypothesis import given
from hypothesis import strategies as st
from waiting import wait_for

from obsinfra.catalog import metrics as catalog
from obsinfra.monitoring.instruments import Instruments
from obsinfra.optimization.host_guard import HostGuard, HostMemory, host_memory
from obsinfra.optimization.memory_forecast import FAR_SECONDS, MemoryForecast
from obsinfra.optimization.reclaim import resident_bytes, trim_allocator
from obsinfra.optimization.reclaimable import DATASET_CACHE_ORDER, PREFETCH_ORDER, register_reclaimable

MIB = 2**20
GIB = 2**30


class Machine:
    """A machine of 100 GiB whose use is what the test says; the guard's probe."""

    def __init__(self, used: float) -> None:
        self.used = used
        self.now = 0.0

    def probe(self) -> HostMemory:
        return HostMemory(int(self.used * GIB), 100 * GIB, "cgroup")

    def guard(self, instruments: Instruments | None = None) -> HostGuard:
        return HostGuard(85.0, instruments=instruments, probe=self.probe, clock=lambda: self.now)


@pytest.fixture
def registered() -> Iterator[Callable[[str, int, Callable[[], int]], None]]:
    withdraw = []

    def register(name: str, order: int, reclaim: Callable[[], int]) -> None:
        withdraw.append(register_reclaimable(name, order, reclaim))

    yield register
    for undo in withdraw:
        undo()


def test_measures_come_in_order_and_stop_when_they_have_helped(
    registered: Callable[[str, int, Callable[[], int]], None],
) -> None:
    machine, asked = Machine(used=90.0), []

    def gives(name: str, gib: float) -> Callable[[], int]:
        def give() -> int:
            asked.append(name)
            machine.used -= gib
            return int(gib * GIB)

        return give

    registered("images", DATASET_CACHE_ORDER, gives("images", 10.0))
    registered("texts", DATASET_CACHE_ORDER, gives("texts", 10.0))
    registered("loader", PREFETCH_ORDER, gives("loader", 2.0))
    instruments = Instruments()
    with captured_events() as events:
        done = machine.guard(instruments).look()
    assert [(one.kind, one.name) for one in done] == [
        ("gc", "garbage"), ("trim", "free lists"), ("prefetch", "loader"), ("cache", "images"),
    ]  # fmt: skip
    assert asked == ["loader", "images"], "the second cache was not needed"
    assert [one.claimed_bytes for one in done] == [None, None, 2 * GIB, 10 * GIB]
    assert [round(one.ratio, 2) for one in done] == [0.90, 0.90, 0.88, 0.78]
    counted = {m: instruments.get(catalog.MEMORY_GUARD_MEASURES, measure=m) for m in ("gc", "cache", "other")}
    assert counted == {"gc": 1, "cache": 1, "other": 0}
    (event,) = (event for event in events if event["event"] == "host_memory_short")
    assert event["relieved"] and event["source"] == "cgroup" and len(event["measures"]) == 4


def test_one_that_raises_does_not_keep_the_others_from_being_asked(
    registered: Callable[[str, int, Callable[[], int]], None],
) -> None:
    def broken() -> int:
        raise OSError("gone")

    registered("broken", 1, broken)
    registered("sound", 50, lambda: 0)
    instruments = Instruments()
    done = Machine(used=99.0).guard(instruments).look()
    assert [one.name for one in done] == ["garbage", "free lists", "sound"]
    assert instruments.get(catalog.TELEMETRY_ERRORS, component="memory_guard") == 1


def test_rounds_that_do_not_help_become_rare() -> None:
    machine = Machine(used=99.0)
    guard = machine.guard()
    rounds = []
    for second in range(200):
        machine.now = float(second)
        if guard.look():
            rounds.append(second)
    assert rounds == [0, 5, 15, 35, 75, 155]
    machine.used = 50.0
    assert guard.look() == []
    machine.used = 99.0
    assert guard.look() != [], "a new shortage is acted on at once"


def test_garbage_is_really_given_back_and_measured() -> None:
    gc.collect()
    gc.disable()
    try:
        knot: list[object] = [torch.ones(100 * MIB, dtype=torch.uint8)]
        knot.append(knot)
        before = resident_bytes()
        del knot
        garbage, *_ = Machine(used=90.0).guard().look()
    finally:
        gc.enable()
    assert garbage.kind == "gc" and garbage.freed_bytes > 90 * MIB
    assert resident_bytes() < before - 90 * MIB


def test_free_pages_of_the_c_library_are_given_back() -> None:
    kept = [bytes(1000) for _ in range(100_000)]  # below the size that gets pages of its own
    del kept[::2]
    full = resident_bytes()
    del kept
    if not trim_allocator():
        pytest.skip("this C library has no malloc_trim")
    assert resident_bytes() < full


def test_the_thread_acts_and_ends() -> None:
    machine, instruments = Machine(used=90.0), Instruments()
    guard = HostGuard(85.0, instruments=instruments, probe=machine.probe, look_seconds=0.01)
    guard.start()
    guard.start()
    wait_for(lambda: instruments.get(catalog.MEMORY_GUARD_MEASURES, measure="gc") > 0, "a round")
    guard.stop()
    guard.stop()
    assert not any(thread.name == "obsinfra-memory-guard" for thread in threading.enumerate())


def test_a_probe_that_fails_is_counted_and_said_once() -> None:
    def failing() -> HostMemory:
        raise OSError("no /proc")

    instruments = Instruments()
    with captured_events() as events:
        guard = HostGuard(85.0, instruments=instruments, probe=failing, look_seconds=0.005)
        guard.start()
        wait_for(
            lambda: instruments.get(catalog.TELEMETRY_ERRORS, component="memory_guard") > 2, "three failures"
        )
        guard.stop()
    assert sum(event["event"] == "memory_guard_failed" for event in events) == 1


def test_the_nearest_limit_counts(tmp_path: Path) -> None:
    assert host_memory(tmp_path).source == "host"
    proc, group = tmp_path / "proc/self", tmp_path / "sys/fs/cgroup/box"
    proc.mkdir(parents=True)
    group.mkdir(parents=True)
    (proc / "cgroup").write_text("0::/box\n")
    (proc / "mountinfo").write_text("30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    (group / "memory.max").write_text("1000000000\n")
    (group / "memory.current").write_text("999999999\n")
    (group / "memory.stat").write_text("inactive_file 0\n")
    found = host_memory(tmp_path)
    assert (found.source, found.limit_bytes, found.used_bytes) == ("cgroup", 1_000_000_000, 999_999_999)


@given(st.floats(1e3, 1e9), st.floats(0.0, 1e11))
def test_a_steady_growth_is_drawn_out_to_the_limit(bytes_per_second: float, used: float) -> None:
    forecast, limit = MemoryForecast(), 1e12
    for second in range(60):
        forecast.see(float(second), used + bytes_per_second * second, limit)
    expected = (limit - used - 59 * bytes_per_second) / bytes_per_second
    assert forecast.seconds_left() == pytest.approx(min(FAR_SECONDS, expected), rel=1e-3)


def test_no_trend_without_growth_or_time_or_when_memory_was_taken_once() -> None:
    flat, short, once = MemoryForecast(), MemoryForecast(), MemoryForecast()
    for second in range(100):
        flat.see(float(second), 5e9, 1e10)
        once.see(float(second), 1e9 if second < 20 else 9e9, 1e10)
    for second in range(20):
        short.see(float(second), 1e9 * second / 10, 1e10)
    assert [one.seconds_left() for one in (flat, short, once)] == [FAR_SECONDS] * 3


def test_exhaustion_is_foreseen_in_metric_and_log_once() -> None:
    machine, instruments = Machine(used=10.0), Instruments()
    guard = machine.guard(instruments)
    with captured_events() as events:
        for second in range(120):
            machine.now, machine.used = float(second), 10.0 + 0.2 * second
            guard.look()
    left = instruments.get(catalog.MEMORY_EXHAUSTION_SECONDS, device="host")
    assert left == pytest.approx((100.0 - machine.used) / 0.2, rel=0.01)
    (event,) = (event for event in events if event["event"] == "memory_exhaustion_foreseen")
    assert event["device"] == "host" and 200 < event["seconds"] < 600


def test_a_devices_end_is_foreseen_from_the_peak_of_its_allocator() -> None:
    machine, instruments, peak = Machine(used=10.0), Instruments(), [0.0]
    guard = HostGuard(
        85.0,
        instruments=instruments,
        probe=machine.probe,
        devices=lambda: [("cuda:1", peak[0], 80.0 * GIB)],
        clock=lambda: machine.now,
    )
    with captured_events() as events:
        for second in range(90):
            machine.now, peak[0] = float(second), (40.0 + 0.25 * second // 5 * 5) * GIB  # peaks rise in steps
            guard.look()
    assert instruments.get(catalog.MEMORY_EXHAUSTION_SECONDS, device="host") == FAR_SECONDS
    left = instruments.get(catalog.MEMORY_EXHAUSTION_SECONDS, device="cuda:1")
    assert left == pytest.approx((80.0 - peak[0] / GIB) / 0.25, rel=0.3)
    assert [e["device"] for e in events if e["event"] == "memory_exhaustion_foreseen"] == ["cuda:1"]
