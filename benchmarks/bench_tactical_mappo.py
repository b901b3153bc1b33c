"""Does tactical_mappo learn? Trains it over several seeds in a plain loop and prints what it earned.

    python benchmarks/bench_tactical_mappo.py [--seeds 5] [--epochs 100] [--threads 1]

Training reward is that of the greedy policy over the whole training period, in the units of the environment
(percent per bar, less risk), beside acting at random and buying and holding. Validation is the period after
the split, which no parameter has seen; it says whatever it says.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.nn.utils import clip_grad_norm_

from obsinfra.training.schedule import Schedule
from obsinfra.workloads.registry import create_workload
from obsinfra.workloads.tactical_mappo import TacticalMappo
from obsinfra.workloads.tactical_mappo.environment import MarketReplay
from obsinfra.workloads.tactical_mappo.evaluation import greedy, hold, pieces, play, uniformly_random


def train(workload: TacticalMappo, seed: int, epochs: int) -> torch.nn.Module:
    """A model after `epochs`, by the workload's own defaults."""
    defaults = workload.defaults
    torch.manual_seed(seed)
    model = workload.build_model()
    batches = workload.train_batches(
        model, batch_size=defaults.batch_size, seed=seed, num_workers=0, device=torch.device("cpu")
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=defaults.learning_rate,
        weight_decay=defaults.weight_decay,
        betas=defaults.betas,
        eps=defaults.eps,
    )
    schedule = Schedule(
        optimizer,
        defaults.schedule,
        warmup_steps=defaults.warmup_steps,
        total_steps=epochs * len(batches),
        mode=defaults.mode,
    )
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            workload.training_step(model, batch).loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=TacticalMappo.defaults.epochs)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-path", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    workload = create_workload("tactical_mappo", data_path=arguments.data_path, model_size=None, seed=0)
    assert isinstance(workload, TacticalMappo)
    replay = MarketReplay(workload.market, workload.rules)
    training = pieces(workload.market.training, workload.rules.episode_bars)
    print("data:", workload.describe_data())
    held = play(replay, training, hold)
    print(f"{'seed':>4} {'random':>8} {'hold':>8} {'trained':>8}   {'val reward':>10} {'hold':>8} "
          f"{'val return':>10} {'hold':>8} {'sharpe':>7} {'hold':>6} {'seconds':>8}")  # fmt: skip
    wins = 0
    for seed in range(arguments.seeds):
        began = time.perf_counter()
        model = train(workload, seed, arguments.epochs)
        seconds = time.perf_counter() - began
        chance = play(replay, training, uniformly_random(seed))
        trained = play(replay, training, greedy(model, replay))
        with torch.inference_mode():
            found = workload.validate(model, torch.device("cpu"))
        wins += trained.reward > max(chance.reward, held.reward, 0.0)
        print(
            f"{seed:>4} {chance.reward:>8.4f} {held.reward:>8.4f} {trained.reward:>8.4f}   "
            f"{found['reward']:>10.4f} {found['buy_and_hold_reward']:>8.4f} {found['return']:>10.1%} "
            f"{found['buy_and_hold_return']:>8.1%} {found['sharpe']:>7.2f} "
            f"{found['buy_and_hold_sharpe']:>6.2f} {seconds:>8.1f}",
            flush=True,
        )
    print(f"trained beats random, hold and doing nothing on the training period: {wins} of {arguments.seeds}")


if __name__ == "__main__":
    main()
