"""How far does byte_gpt get, and how fast? Trains it in a plain loop and prints bits per byte with the time.

    python benchmarks/bench_byte_gpt.py [--size nano] [--epochs 8] [--seed 0] [--threads 1] [--data-path P]

Everything else is the workload's own default. Bits per byte are those of held-out files; processor time is of
all threads and counts training, validation and reading, not the joining of the corpus.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.nn.utils import clip_grad_norm_

from obsinfra.training.schedule import Schedule
from obsinfra.workloads.byte_gpt import SIZES, ByteGPTWorkload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="nano")
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-path", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    device = torch.device("cpu")
    workload = ByteGPTWorkload(arguments.data_path, arguments.size)
    defaults = workload.defaults
    model = workload.build_model()
    batches = workload.train_batches(
        model, batch_size=defaults.batch_size, seed=arguments.seed, num_workers=0, device=device
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=defaults.learning_rate,
        weight_decay=defaults.weight_decay,
        betas=defaults.betas,
        eps=defaults.eps,
    )
    epochs = arguments.epochs or defaults.epochs
    schedule = Schedule(
        optimizer,
        defaults.schedule,
        warmup_steps=defaults.warmup_steps,
        total_steps=epochs * len(batches),
    )
    facts = {name: value for name, value in workload.describe_data().items() if name != "source"}
    print("data:", facts)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{arguments.size}: {parameters:,} parameters, torch {torch.__version__}, {arguments.threads} threads"
    )
    print(f"{'epoch':>5} {'bytes seen':>11} {'train bits/byte':>15} {'held-out bits/byte':>18} "
          f"{'CPU seconds':>11} {'wall seconds':>12}")  # fmt: skip
    seen, cpu, wall = 0, time.process_time(), time.perf_counter()
    for epoch in range(epochs):
        model.train()
        bits = []
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            output = workload.training_step(model, batch)
            output.loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bits.append(float(output.metrics["bits_per_byte"]))
            seen += output.samples * workload.shape.context
        model.eval()
        with torch.inference_mode():
            found = workload.validate(model, device)
        print(
            f"{epoch + 1:>5} {seen:>11,} {sum(bits) / len(bits):>15.3f} {found['bits_per_byte']:>18.3f} "
            f"{time.process_time() - cpu:>11.1f} {time.perf_counter() - wall:>12.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
