"""What watching a training step costs the loop, beside the usual ways of doing it.

    python benchmarks/bench_monitor.py [--steps 1000] [--rounds 40] [--only bare obsinfra …]
    pip install tensorboard wandb          # for the contenders of that name

In every round each contender runs the same number of steps, in rotating order, within one process. A step
is a little arithmetic; the overhead is a contender's time per step less the bare loop's of the same round.

    obsinfra      TrainingMonitor, running (server, housekeeping, one scrape a second): step(), three
                  phase(), record(loss, grad_norm, samples, learning_rate)
    observe       the same values through `obsinfra.observe`: run.steps(), two phase(), record(...); the
                  third phase is the wait for the batch; control channel open, backups off
    naive         prometheus-client (8 gauges, 1 counter, 2 histograms through labels()), OpenTelemetry
                  spans for the step and three phases (BatchSpanProcessor, exporter that drops them), one
                  structlog JSON line to a file
    tensorboard   SummaryWriter.add_scalar × 8
    wandb         offline run.log of 8 values

What a contender leaves to other threads competes with the loop for the interpreter and so is partly in its
figure; obsinfra's is also shown by itself. Events are written to a temporary folder.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

from machine import processor_name

BUDGET_MICROSECONDS = 5.0

Loop = Callable[[int], None]
"""Runs this many steps."""

PACKAGES = (
    "obsinfra",
    "torch",
    "prometheus-client",
    "opentelemetry-sdk",
    "structlog",
    "tensorboard",
    "wandb",
)


def work() -> float:
    """What a step does besides being watched: about as long as the smallest conceivable one."""
    total = 0.0
    for i in range(40):
        total += i * 0.5
    return total


@contextmanager
def bare(folder: Path) -> Iterator[Loop]:
    def loop(steps: int) -> None:
        for _ in range(steps):
            work()

    yield loop


@contextmanager
def obsinfra(folder: Path) -> Iterator[Loop]:
    from obsinfra.monitoring.training_monitor import TrainingMonitor

    monitor = TrainingMonitor("bench", metrics_port=0, disk_path=folder)
    step, phase, record = monitor.step, monitor.phase, monitor.record

    def loop(steps: int) -> None:
        for _ in range(steps):
            with step():
                with phase("data"):
                    pass
                with phase("forward"):
                    loss = work()
                with phase("backward"):
                    pass
                record(loss=loss, grad_norm=1.5, samples=32, learning_rate=1e-3)

    with monitor, scraped(f"{monitor.url}/metrics"):
        yield loop
        measured_apart.append(housekeeping_cost(monitor, loop))


@contextmanager
def observe(folder: Path) -> Iterator[Loop]:
    import torch

    from obsinfra.observation import observe as begin

    model = torch.nn.Linear(4, 4)
    run = begin(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3),
        run="bench",
        output_dir=folder,
        disable_backups=True,
        metrics_port=0,
    )
    phase, record = run.phase, run.record

    def loop(steps: int) -> None:
        for _ in run.steps(range(steps)):
            with phase("forward"):
                loss = work()
            with phase("backward"):
                pass
            record(loss=loss, grad_norm=1.5, samples=32, learning_rate=1e-3)

    with run, scraped(f"{run.monitor.url}/metrics"):
        yield loop


@contextmanager
def naive(folder: Path) -> Iterator[Loop]:
    import structlog
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

    class Dropping(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    registry = CollectorRegistry()
    names = ("run", "rank")
    labels = {"run": "bench", "rank": "0"}
    gauges = [Gauge(f"bench_gauge_{i}", "A value.", names, registry=registry) for i in range(8)]
    counter = Counter("bench_steps", "Steps.", names, registry=registry)
    histograms = [Histogram(f"bench_seconds_{i}", "Seconds.", names, registry=registry) for i in range(2)]
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Dropping()))
    tracer = provider.get_tracer("bench")
    server, _ = start_http_server(0, addr="127.0.0.1", registry=registry)

    def loop(steps: int) -> None:
        for step in range(steps):
            began = perf_counter()
            with tracer.start_as_current_span("step"):
                with tracer.start_as_current_span("data"):
                    pass
                with tracer.start_as_current_span("forward"):
                    loss = work()
                with tracer.start_as_current_span("backward"):
                    pass
            seconds = perf_counter() - began
            for gauge in gauges:
                gauge.labels(**labels).set(loss)
            counter.labels(**labels).inc()
            for histogram in histograms:
                histogram.labels(**labels).observe(seconds)
            log.info("step", step=step, loss=loss, grad_norm=1.5, samples=32, learning_rate=1e-3)

    with (folder / "steps.jsonl").open("w") as file:
        log = structlog.wrap_logger(
            structlog.WriteLogger(file),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso"),
                structlog.processors.JSONRenderer(),
            ],
        )
        with scraped(f"http://127.0.0.1:{server.server_port}/metrics"):
            yield loop
    provider.shutdown()
    server.shutdown()
    server.server_close()


@contextmanager
def tensorboard(folder: Path) -> Iterator[Loop]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    names = [f"train/value_{i}" for i in range(8)]
    at = 0

    def loop(steps: int) -> None:
        nonlocal at
        for _ in range(steps):
            loss = work()
            for name in names:
                writer.add_scalar(name, loss, at)
            at += 1

    yield loop
    writer.close()


@contextmanager
def wandb(folder: Path) -> Iterator[Loop]:
    os.environ["WANDB_SILENT"] = "true"
    client = importlib.import_module("wandb")
    run = client.init(mode="offline", dir=str(folder), project="bench")
    names = [f"value_{i}" for i in range(8)]

    def loop(steps: int) -> None:
        for _ in range(steps):
            loss = work()
            run.log(dict.fromkeys(names, loss))

    yield loop
    run.finish()


CONTENDERS = {
    "bare": bare,
    "obsinfra": obsinfra,
    "observe": observe,
    "naive": naive,
    "tensorboard": tensorboard,
    "wandb": wandb,
}

measured_apart: list[str] = []
"""Lines about what the rounds do not show."""


@contextmanager
def scraped(url: str) -> Iterator[None]:
    """Read `url` once a second, as Prometheus would, from another thread of this process."""
    stop = threading.Event()

    def scrape() -> None:
        while not stop.wait(1.0):
            with urllib.request.urlopen(url, timeout=30) as response:
                response.read()

    thread = threading.Thread(target=scrape, name="bench-scraper", daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join()


def housekeeping_cost(monitor: Any, loop: Loop) -> str:
    """What obsinfra leaves to its own thread: processor time of folding a step, and of a whole round."""
    folds, rounds, steps = [], [], 5_000
    for _ in range(20):
        monitor.recorder.fold()
        loop(steps)
        began = time.thread_time()
        monitor.recorder.fold()
        folds.append((time.thread_time() - began) / steps * 1e6)
        began = time.thread_time()
        monitor._tick()
        rounds.append((time.thread_time() - began) * 1e3)
    return (
        f"obsinfra off the loop's thread: {statistics.median(folds):.2f} µs of processor time per step, "
        f"{statistics.median(rounds):.2f} ms once a second for samples, alerts, spans and history"
    )


def measure(
    loops: dict[str, Loop], steps: int, rounds: int, progress: Callable[[int], None]
) -> dict[str, list[float]]:
    """Microseconds per step of every contender in every round."""
    names = list(loops)
    for loop in loops.values():
        loop(max(50, steps // 5))
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            began = perf_counter()
            loops[name](steps)
            taken[name].append((perf_counter() - began) / steps * 1e6)
        progress(number + 1)
    return taken


def environment(steps: int, rounds: int) -> str:
    installed = []
    for package in PACKAGES:
        try:
            installed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            installed.append(f"{package} not installed")
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return (
        f"{processor_name()}, {os.cpu_count()} cores{load}; Python {platform.python_version()}\n"
        f"{', '.join(installed)}\n"
        f"{rounds} rounds of {steps} steps for each contender, order rotated"
    )


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def report(taken: dict[str, list[float]], missing: dict[str, str]) -> None:
    """The table: overhead over the bare loop of the same round."""
    base = taken["bare"]
    over = {
        name: quartiles([mine - bare for mine, bare in zip(values, base, strict=True)])
        for name, values in taken.items()
        if name != "bare"
    }
    ours = over.get("obsinfra")
    print(f"\n{'µs per step':<12} {'total':>9} {'overhead':>9} {'quartiles':>19} {'ratio to obsinfra':>18}")
    for name in CONTENDERS:
        if name in missing:
            print(f"{name:<12} {missing[name]}")
        elif name == "bare":
            print(f"{name:<12} {statistics.median(base):>9.2f}")
        elif name in over:
            low, middle, high = over[name]
            ratio = f"{middle / ours[1]:.1f}" if ours else ""
            total = statistics.median(taken[name])
            print(f"{name:<12} {total:>9.2f} {middle:>9.2f} {f'{low:.2f} – {high:.2f}':>19} {ratio:>18}")
    for line in measured_apart:
        print(line)
    if ours:
        verdict = "within" if ours[1] <= BUDGET_MICROSECONDS else "OVER"
        print(
            f"obsinfra is {verdict} its budget: {ours[1]:.2f} of {BUDGET_MICROSECONDS:.0f} µs at the median"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000, help="steps per contender and round")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="these (and bare) only")
    arguments = parser.parse_args()
    chosen = [name for name in CONTENDERS if not arguments.only or name in {"bare", *arguments.only}]
    print(environment(arguments.steps, arguments.rounds), flush=True)
    missing: dict[str, str] = {}
    loops: dict[str, Loop] = {}

    def progress(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\rround {done} of {arguments.rounds}", end="", file=sys.stderr)

    with tempfile.TemporaryDirectory() as scratch:
        with ExitStack() as stack:
            for name in chosen:
                folder = Path(scratch) / name
                folder.mkdir()
                try:
                    loops[name] = stack.enter_context(CONTENDERS[name](folder))
                except ModuleNotFoundError as error:
                    missing[name] = f"not installed: {error.name}"
                except ImportError as error:
                    missing[name] = f"cannot be imported: {error.name}"
            taken = measure(loops, arguments.steps, arguments.rounds, progress)
        report(taken, missing)


if __name__ == "__main__":
    main()
