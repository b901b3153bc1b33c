"""From a threshold crossed in a training loop to the committed checkpoint, through the real parts.

    python benchmarks/bench_crossing.py [--trials 50] [--loops 5] [--scrape 1s 5s] [--in-process]

Several small loops (a process each: `obsinfra.observe` around a two-layer model, 50 steps a second) raise
the gradient norm of one step to a million at random moments, each well after the last one was over. With the
stack (Prometheus, Alertmanager and the sidecar, natively, as `obsinfra up --scrape-interval` starts them) the
command comes from the sidecar; without, from the evaluator in the loop's own process. Printed, in seconds:

    to the sidecar   crossing → Alertmanager's webhook is in the sidecar's journal
    to the loop      crossing → the loop takes up the command
    commit           the loop takes up the command → the manifest is on disk
    all              crossing → the manifest is on disk

Wall-clock times of one machine; the crossing is the end of the step that recorded the norm.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.control.journal import Journal
from obsinfra.deployment.native_stack import NativeStack
from obsinfra.deployment.ports import StackPorts
from obsinfra.run.folder import RunFolder

ALERT = "GradientExplosion"
GAP_SECONDS = (36.0, 42.0)
"""The peak is shown for 15 s, and the sidecar does the same to a run at most every 30 s."""


@dataclass(frozen=True)
class Trial:
    """One crossing and what came of it; epoch seconds. `webhook` is None without a stack."""

    crossed: float
    webhook: float | None
    taken_up: float
    committed: float


def loop(run_name: str, output_dir: str, trials: int) -> None:
    """The loop's own process: crosses `trials` times and prints when."""
    import torch

    import obsinfra
    from obsinfra.config.settings import Settings

    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    settings = Settings(
        run=run_name, output_dir=Path(output_dir), metrics_port=0, checkpoint_seconds=0, trace_every=1000
    )
    run = obsinfra.observe(model, optimizer, settings=settings)
    inputs, wanted = torch.randn(16, 32), torch.randint(0, 10, (16,))
    chance = random.Random(run_name)
    due = time.monotonic() + chance.uniform(10, 20)
    crossed = 0

    def batches() -> Iterator[None]:
        while crossed < trials or time.monotonic() < due:
            time.sleep(0.02)
            yield None

    for _ in run.epochs(1):
        for _ in run.steps(batches()):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs), wanted)
            loss.backward()
            optimizer.step()
            now = crossed < trials and time.monotonic() >= due
            run.record(loss=loss, grad_norm=1e6 if now else 1.0)
            if now:
                print(json.dumps(time.time()), flush=True)
                crossed += 1
                due = time.monotonic() + chance.uniform(*GAP_SECONDS)


def measure(trials: int, loops: int, scrape: str | None) -> list[Trial]:
    """Run the loops side by side until each has crossed its share of times."""
    with tempfile.TemporaryDirectory(prefix="obsinfra-crossing-") as place:
        runs = Path(place) / "runs"
        stack = NativeStack(runs / ".stack") if scrape else None
        try:
            if stack is not None:
                stack.up(runs, ports=StackPorts(0, 0, 0), scrape_interval=scrape)
            names = [f"loop-{number}" for number in range(loops)]
            shares = [trials // loops + (number < trials % loops) for number in range(loops)]
            processes = [
                subprocess.Popen(
                    [sys.executable, __file__, "--loop", name, str(runs), str(share)],
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for name, share in zip(names, shares, strict=True)
                if share
            ]
            found = []
            for name, process in zip(names, processes, strict=False):
                said, _ = process.communicate()
                if process.returncode:
                    raise SystemExit(f"{name} ended with status {process.returncode}")
                crossings = [float(line) for line in said.split()]
                found += _trials(RunFolder(runs / name), crossings, stack)
            return found
        finally:
            if stack is not None:
                stack.down()


def _trials(folder: RunFolder, crossings: Sequence[float], stack: NativeStack | None) -> list[Trial]:
    """Each crossing with the emergency checkpoint that followed it, which must be one and one only."""
    saved = [m for m in create_backup_system(folder.checkpoints).list() if m.kind == "emergency"]
    commits = sorted(manifest.path.stat().st_mtime for manifest in saved)
    spans = [json.loads(line) for line in (folder.traces / "spans.jsonl").read_text().splitlines()]
    taken_up = sorted(s["start_ns"] / 1e9 for s in spans if s["name"] == "command emergency_checkpoint")
    webhooks: list[float] = []
    if stack is not None:
        with closing(Journal(stack.state_dir / "sidecar" / "journal.sqlite")) as journal:
            entries = [e for e in journal.commands() if e.command.run == folder.id and e.alert == ALERT]
            webhooks = sorted(entry.received_at for entry in entries)
    counts = {len(crossings), len(commits), len(taken_up), *([len(webhooks)] if stack else [])}
    if len(counts) != 1:
        raise SystemExit(
            f"{folder.id}: {len(crossings)} crossings, {len(webhooks)} webhooks, {len(taken_up)} commands, "
            f"{len(commits)} emergency checkpoints; expected as many of each"
        )
    return [
        Trial(crossed, webhooks[number] if stack else None, taken_up[number], commits[number])
        for number, crossed in enumerate(crossings)
    ]


def show(trials: Sequence[Trial]) -> None:
    """A line for each stretch."""
    stretches = {
        "to the sidecar": [t.webhook - t.crossed for t in trials if t.webhook is not None],
        "to the loop": [t.taken_up - t.crossed for t in trials],
        "commit": [t.committed - t.taken_up for t in trials],
        "all": [t.committed - t.crossed for t in trials],
    }
    print(f"  {'':16}{'median':>9}{'p90':>9}{'p99':>9}{'max':>9}   seconds")
    for name, seconds in stretches.items():
        if seconds:
            ordered = sorted(seconds)

            def at(q: float, ordered: Sequence[float] = ordered) -> float:
                return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

            figures = (statistics.median(ordered), at(0.9), at(0.99), ordered[-1])
            print(f"  {name:16}" + "".join(f"{figure:9.3f}" for figure in figures))


def main() -> None:
    if sys.argv[1:2] == ["--loop"]:
        name, output_dir, trials = sys.argv[2:]
        loop(name, output_dir, int(trials))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--loops", type=int, default=5)
    parser.add_argument("--scrape", nargs="*", default=["1s"])
    parser.add_argument("--in-process", action="store_true")
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for interval in options.scrape:
        found = measure(options.trials, options.loops, interval)
        print(f"with the stack, scraping every {interval}: {len(found)} trials")
        show(found)
    if options.in_process:
        found = measure(options.trials, options.loops, None)
        print(f"without a stack, in-process: {len(found)} trials")
        show(found)


if __name__ == "__main__":
    main()
