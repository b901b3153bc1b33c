"""What a scrape of a full trainer takes, and what the loop notices of it.

    python benchmarks/bench_scrape.py [--rounds 20] [--seconds 5] [--devices 16]

A loop of steps of about 1 ms under `observe`, with checkpoints, traces and alerts as by default, and with
as many GPUs as asked for: NVML's stand-in from the tests is compiled and loaded in place of the machine's
own. Another process reads `/metrics` as Prometheus does, in OpenMetrics over a connection that it keeps, once
a second (the committed configuration: every five) in every other round, and says how long the whole answer
took; after it, once over a new connection. Compared are the steps of rounds with and without it.

Goals: an answer with 300 series or more within 10 ms; no effect that can be seen in the steps.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from time import perf_counter
from typing import IO
from urllib.parse import urlsplit

OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
STEP_SECONDS = 1e-3
SCRAPE_GOAL_MS = 10.0
STAND_IN = Path(__file__).parents[1] / "tests" / "monitoring" / "fake_nvml" / "fake_nvml.c"


def read_metrics(url: str) -> None:
    """The scraping process: a line on stdin begins a round of so many seconds, milliseconds end it; first
    those over the kept connection, then one over a new one."""
    address = urlsplit(url).netloc
    kept = http.client.HTTPConnection(address, timeout=30)
    timed_read(kept)
    for line in sys.stdin:
        taken: list[float] = []
        end = time.monotonic() + float(line) - 0.5
        while time.monotonic() + 0.5 < end:
            time.sleep(0.5)
            taken.append(timed_read(kept))
            time.sleep(0.5)
        fresh = http.client.HTTPConnection(address, timeout=30)
        taken.append(timed_read(fresh))
        fresh.close()
        print(" ".join(f"{ms:.3f}" for ms in taken), flush=True)


def timed_read(connection: http.client.HTTPConnection) -> float:
    """Milliseconds until the whole of `/metrics` is there."""
    began = perf_counter()
    connection.request("GET", "/metrics", headers={"Accept": OPENMETRICS})
    connection.getresponse().read()
    return (perf_counter() - began) * 1e3


def with_devices(folder: Path, devices: int) -> dict[str, str]:
    """The environment of a process that sees so many GPUs, by a library that speaks NVML."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        sys.exit(
            "error: no C compiler; expected gcc, for NVML's stand-in; fix: install it, or give --devices 0"
        )
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, STAND_IN], check=True)
    lines = [f"count {devices}"]
    for i in range(devices):
        readings = {
            "uuid": f"GPU-aaaaaaaa-{i:04}",
            "name": "stand-in",
            "memory.total": 80 * 2**30,
            "memory.used": 40 * 2**30,
            "utilization": 90,
            "memory.activity": 50,
            "temperature": 60,
            "power": 400_000,
            "clock.sm": 1_800,
            "clock.memory": 2_600,
            "reasons": 0,
            "ecc.corrected": 0,
            "ecc.uncorrected": 0,
            "pcie.replays": 0,
            "nvlink.crc": 0,
            "nvlink.replay": 0,
            "nvlink.recovery": 0,
        }
        lines += [f"{i}.{key} {value}" for key, value in readings.items()]
    state = folder / "state"
    state.write_text("".join(f"{line}\n" for line in lines))
    return {"LD_LIBRARY_PATH": str(folder), "FAKE_NVML_STATE": str(state)}


def calibrated(seconds: float) -> int:
    """How many rounds of the loop's arithmetic take about so long."""
    rounds = 1_000
    fastest = min(_timed(rounds) for _ in range(200))  # what disturbs makes it longer only
    return max(1, round(rounds * seconds / fastest))


def _timed(rounds: int) -> float:
    began = perf_counter()
    work(rounds)
    return perf_counter() - began


def work(rounds: int) -> float:
    total = 0.0
    for i in range(rounds):
        total += i * 0.5
    return total


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    import torch

    from obsinfra.observation import observe

    torch.set_num_threads(1)
    model = torch.nn.Linear(64, 64)
    rounds = calibrated(STEP_SECONDS)
    run = observe(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3),
        run="bench",
        output_dir=folder,
        metrics_port=0,
        log_level="error",
    )
    steps: dict[bool, list[float]] = {True: [], False: []}
    ratios: dict[str, list[float]] = {"p50": [], "p99": []}
    scrapes: list[float] = []
    fresh: list[float] = []
    with run:
        url = f"{run.monitor.url}/metrics"
        scraper = subprocess.Popen(
            [sys.executable, __file__, "--scraper", url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        asked, answered = _pipes(scraper)
        endless = iter(run.steps(iter(int, 1)))

        def turn(scraped: bool) -> list[float]:
            gc.collect()
            if scraped:
                print(arguments.seconds, file=asked, flush=True)
            taken: list[float] = []
            end = time.monotonic() + arguments.seconds
            before = perf_counter()
            while time.monotonic() < end:
                next(endless)
                run.record(loss=work(rounds), grad_norm=1.5, samples=32, learning_rate=1e-3)
                now = perf_counter()
                taken.append((now - before) * 1e3)
                before = now
            if scraped:
                *kept, new = map(float, answered.readline().split())
                scrapes.extend(kept)
                fresh.append(new)
            return taken

        turn(True)  # what the first scrapes load is not the loop's everyday
        scrapes.clear()
        fresh.clear()
        for number in range(arguments.rounds):
            order = (True, False) if number % 2 else (False, True)
            taken = {scraped: turn(scraped) for scraped in order}
            for name, q in (("p50", 0.5), ("p99", 0.99)):
                ratios[name].append(quantile(taken[True], q) / quantile(taken[False], q))
            for scraped in order:
                steps[scraped] += taken[scraped]
        with urllib.request.urlopen(url, timeout=30) as response:
            text = response.read().decode()
        asked.close()
        scraper.wait(timeout=60)
        run.request_stop("measured")
        next(endless, None)
    series = sum(1 for line in text.splitlines() if line and not line.startswith("#"))
    print(f"one scrape: {series} series, {len(text) / 1024:.0f} KiB, {len(scrapes)} scrapes")
    print(
        f"  median {statistics.median(scrapes):.2f} ms, p99 {quantile(scrapes, 0.99):.2f} ms, "
        f"goal {SCRAPE_GOAL_MS:.0f} ms; over a new connection: median {statistics.median(fresh):.2f} ms"
    )
    for scraped, name in ((False, "steps without"), (True, "steps scraped")):
        values = steps[scraped]
        print(
            f"{name}: p50 {quantile(values, 0.5):.3f} ms, p99 {quantile(values, 0.99):.3f} ms, "
            f"p99.9 {quantile(values, 0.999):.3f} ms ({len(values)} steps)"
        )
    for name, found in ratios.items():
        low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else (found[0],) * 3
        print(f"scraped ÷ without, {name} of each round: {middle:.3f} ({low:.3f} – {high:.3f})")


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each round, with and without")
    parser.add_argument(
        "--devices", type=int, default=16, help="GPUs of the stand-in; 0: the machine as it is"
    )
    parser.add_argument("--scraper", metavar="URL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scraper:
        return read_metrics(arguments.scraper)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.devices and "FAKE_NVML_STATE" not in os.environ:
            environ = {**os.environ, **with_devices(folder, arguments.devices)}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environ, check=False).returncode)
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
            f"Python {platform.python_version()}; "
            f"{arguments.rounds} rounds of {arguments.seconds:g} s each way",
            flush=True,
        )
        measure(arguments, folder / "runs")
    return None


if __name__ == "__main__":
    main()
