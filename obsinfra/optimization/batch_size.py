"""The largest batch that fits into memory, and the fastest: found by trying, never by exhausting a host.

Called through `gpu_optimizer.find_batch_size`, or alone with a step of one's own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from obsinfra.errors import ConfigError, first_line
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.optimization.arguments import function, number, whole_number
from obsinfra.optimization.host_guard import host_memory
from obsinfra.optimization.memory_profiler import MemoryProfiler
from obsinfra.optimization.oom_recovery import is_out_of_memory, release_device_caches
from obsinfra.optimization.reclaim import resident_bytes
from obsinfra.optimization.timing import time_in_turns

FASTER_RATIO = 1.02
"""A larger batch must do so many more rows a second to count as faster: smaller ones train better per row."""


MOST_ROWS = 2**40
"""More than any memory holds; beyond it torch's own numbers of bytes would overflow."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One batch size.

    Attributes:
        rows: of the batch.
        fits: the step was done.
        seconds: of a step, median; None where it did not fit or was not timed.
        peak_bytes: memory needed: the device allocator's peak, or resident memory on a CPU. None where the
            size was left out because it was foreseen not to fit.
        problem: why it does not fit.
    """

    rows: int
    fits: bool
    seconds: float | None = None
    peak_bytes: int | None = None
    problem: str = ""

    @property
    def rows_per_second(self) -> float:
        """Throughput; 0 where it was not timed."""
        return self.rows / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """What was found.

    Attributes:
        largest: rows of the largest batch that fits.
        fastest: rows of the one with the most rows a second.
        tried: every size, in the order of its rows.
        limit_bytes: what memory was held to.
    """

    largest: int
    fastest: int
    tried: tuple[Tried, ...]
    limit_bytes: int


def find_batch_size(
    step: Callable[[int], object],
    device: torch.device,
    *,
    first: int = 1,
    last: int = 2**16,
    limit_bytes: int | None = None,
    memory_share: float = 0.85,
    rounds: int = 3,
) -> BatchSizes:
    """Double the batch until it does not fit, halve the gap, and time the sizes that fit.

    On CUDA a size is tried until the allocator refuses, or its peak passes the limit. On a CPU, where the
    kernel would kill the process instead, the next size is foreseen from the last two, and left out if it
    would pass the limit.

    Args:
        step: one whole training step (forward, backward, optimizer) with so many rows; repeatable.
        device: where it runs.
        first, last: smallest and largest size to try, in rows. No more than `step` has: one that is given
            1,000 rows of 64 takes 64, and says the larger batch fits and is as fast as it looks.
        limit_bytes: memory to stay below; default: `memory_share` of the device, or of the host or the
            container's limit.
        memory_share: see there.
        rounds: timed steps of each size.

    Raises:
        ConfigError: not even `first` rows fit, or the bounds are none.
    """
    function("step", step, "a function of the number of rows")
    for name, value in (("first", first), ("last", last)):
        whole_number(name, value, least=1, most=MOST_ROWS)
    whole_number("rounds", rounds, least=1)
    number("memory_share", memory_share, above=0, most=1)
    if limit_bytes is not None:
        whole_number("limit_bytes", limit_bytes, least=1)
    if first > last:
        raise ConfigError(f"batch sizes from {first} to {last}", "first ≤ last", "correct them")
    limit = limit_bytes if limit_bytes is not None else _limit(device, memory_share)
    tried: dict[int, Tried] = {}

    def attempt(rows: int) -> bool:
        tried[rows] = _foreseen(tried, rows, limit, device) or _attempt(step, rows, device, limit)
        return tried[rows].fits

    fits, rows = 0, first
    while rows <= last and attempt(rows):
        fits, rows = rows, rows * 2
        if fits < last < rows:
            rows = last
    if not fits:
        raise ConfigError(
            f"a batch of {first} does not fit: {tried[first].problem}",
            f"a step below {limit / 1e6:.0f} MB",
            "a smaller model, gradient checkpointing, or more memory",
        )
    too_many = rows if rows <= last else 0
    while too_many and too_many - fits > max(1, fits // 8):  # as fine as an eighth
        middle = (fits + too_many) // 2
        if attempt(middle):
            fits = middle
        else:
            too_many = middle
    for size, found in tried.items():
        if found.fits:
            seconds = time_in_turns({"step": lambda size=size: step(size)}, device, rounds=rounds, warm_up=0)  # type: ignore[misc]
            tried[size] = Tried(size, True, statistics.median(seconds["step"].seconds), found.peak_bytes)
    ordered = tuple(tried[rows] for rows in sorted(tried))
    best = max(found.rows_per_second for found in ordered)
    fastest = next(found.rows for found in ordered if found.rows_per_second * FASTER_RATIO >= best)
    result = BatchSizes(fits, fastest, ordered, limit)
    get_logger("performance").info(
        "batch_size_found",
        largest=fits,
        fastest=fastest,
        rows_per_second={found.rows: round(found.rows_per_second, 1) for found in ordered if found.seconds},
        limit_bytes=limit,
    )
    return result


def _attempt(step: Callable[[int], object], rows: int, device: torch.device, limit: int) -> Tried:
    """Do the step once and look at the peak."""
    profiler = MemoryProfiler()
    try:
        with profiler.block(f"batch of {rows}") as profile:
            step(rows)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = first_line(error)
        error.__traceback__ = None  # its frames hold the failed step's tensors
        release_device_caches(device)
        return Tried(rows, False, problem=problem)
    if device.type == "cuda":
        index = device.index or 0
        peak = next(found.allocated_peak for found in profile.devices if found.device == index)
    else:
        peak = profile.resident_peak
    if peak > limit:
        release_device_caches(device)
        return Tried(rows, False, peak_bytes=peak, problem=f"{peak / 1e6:.0f} MB are more than the limit")
    return Tried(rows, True, peak_bytes=peak)


def _foreseen(tried: dict[int, Tried], rows: int, limit: int, device: torch.device) -> Tried | None:
    """A size that a straight line through the two nearest says not to fit; on CUDA it is safe to try."""
    known = [(found.rows, found.peak_bytes) for found in tried.values() if found.fits and found.peak_bytes]
    if device.type == "cuda" or len(known) < 2:
        return None
    (less, at_less), (more, at_more) = sorted(known)[-2:]
    slope = max(0.0, (at_more - at_less) / (more - less))
    expected = at_more + slope * (rows - more)
    if expected <= limit:
        return None
    return Tried(rows, False, problem=f"{expected / 1e6:.0f} MB foreseen, more than the limit")


def _limit(device: torch.device, share: float) -> int:
    if device.type == "cuda":
        return int(share * torch.cuda.mem_get_info(device)[1])
    memory = host_memory()
    others = memory.used_bytes - resident_bytes()
    return int(share * memory.limit_bytes - max(0, others))
