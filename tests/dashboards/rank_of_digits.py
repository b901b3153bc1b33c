"""One rank of a training on scikit-learn's digits: it trains, is scraped, and ends with its stdin.

Started by `observed_runs.py` once per rank. Prints its metrics address first.
"""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from obsinfra.monitoring.training_monitor import TrainingMonitor

BATCH = 32


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--run", required=True)
    arguments.add_argument("--rank", type=int, required=True)
    arguments.add_argument("--ranks", type=int, required=True)
    arguments.add_argument("--data-seconds", type=float, required=True)
    arguments.add_argument("--folder", type=Path, required=True)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(given.rank)
    stop = threading.Event()
    monitor = TrainingMonitor(
        "digits",
        run=given.run,
        rank=given.rank,
        world_size=given.ranks,
        metrics_port=0,
        sample_seconds=0.5,
        disk_path=given.folder,
        epochs=1000,
        trace_every=20,
        trace_file=given.folder / f"spans-{given.rank}.jsonl",
    )
    with monitor:
        print(monitor.url, flush=True)
        threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
        train(monitor, given.rank, given.ranks, given.data_seconds, stop)


def train(
    monitor: TrainingMonitor, rank: int, ranks: int, data_seconds: float, stop: threading.Event
) -> None:
    """Train on every `ranks`-th image until told to stop; each batch is waited for so long."""
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    train_x, train_y, held_x, held_y = inputs[:1500], targets[:1500], inputs[1500:], targets[1500:]
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    mine = torch.arange(rank, len(train_x), ranks)
    monitor.steps_per_epoch = len(mine) // BATCH
    monitor.set_state("running")
    epoch = 0
    while True:
        monitor.begin_epoch(epoch)
        order = mine[torch.randperm(len(mine))]
        for rows in order.split(BATCH)[: monitor.steps_per_epoch]:
            with monitor.step():
                with monitor.phase("data"):
                    x, y = train_x[rows], train_y[rows]
                    if stop.wait(data_seconds):
                        return
                with monitor.phase("forward"):
                    loss = functional.cross_entropy(model(x), y)
                with monitor.phase("backward"):
                    optimizer.zero_grad()
                    loss.backward()
                with monitor.phase("optimizer"):
                    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                    optimizer.step()
                monitor.record(loss=loss, grad_norm=norm, samples=len(rows), learning_rate=0.05)
        with monitor.phase("validation"), torch.no_grad():
            held = model(held_x)
            accuracy = (held.argmax(1) == held_y).float().mean().item()
        monitor.log_validation({"loss": functional.cross_entropy(held, held_y).item(), "accuracy": accuracy})
        monitor.end_epoch()
        epoch += 1


if __name__ == "__main__":
    main()
