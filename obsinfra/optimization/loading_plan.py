"""How many workers, how much prefetch, pinned memory or not: measured on the data set itself, within memory.

Called once by data_loading, which gives it a way to start a loader; knows nothing else of it.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from obsinfra.monitoring.cgroup import memory_limits
from obsinfra.optimization.delivered_batches import batch_bytes
from obsinfra.optimization.micro_batching import batch_tensors

HANDOVER_FLOOR_SECONDS = 1e-4
"""Handing a batch over from another process takes about as long: faster data sets need no worker."""
NEGLIGIBLE_SHARE = 0.01
"""Of a step's time that loading may take in the loop's own process before workers are tried."""
MOST_PREFETCH = 8
"""Batches ahead per worker; more only hides a data set that is too slow for longer."""
WORKER_BYTES = 64 << 20
"""What a worker may need when nothing was measured: a forked interpreter's own pages."""
HEADROOM_SHARE = 0.5
"""Of the memory left under the limit, for batches ahead and workers; the rest is the training's."""


class Trial(Protocol):
    """A loader on trial."""

    def __next__(self) -> Any:
        """The next batch."""
        ...

    def worker_pids(self) -> list[int]:
        """Processes that work for it."""
        ...

    def close(self) -> None:
        """End them."""
        ...


@dataclass(frozen=True, slots=True)
class Measured:
    """One number of workers, tried.

    Attributes:
        workers: processes.
        seconds_per_batch: with the loop asking at once for the next, the start of the workers left out.
        handover_seconds: the loop's wait for a batch that is ready.
        worker_bytes: memory of its own of the largest worker.
    """

    workers: int
    seconds_per_batch: float
    handover_seconds: float
    worker_bytes: int = 0

    def wait_seconds(self, step_seconds: float) -> float:
        """Expected wait per batch of a loop that computes for `step_seconds` in between."""
        if self.workers == 0:
            return self.seconds_per_batch
        return self.handover_seconds + max(0.0, self.seconds_per_batch - step_seconds)


