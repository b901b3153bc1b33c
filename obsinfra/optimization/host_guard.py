"""A thread that watches host memory, gives some back before the kernel kills, and foresees its end.

Started by the trainer and by `create_memory_optimizer`. What it can give back besides garbage and free lists
has registered itself (`reclaimable`).
"""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import psutil
import torch

from obsinfra.catalog import metrics as catalog
from obsinfra.monitoring.cgroup import memory_limits
from obsinfra.monitoring.instruments import Instruments
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.optimization.memory_forecast import FAR_SECONDS, MemoryForecast
from obsinfra.optimization.reclaim import cuda_in_use, resident_bytes, trim_allocator
from obsinfra.optimization.reclaimable import DATASET_CACHE_ORDER, PREFETCH_ORDER, reclaimables

LOOK_SECONDS = 1.0
FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 120.0
"""After each round the next waits twice as long, up to this: a full collection stops the loop."""

WARN_SECONDS = 600.0
"""Memory that will be exhausted within this is worth a line in the log; the alert has its own threshold."""

MEASURES = ("gc", "trim", "prefetch", "cache", "other")
"""Labels of what the guard does."""


DeviceUse = tuple[str, float, float]
"""A device's name, bytes in use and bytes there could be."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory in use against the limit that is nearest.

    Attributes:
        used_bytes, limit_bytes: of that limit; file cache the kernel can give back does not count as used.
        source: `cgroup` or `host`.
    """

    used_bytes: int
    limit_bytes: int
    source: Literal["cgroup", "host"]

    @property
    def ratio(self) -> float:
        """Used ÷ limit."""
        return self.used_bytes / self.limit_bytes


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing the guard did.

    Attributes:
        kind: one of `MEASURES`.
        name: what exactly, e.g. the cache's own name.
        freed_bytes: resident memory before minus after; negative if it grew meanwhile.
        claimed_bytes: what the thing itself says it let go of; None for gc and trim.
        ratio: memory in use after it.
        seconds: how long it took.
    """

    kind: str
    name: str
    freed_bytes: int
    claimed_bytes: int | None
    ratio: float
    seconds: float


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The fuller of the host and every cgroup level above this process.

    Args:
        root: where `proc` and `sys` are found for the cgroups; another one for tests.
    """
    memory = psutil.virtual_memory()
    host = HostMemory(int(memory.total - memory.available), int(memory.total), "host")
    levels = [HostMemory(level.used_bytes, level.limit_bytes, "cgroup") for level in memory_limits(root)]
    return max([host, *levels], key=lambda level: level.ratio)


def devices_in_use() -> Iterator[DeviceUse]:
    """Each CUDA device this process uses: the peak of what its allocator gave out, and what it could give."""
    if not cuda_in_use():
        return
    for index in range(torch.cuda.device_count()):
        stats = torch.cuda.memory_stats(index)
        if peak := stats.get("allocated_bytes.all.peak", 0):
            free, _ = torch.cuda.mem_get_info(index)
            yield f"cuda:{index}", float(peak), float(free + stats.get("reserved_bytes.all.current", 0))


def _collect() -> None:
    gc.collect()


def _trim() -> None:
    trim_allocator()


