"""What garbage collection does to the slowest steps, and what recovery from a lack of memory costs per step.

    python benchmarks/bench_gc.py [--steps 4000] [--rounds 10] [--full-seconds 2] [--kept 1]

The digits workload in a plain loop that keeps a record or more of each step, as loops do, and leaves
reference cycles, as callbacks and exceptions do. Two ways to collect, in turns, the order changing from round
to round: wherever Python likes, and between two steps (`--gc boundary`). Percentiles are of the step itself;
what lies between two steps is told apart, and the mean has both. Rounds shorter than `--full-seconds` have no
full collection by `boundary`. Then the same step with and without `MemoryOptimizer.run`, in turns.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

import torch
from machine import processor_name

from obsinfra.optimization.gc_schedule import BoundaryGc, GcSchedule, PythonGc
from obsinfra.optimization.memory_optimizer import create_memory_optimizer
from obsinfra.optimization.micro_batching import Share
from obsinfra.workloads.digits import Digits

BATCH = 16
CYCLES = 20
"""Objects in reference cycles left by each step."""


class Node:
    """Refers to itself; only the collector frees it."""

    def __init__(self) -> None:
        self.self = self


class Loop:
    """The digits, trained without anything of ours."""

    def __init__(self, kept: int = 1) -> None:
        self.kept = kept
        torch.manual_seed(0)
        self.workload = Digits()
        self.model = self.workload.build_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.batches = self.forever()
        self.history: list[dict[str, Any]] = []

    def forever(self) -> Iterator[Any]:
        batches = self.workload.train_batches(
            self.model, batch_size=BATCH, seed=0, num_workers=0, device=torch.device("cpu")
        )
        while True:
            yield from batches

    def passes(self, shares: Sequence[Share]) -> float:
        """Forward and backward; the loss."""
        total = 0.0
        for batch, weight, _ in shares:
            output = self.workload.training_step(self.model, batch)
            (output.loss * weight).backward()
            total += output.loss.item() * weight
        return total

    def step(self, batch: Any) -> None:
        loss = self.passes((Share(batch, 1.0, 0),))
        self.update(loss)

    def update(self, loss: float) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(self.kept):
            self.history.append({"loss": loss, "tags": {"phase": "train"}, "at": perf_counter()})
        for _ in range(CYCLES):
            Node()


def timed(loop: Loop, schedule: GcSchedule, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each step, and of what lay between it and the next."""
    seconds, between = [], []
    with schedule:
        for _ in range(steps):
            batch = next(loop.batches)
            began = perf_counter()
            loop.step(batch)
            ended = perf_counter()
            schedule.step_done()
            between.append(perf_counter() - ended)
            seconds.append(ended - began)
    return seconds, between


def percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def compare_collectors(steps: int, rounds: int, full_seconds: float, kept: int) -> None:
    loop = Loop(kept)
    made: dict[str, Callable[[], GcSchedule]] = {
        "python": PythonGc, "boundary": lambda: BoundaryGc(full_seconds),
    }  # fmt: skip
    taken: dict[str, list[list[float]]] = {name: [] for name in made}
    between: dict[str, list[float]] = {name: [] for name in made}
    full: list[BoundaryGc] = []
    timed(loop, PythonGc(), 200)
    for number in range(rounds):
        for name in sorted(made, reverse=bool(number % 2)):
            loop.history.clear()
            gc.collect()
            schedule = made[name]()
            seconds, gaps = timed(loop, schedule, steps)
            taken[name].append(sorted(seconds))
            between[name] += gaps
            if isinstance(schedule, BoundaryGc):
                full.append(schedule)
    print(f"\n{steps} steps a round, {kept} records kept of each, full collections every {full_seconds:g} s")
    heads = ("p50", "p95", "p99", "p99.9", "max", "longest between", "mean of both")
    print(f"{'ms':<10}" + "".join(f"{head:>{max(9, len(head) + 2)}}" for head in heads))
    for name, found in taken.items():
        ordered = sorted(second for block in found for second in block)
        gaps = between[name]
        shown = [percentile(ordered, share) * 1e3 for share in (0.5, 0.95, 0.99, 0.999, 1.0)]
        shown += [max(gaps) * 1e3, (sum(ordered) + sum(gaps)) / len(ordered) * 1e3]
        line = (f"{value:>{max(9, len(head) + 2)}.3f}" for head, value in zip(heads, shown, strict=True))
        print(f"{name:<10}" + "".join(line))
    ratios = [
        percentile(ours, 0.99) / percentile(theirs, 0.99)
        for ours, theirs in zip(taken["boundary"], taken["python"], strict=True)
    ]
    collections = [sum(one.collections[generation] for one in full) for generation in range(3)]
    longest = max(one.longest_seconds[2] for one in full) * 1e3
    spent = sum(sum(one.seconds) for one in full) / (steps * rounds) * 1e6
    print(
        f"p99 boundary ÷ python, median of {rounds} rounds: {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} – {max(ratios):.3f}); collections by generation {collections}, "
        f"longest full one {longest:.1f} ms, in all {spent:.1f} µs a step"
    )


def compare_recovery(steps: int, rounds: int) -> None:
    """Microseconds that `MemoryOptimizer.run` adds to a step."""
    loop = Loop()
    memory = create_memory_optimizer(0.0)
    memory.optimize_for_training(loop.model)
    added = []
    for number in range(rounds):
        found: dict[str, float] = {}
        for name in ("bare", "run") if number % 2 else ("run", "bare"):
            seconds = []
            for step in range(steps):
                batch = next(loop.batches)
                began = perf_counter()
                if name == "bare":
                    loop.passes((Share(batch, 1.0, 0),))
                else:
                    memory.run(step, (batch,), loop.passes)
                seconds.append(perf_counter() - began)
                loop.optimizer.zero_grad(set_to_none=True)
            found[name] = statistics.median(seconds)
        added.append((found["run"] - found["bare"]) * 1e6)
    print(
        f"recovery from a lack of memory, median step, run − bare: {statistics.median(added):.1f} µs "
        f"({min(added):.1f} – {max(added):.1f}, {rounds} rounds)"
    )
    empty = create_memory_optimizer(0.0)
    empty.optimize_for_training(torch.nn.Linear(1, 1))
    began = perf_counter()
    for step in range(100_000):
        empty.run(step, (None,), len)
    print(f"by itself, around an empty step: {(perf_counter() - began) * 10:.2f} µs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=4_000, help="per way and round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--full-seconds", type=float, default=2.0, help="between two full collections")
    parser.add_argument("--kept", type=int, default=1, help="records kept of each step")
    arguments = parser.parse_args()
    print(
        f"{processor_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; batch {BATCH}"
    )
    compare_collectors(arguments.steps, arguments.rounds, arguments.full_seconds, arguments.kept)
    compare_recovery(max(1, arguments.steps // 4), arguments.rounds)


if __name__ == "__main__":
    main()