@dataclass(frozen=True, slots=True)
class LoadingPlan:
    """How data is loaded.

    Attributes:
        workers: processes; 0 loads in the loop's own.
        prefetch: batches ahead per worker; 0 without workers.
        pin_memory: whether batches are put into page-locked memory.
        batch_bytes: of a batch; 0 when none was looked at.
        reason: why, with the numbers.
        measured: what was tried.
    """

    workers: int
    prefetch: int
    pin_memory: bool
    batch_bytes: int = 0
    reason: str = "as asked"
    measured: tuple[Measured, ...] = ()


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is given and what is to be found.

    Attributes:
        workers, prefetch, pin_memory: as asked; None: to be measured.
        device: where batches go.
        step_seconds: time the loop computes per batch; None: taken to be as long as loading one.
        measure_seconds: most time to spend on measuring, about.
        max_memory_percent: of the memory limit that may be in use with everything loaded ahead.
        most_workers: candidates go up to this.
        measurable: whether the data can be read for it, and again from the beginning.
    """

    workers: int | None
    prefetch: int | None
    pin_memory: bool | None
    device: torch.device
    step_seconds: float | None
    measure_seconds: float
    max_memory_percent: float
    most_workers: int
    measurable: bool = True


def plan_loading(start: Callable[[int, int, bool], Trial], wishes: Wishes) -> LoadingPlan:
    """The plan for a data set, from measurements.

    Args:
        start: starts a loader from the beginning: (workers, prefetch, pin_memory).
        wishes: what is asked for.
    """
    pins = wishes.device.type == "cuda"
    given = wishes.workers == 0 or (wishes.workers is not None and wishes.prefetch is not None)
    if (given and not (pins and wishes.pin_memory is None)) or not wishes.measurable:
        workers = wishes.workers or 0
        why = "as asked" if given else "not measured: iterating the data set would use it up"
        return LoadingPlan(workers, (wishes.prefetch or 2) if workers else 0, bool(wishes.pin_memory), 0, why)
    room = int(HEADROOM_SHARE * headroom_bytes(wishes.max_memory_percent))
    seconds, size, batch = _in_process(start, wishes.measure_seconds / 4)
    if not seconds:
        workers = wishes.workers or 0
        prefetch = (wishes.prefetch or 2) if workers else 0
        return LoadingPlan(workers, prefetch, bool(wishes.pin_memory), size, "too few batches to measure")
    usual = statistics.median(seconds)
    measured = [Measured(0, usual, usual)]
    if wishes.workers is None:
        workers, why = _choose_workers(start, wishes, measured, size, room)
    else:
        workers, why = wishes.workers, "workers as asked"
    prefetch = wishes.prefetch if wishes.prefetch is not None else _prefetch(seconds, usual)
    if workers == 0:
        prefetch = 0
    elif wishes.prefetch is None:
        # The loop holds one batch more, and pinned memory each batch a second time for a moment.
        fits = int((room - workers * _worker_bytes(measured)) / max(1, workers * size))
        if fits < prefetch:
            prefetch = max(1, fits)
            why += f"; prefetch {prefetch} so that {_mib(workers * prefetch * size)} fit into {_mib(room)}"
    pin = wishes.pin_memory
    if pin is None:
        pin, how = _pinning_pays(batch, wishes.device) if pins else (False, "")
        why += how
    return LoadingPlan(workers, prefetch, pin, size, why, tuple(measured))


def _in_process(start: Callable[[int, int, bool], Trial], budget: float) -> tuple[list[float], int, Any]:
    """Seconds per batch (the first, cold one left out), bytes of the largest, and one of them."""
    trial = start(0, 0, False)
    seconds: list[float] = []
    largest, batch = 0, None
    try:
        batch = next(trial)
        largest = batch_bytes(batch)
        began = time.perf_counter()
        while len(seconds) < 200 and (len(seconds) < 3 or time.perf_counter() - began < budget):
            asked = time.perf_counter()
            batch = next(trial)
            seconds.append(time.perf_counter() - asked)
            largest = max(largest, batch_bytes(batch))
    except StopIteration:
        pass
    finally:
        trial.close()
    return seconds, largest, batch


def _choose_workers(
    start: Callable[[int, int, bool], Trial],
    wishes: Wishes,
    measured: list[Measured],
    size: int,
    room: int,
) -> tuple[int, str]:
    alone = measured[0].seconds_per_batch
    step = wishes.step_seconds if wishes.step_seconds is not None else alone
    told = f"{_ms(alone)} a batch in the loop's own process"
    if wishes.most_workers < 1:
        return 0, f"{told}; workers are not possible here"
    if alone < HANDOVER_FLOOR_SECONDS:
        return 0, f"{told}, faster than a hand-over between processes"
    if wishes.step_seconds is not None and alone < NEGLIGIBLE_SHARE * wishes.step_seconds:
        return 0, f"{told}, {alone / wishes.step_seconds:.1%} of a step"
    deadline = time.perf_counter() + 0.75 * wishes.measure_seconds
    workers = 1
    while workers <= wishes.most_workers:
        if workers * (_worker_bytes(measured) + 2 * size) > room:
            told += f"; {workers} workers do not fit into {_mib(room)}"
            break
        found = _try(start, workers, max(alone, deadline - time.perf_counter()))
        if found is None:
            break
        measured.append(found)
        waits = [one.wait_seconds(step) for one in measured]
        if time.perf_counter() > deadline or (workers > 1 and waits[-1] > 0.9 * waits[-2]):
            break
        workers *= 2
    best = min(one.wait_seconds(step) for one in measured)
    chosen = next(one for one in measured if one.wait_seconds(step) <= best + 0.1 * alone)
    waits_told = ", ".join(f"{one.workers}: {_ms(one.wait_seconds(step))}" for one in measured)
    computing = "computes" if wishes.step_seconds is not None else "is taken to compute"
    told += f"; wait per batch by workers, for a loop that {computing} {_ms(step)}: {waits_told}"
    return chosen.workers, told


def _try(start: Callable[[int, int, bool], Trial], workers: int, budget: float) -> Measured | None:
    """Throughput, hand-over time and memory of so many workers; None when the data ends too soon."""
    prefetch = 2
    trial = start(workers, prefetch, False)
    try:
        # The first batches were loaded while others started.
        for _ in range(workers):
            next(trial)
        began = time.perf_counter()
        count = 0
        while count < 3 * workers or (count < 50 * workers and time.perf_counter() - began < budget / 3):
            next(trial)
            count += 1
        per_batch = (time.perf_counter() - began) / count
        largest = max((_own_bytes(pid) for pid in trial.worker_pids()), default=0)
        time.sleep(min(budget / 3, per_batch * workers * (prefetch + 1)))  # now a batch is ready
        waits = []
        for _ in range(workers):
            asked = time.perf_counter()
            next(trial)
            waits.append(time.perf_counter() - asked)
    except StopIteration:
        return None
    finally:
        trial.close()
    return Measured(workers, per_batch, min(per_batch, statistics.median(waits)), largest)


def _prefetch(seconds: list[float], usual: float) -> int:
    """Enough to bridge the slow ones: twice as many ahead where one in twenty takes twice as long."""
    slow = sorted(seconds)[min(len(seconds) - 1, int(0.95 * len(seconds)))]
    return max(2, min(MOST_PREFETCH, math.ceil(slow / usual) + 1))


def _pinning_pays(batch: Any, device: torch.device) -> tuple[bool, str]:
    """Whether copies to the device are faster from page-locked memory, by at least a twentieth."""
    tensors = [tensor for tensor in batch_tensors(batch) if tensor.numel()]
    if not tensors:
        return False, "; nothing to pin"
    pinned = [tensor.pin_memory() for tensor in tensors]

    def seconds(found: list[torch.Tensor]) -> float:
        taken = []
        for _ in range(10):
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            for tensor in found:
                tensor.to(device, non_blocking=True)
            torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    seconds(pinned)  # once to warm up
    plain, locked = seconds(tensors), seconds(pinned)
    pays = locked < 0.95 * plain
    return pays, f"; a copy to {device} takes {_ms(plain)}, from pinned memory {_ms(locked)}"


def headroom_bytes(max_percent: float, root: Path = Path("/")) -> int:
    """Bytes left until the host's or the nearest cgroup's memory is in use to `max_percent`; 0 if none."""
    host = psutil.virtual_memory()
    lefts = [max_percent / 100 * host.total - (host.total - host.available)]
    lefts += [max_percent / 100 * level.limit_bytes - level.used_bytes for level in memory_limits(root)]
    return max(0, int(min(lefts)))


def usable_processors() -> int:
    """Processors this process may use: its affinity mask, and the cgroup's quota where there is one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2, or no quota
    return count


def _own_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except (psutil.Error, AttributeError):
        return 0


def _worker_bytes(measured: list[Measured]) -> int:
    return max([one.worker_bytes for one in measured if one.workers] or [0]) or WORKER_BYTES


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _mib(count: float) -> str:
    return f"{count / 2**20:.3g} MiB"
