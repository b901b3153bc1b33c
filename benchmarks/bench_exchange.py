"""What it costs to be able to repeat a step on several ranks: `--oom-recovery on` against DDP.

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_exchange.py [--rounds 60]

With recovery the ranks exchange gradients, and who has failed, once all their passes are done, instead of
while backward runs. Both kinds train on the same ranks in turns, in alternating order, an MLP of 85,000
parameters and byte_gpt nano; a round's ratio is the time of a step with recovery over that of DDP.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from machine import processor_name
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from obsinfra.observation.ranks import Ranks, join
from obsinfra.optimization.micro_batching import MicroBatching
from obsinfra.optimization.oom_recovery import OutOfMemoryRecovery
from obsinfra.training.late_exchange import LateDataParallel
from obsinfra.training.parallelism import DataParallel
from obsinfra.workloads.byte_gpt import SIZES, ByteGPT

KINDS = ("ddp", "recovering")
Loss = Callable[[nn.Module], Tensor]


def stepper(kind: str, ranks: Ranks, make: Callable[[], nn.Module], loss: Loss) -> Callable[[], None]:
    """One optimizer step of a model of its own."""
    torch.manual_seed(0)
    late = LateDataParallel(ranks) if kind == "recovering" else None
    parallel = late or DataParallel(ranks)
    model = make()
    wrapped = parallel.wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    recovery = OutOfMemoryRecovery(model, MicroBatching(), torch.device("cpu"), late)

    def passes(shares: Any = None) -> None:
        with parallel.exchanging(wrapped, now=True):
            parallel.backward(loss(wrapped))

    def step() -> None:
        if late is None:
            passes()
        else:
            recovery.run(0, [torch.empty(1)], passes)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(name: str, ranks: Ranks, rounds: int, steps: int, make: Any, loss: Loss) -> None:
    """Print microseconds of a step of each kind, and the ratio's quartiles over the rounds."""
    kinds = {kind: stepper(kind, ranks, make, loss) for kind in KINDS}
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(-1, rounds):  # the first warms up
        for kind in KINDS if number % 2 else KINDS[::-1]:
            dist.barrier()
            began = time.perf_counter()
            for _ in range(steps):
                kinds[kind]()
            if number >= 0:
                taken[kind].append((time.perf_counter() - began) / steps * 1e6)
    ratios = [late / ddp for ddp, late in zip(*taken.values(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    if ranks.first:
        times = ", ".join(f"{kind} {statistics.median(values):.0f} µs" for kind, values in taken.items())
        print(f"{name}: {times} per step; recovering/ddp {middle:.3f} ({low:.3f} … {high:.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = max(2, parser.parse_args().rounds)
    if "RANK" not in os.environ:
        parser.error(
            "not started by torchrun; expected torchrun --nproc-per-node 2 benchmarks/bench_exchange.py"
        )
    torch.set_num_threads(1)
    ranks = join(60.0)
    draw = torch.Generator().manual_seed(ranks.rank)
    rows, labels = torch.randn(32, 64, generator=draw), torch.randint(0, 10, (32,), generator=draw)
    text = torch.randint(0, 256, (4, 129), generator=draw)

    def mlp() -> nn.Module:
        wide = nn.Linear(256, 256)
        return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), wide, nn.ReLU(), nn.Linear(256, 10))

    def gpt_loss(model: nn.Module) -> Tensor:
        return cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    if ranks.first:
        load = os.getloadavg()[0]
        print(f"{ranks.size} gloo ranks; {processor_name()}, {os.cpu_count()} cores, load {load:.1f}")
        print(f"torch {torch.__version__}; {rounds} rounds in alternating order; median and quartiles")
    measure("mlp", ranks, rounds, 40, mlp, lambda model: cross_entropy(model(rows), labels))
    measure("gpt", ranks, rounds, 3, lambda: ByteGPT(SIZES["nano"]), gpt_loss)
    ranks.leave("finished")


if __name__ == "__main__":
    main()
