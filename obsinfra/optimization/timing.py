"""Which of several ways is faster: timed in turns, so that a machine that slows down slows all of them.

Whoever chooses by trying comes here: layout, threads, attention, batch size, inference.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

ENOUGH_SECONDS = 0.01
"""A single measurement lasts at least so long; quicker calls are repeated in it."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call, one value per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest ÷ fastest round: what chance does to one measurement."""
        return max(self.seconds) / min(self.seconds)


def wait_for_device(device: torch.device) -> None:
    """Return when everything given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def time_in_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int = 7, warm_up: int = 2
) -> dict[str, Timing]:
    """Time each call `rounds` times, in turns.

    Args:
        calls: by name; each must be repeatable.
        device: waited for before a clock is read.
        rounds: measurements of each.
        warm_up: calls before them that do not count, such as those that compile or allocate.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(warm_up):
            call()
        repeats[name] = max(1, round(ENOUGH_SECONDS / max(1e-9, _once(call, device, 1))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(_once(call, device, repeats[name]))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _once(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Mean seconds of `repeats` calls in a row."""
    wait_for_device(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    wait_for_device(device)
    return (time.perf_counter() - started) / repeats
