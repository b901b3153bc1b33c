"""How many threads a step on the CPU is fastest with: measured, because more of them are often slower.

Called through `gpu_optimizer`, or alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from obsinfra.errors import ConfigError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.optimization.arguments import function, shown, whole_number
from obsinfra.optimization.timing import time_in_turns

CPU = torch.device("cpu")

WITHIN_RATIO = 1.03
"""Of two numbers whose steps differ by less, the smaller is taken: the other threads have better to do."""


@dataclass(frozen=True, slots=True)
class ThreadTuning:
    """What was found.

    Attributes:
        threads: in use from now on.
        before: until now.
        seconds: median of a step by number of threads.
    """

    threads: int
    before: int
    seconds: dict[int, float]

    @property
    def speedup(self) -> float:
        """Seconds of a step before ÷ now."""
        return self.seconds[self.before] / self.seconds[self.threads]


def tune_threads(
    step: Callable[[], object], *, candidates: Sequence[int] | None = None, rounds: int = 5
) -> ThreadTuning:
    """Measure a step with several numbers of threads and keep the best one for this process.

    A sum is not always rounded alike by another number of threads: choose once, and give a resumed run the
    same number (`--threads`).

    Args:
        step: one step, repeatable.
        candidates: numbers to try; default: 1, 2, 4, … up to the processors this process may use.
        rounds: measurements of each.

    Raises:
        ConfigError: a candidate or rounds that are no whole number of at least 1.
    """
    before = torch.get_num_threads()
    function("step", step, "tune_threads(lambda: train_step(batch))")
    whole_number("rounds", rounds, least=1)
    if candidates is not None and not isinstance(candidates, Sequence):
        raise ConfigError(f"candidates {shown(candidates)}", "a list of whole numbers", "[1, 2, 4]")
    wanted = [whole_number("candidates", one, least=1) for one in candidates or ()]
    numbers = sorted({before, *(wanted if candidates is not None else _powers(available()))})

    def with_threads(count: int) -> Callable[[], object]:
        def run() -> object:
            torch.set_num_threads(count)
            return step()

        return run

    try:
        times = time_in_turns({str(n): with_threads(n) for n in numbers}, CPU, rounds=rounds)
    finally:
        torch.set_num_threads(before)
    seconds = {n: times[str(n)].median for n in numbers}
    fastest = min(seconds.values())
    chosen = min(n for n in numbers if seconds[n] <= WITHIN_RATIO * fastest)
    torch.set_num_threads(chosen)
    found = ThreadTuning(chosen, before, seconds)
    get_logger("performance").info(
        "threads_tuned", threads=chosen, before=before, speedup=round(found.speedup, 3), seconds=seconds
    )
    return found


def available() -> int:
    """Processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def _powers(limit: int) -> list[int]:
    out, n = [], 1
    while n < limit:
        out.append(n)
        n *= 2
    return [*out, limit]
