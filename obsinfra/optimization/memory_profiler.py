"""What a block of code does to memory: resident and device memory before, after and at its peak. Blocks nest.

For `MemoryOptimizer.memory_profiler`. A profiler that is off hands out one empty context.
"""

from __future__ import annotations

import time
import tracemalloc
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from obsinfra.monitoring.logging_config import get_logger
from obsinfra.optimization.reclaim import cuda_in_use, resident_bytes

KEPT = 256
"""Profiles kept; each is in the log too."""

TRACE_FRAMES = 8


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One CUDA device, bytes; `fragmentation`: the part of reserved memory not allocated at the end."""

    device: int
    allocated_before: int
    allocated_after: int
    allocated_peak: int
    reserved_after: int
    reserved_peak: int
    fragmentation: float


@dataclass(slots=True)
class MemoryProfile:
    """One block. Filled when it ends.

    Attributes:
        name: with those of the blocks around it, as `outer/inner`.
        seconds: how long it took.
        resident_before, resident_after: bytes.
        resident_peak: bytes; of the samples at its ends where the kernel's own peak cannot be reset.
        peak_is_exact: whether it is the kernel's.
        devices: of each CUDA device in use.
        python: the largest growth of Python's allocations by line, where asked for.
    """

    name: str
    seconds: float = 0.0
    resident_before: int = 0
    resident_after: int = 0
    resident_peak: int = 0
    peak_is_exact: bool = False
    devices: tuple[DeviceProfile, ...] = ()
    python: tuple[dict[str, Any], ...] = ()

    @property
    def grown_bytes(self) -> int:
        """Resident memory after minus before."""
        return self.resident_after - self.resident_before


@dataclass(slots=True)
class _Open:
    """A block under way, and the highest peaks seen in it so far."""

    profile: MemoryProfile
    resident_peak: int = 0
    allocated_peaks: dict[int, int] = field(default_factory=dict)
    reserved_peaks: dict[int, int] = field(default_factory=dict)


class MemoryProfiler:
    """Profiles blocks of one thread.

    Peaks are the process's own counters, set back at the beginning of each block and carried over to the
    blocks around it.

    Args:
        enabled: False makes every block free.

    Attributes:
        profiles: of the blocks that ended, the latest last.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.profiles: deque[MemoryProfile] = deque(maxlen=KEPT)
        self._open: list[_Open] = []
        self._log = get_logger("performance")

    def block(self, name: str, *, python_top: int = 0) -> AbstractContextManager[MemoryProfile]:
        """A context manager around a block of code; gives its profile, which is filled at the end.

        Args:
            name: for the log.
            python_top: lines of Python listed whose allocations grew most; 0 lists none. Costs several times
                the block's own time.
        """
        if not self.enabled:
            return _OFF
        return self._block(name, python_top)

    @contextmanager
    def _block(self, name: str, python_top: int) -> Iterator[MemoryProfile]:
        path = f"{self._open[-1].profile.name}/{name}" if self._open else name
        self._carry_over()
        block = _Open(MemoryProfile(path, resident_before=resident_bytes()))
        self._open.append(block)
        profile = block.profile
        profile.peak_is_exact = _reset_peaks()
        allocated_before = {index: int(torch.cuda.memory_allocated(index)) for index in _devices()}
        tracing = _start_tracing() if python_top else None
        before = tracemalloc.take_snapshot() if python_top else None
        started = time.perf_counter()
        try:
            yield profile
        finally:
            profile.seconds = time.perf_counter() - started
            if before is not None:
                profile.python = _grown(before, python_top)
                if tracing:
                    tracemalloc.stop()
            self._carry_over()
            self._open.pop()
            _reset_peaks()
            profile.resident_after = resident_bytes()
            profile.resident_peak = max(block.resident_peak, profile.resident_before, profile.resident_after)
            profile.devices = tuple(_device(index, allocated_before, block) for index in _devices())
            self.profiles.append(profile)
            self._log.info("memory_profile", **asdict(profile))

    def _carry_over(self) -> None:
        """The peaks since the last reset belong to every block that is open."""
        if not self._open:
            return
        resident = _resident_peak()
        peaks = {
            index: (int(torch.cuda.max_memory_allocated(index)), int(torch.cuda.max_memory_reserved(index)))
            for index in _devices()
        }
        for block in self._open:
            block.resident_peak = max(block.resident_peak, resident)
            for index, (allocated, reserved) in peaks.items():
                block.allocated_peaks[index] = max(block.allocated_peaks.get(index, 0), allocated)
                block.reserved_peaks[index] = max(block.reserved_peaks.get(index, 0), reserved)


_OFF: AbstractContextManager[MemoryProfile] = nullcontext(MemoryProfile("off"))


def _devices() -> range:
    return range(torch.cuda.device_count()) if cuda_in_use() else range(0)


def _device(index: int, allocated_before: dict[int, int], block: _Open) -> DeviceProfile:
    allocated, reserved = int(torch.cuda.memory_allocated(index)), int(torch.cuda.memory_reserved(index))
    return DeviceProfile(
        device=index,
        allocated_before=allocated_before.get(index, 0),
        allocated_after=allocated,
        allocated_peak=max(block.allocated_peaks.get(index, 0), allocated),
        reserved_after=reserved,
        reserved_peak=max(block.reserved_peaks.get(index, 0), reserved),
        fragmentation=1.0 - allocated / reserved if reserved else 0.0,
    )


def _reset_peaks() -> bool:
    """Set the peaks back to the present use. False where the kernel's own cannot be."""
    for index in _devices():
        torch.cuda.reset_peak_memory_stats(index)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5): resets VmHWM
    except OSError:
        return False
    return True


def _resident_peak() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return resident_bytes()


def _start_tracing() -> bool:
    if tracemalloc.is_tracing():
        return False
    tracemalloc.start(TRACE_FRAMES)
    return True


def _grown(before: tracemalloc.Snapshot, top: int) -> tuple[dict[str, Any], ...]:
    own = tracemalloc.Filter(False, tracemalloc.__file__)
    after = tracemalloc.take_snapshot().filter_traces([own])
    grown = after.compare_to(before.filter_traces([own]), "lineno")
    largest = sorted(grown, key=lambda stat: -stat.size_diff)[:top]
    return tuple(
        {"bytes": stat.size_diff, "blocks": stat.count_diff, "at": str(stat.traceback)}
        for stat in largest
        if stat.size_diff > 0
    )