class Guard(Protocol):
    """Watches memory while it is started."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class NoGuard:
    """Watches nothing."""

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass


class HostGuard:
    """Acts when memory in use is beyond `max_percent` of the nearest limit.

    In this order, and no further than it takes: collect garbage, have the C library give free pages back,
    then what has registered itself: batches loaded ahead, data-set caches, others.

    Args:
        max_percent: of the limit, 0 to 100.
        instruments: where effects are counted; None: in the log alone.
        probe: tells memory in use.
        devices: tells name, use and limit of each device in use, for the forecast; bytes.
        look_seconds: between two looks.
        clock: monotonic seconds.

    Attributes:
        forecasts: of the host and of each CUDA device in use, by name.
    """

    def __init__(
        self,
        max_percent: float = 85.0,
        *,
        instruments: Instruments | None = None,
        probe: Callable[[], HostMemory] = host_memory,
        devices: Callable[[], Iterable[DeviceUse]] | None = None,
        look_seconds: float = LOOK_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_percent = max_percent
        self.forecasts: dict[str, MemoryForecast] = {"host": MemoryForecast()}
        self._instruments = instruments or Instruments()
        self._devices = devices or devices_in_use
        self._probe, self._look_seconds, self._clock = probe, look_seconds, clock
        self._log = get_logger("system")
        self._next_round = -math.inf
        self._pause = FIRST_PAUSE_SECONDS
        self._warned: set[str] = set()
        self._failures = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        for kind in MEASURES:  # there from the first scrape, so that the first time is seen
            self._instruments.add(catalog.MEMORY_GUARD_MEASURES, 0, measure=kind)
            self._instruments.add(catalog.MEMORY_GUARD_FREED_BYTES, 0, measure=kind)

    def start(self) -> None:
        """Start the thread; nothing when it runs."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._watch, name="obsinfra-memory-guard", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread. May be called twice."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join(timeout=10)
            self._thread = None

    def look(self) -> list[Measure]:
        """One look: forecast, and act if need be. Returns what was done."""
        now, memory = self._clock(), self._probe()
        self._foresee(now, memory)
        limit = self.max_percent / 100.0
        if memory.ratio <= limit:
            self._next_round, self._pause = -math.inf, FIRST_PAUSE_SECONDS
            return []
        if now < self._next_round:
            return []
        done = []
        for measure in self._measures():
            done.append(measure)
            if measure.ratio <= limit:
                break
        relieved = done[-1].ratio <= limit
        self._next_round = now + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        self.forecasts["host"].forget()
        self._log.warning(
            "host_memory_short",
            used_bytes=memory.used_bytes,
            limit_bytes=memory.limit_bytes,
            source=memory.source,
            ratio=round(memory.ratio, 4),
            max_ratio=limit,
            relieved=relieved,
            measures=[
                {"measure": one.kind, "name": one.name, "freed_bytes": one.freed_bytes, "ratio": one.ratio}
                for one in done
            ],
        )
        return done

    def _measures(self) -> Iterator[Measure]:
        yield self._measured("gc", "garbage", _collect)
        yield self._measured("trim", "free lists", _trim)
        for entry in reclaimables():
            kind = {PREFETCH_ORDER: "prefetch", DATASET_CACHE_ORDER: "cache"}.get(entry.order, "other")
            try:
                yield self._measured(kind, entry.name, entry.reclaim)
            except Exception as error:  # a stranger's code; the others are still asked
                self._log.error("reclaim_failed", name=entry.name, error=repr(error))
                self._instruments.add(catalog.TELEMETRY_ERRORS, component="memory_guard")

    def _measured(self, kind: str, name: str, act: Callable[[], int | None]) -> Measure:
        before, started = resident_bytes(), self._clock()
        claimed = act()
        if kind not in ("gc", "trim"):
            trim_allocator()  # what was let go of lies in free lists first
        seconds, freed = self._clock() - started, before - resident_bytes()
        self._instruments.add(catalog.MEMORY_GUARD_MEASURES, measure=kind)
        self._instruments.add(catalog.MEMORY_GUARD_FREED_BYTES, max(0, freed), measure=kind)
        return Measure(kind, name, freed, claimed, self._probe().ratio, seconds)

    def _foresee(self, now: float, memory: HostMemory) -> None:
        self._see("host", now, memory.used_bytes, memory.limit_bytes)
        for device, used, limit in self._devices():
            self._see(device, now, used, limit)

    def _see(self, device: str, now: float, used: float, limit: float) -> None:
        forecast = self.forecasts.setdefault(device, MemoryForecast())
        forecast.see(now, used, limit)
        left = forecast.seconds_left()
        self._instruments.set(catalog.MEMORY_EXHAUSTION_SECONDS, left, device=device)
        if left < WARN_SECONDS and device not in self._warned:
            self._warned.add(device)
            self._log.warning(
                "memory_exhaustion_foreseen",
                device=device,
                seconds=round(left),
                used_bytes=int(used),
                limit_bytes=int(limit),
                bytes_per_second=round(forecast.bytes_per_second()),
            )
        elif left >= FAR_SECONDS:
            self._warned.discard(device)

    def _watch(self) -> None:
        while not self._stop.wait(self._look_seconds):
            try:
                self.look()
            except Exception as error:  # training goes on without the guard; counted, and said once
                self._instruments.add(catalog.TELEMETRY_ERRORS, component="memory_guard")
                self._failures += 1
                if self._failures == 1:
                    self._log.error("memory_guard_failed", error=repr(error), exc_info=error)
