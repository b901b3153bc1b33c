"""What a run costs Prometheus: series, bytes a sample, storage per run-day, and time of the boards' queries.

    python benchmarks/bench_dashboards.py --seconds 900      # longer is truer: full chunks hold 120 samples

A real training of the digits under the native stack, scraped by a Prometheus of its own that may be
asked for a snapshot of its data. A run-day is what one run of one rank takes at the committed five-second
interval; bytes a sample and an index's share come from the block that the snapshot wrote.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median

import httpx
import psutil
import yaml

from obsinfra.dashboards.asking import Prometheus, Range, choose, put_questions
from obsinfra.deployment.native_stack import NativeStack, find_binary
from obsinfra.deployment.ports import StackPorts
from obsinfra.errors import UserError

ROOT = Path(__file__).parents[1]
RUN = "bench-dashboards"
DAY_SCRAPES = 86_400 / 5
BLOCKS_A_DAY = 12
"""Each holds two hours and an index of its own, until Prometheus joins them."""
TRAINING = [
    "--model-name=digits",
    "--epochs=1000000",
    "--schedule=constant",
    "--threads=1",
    "--precision=fp32",
    "--metrics-port=0",
    "--stack=off",
    "--disable-testing",
    "--checkpoint-seconds=30",
]

START_SECONDS = 120.0
"""From the start of the trainer to its first step in Prometheus."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--seconds", type=float, default=600, help="how long the run is watched")
    arguments.add_argument("--interval", type=int, default=5, help="seconds between scrapes")
    arguments.add_argument("--repeat", type=int, default=5, help="how often each query is asked")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="obsinfra-bench-") as name, ExitStack() as closing:
        folder = Path(name)
        stack = NativeStack(folder / "runs/.stack")
        closing.callback(stack.down)
        info = stack.up(folder / "runs", ports=StackPorts(0, 0, 0), scrape_interval=f"{given.interval}s")
        url = closing.enter_context(own_prometheus(info.state_dir / "prometheus", folder / "data"))
        closing.enter_context(training(folder / "runs"))
        prometheus = Prometheus(url)
        started = wait_for_run(prometheus)
        while (left := started + given.seconds - time.time()) > 0:
            print(f"\r{left:5.0f} s left", end="", file=sys.stderr, flush=True)
            time.sleep(min(left, 5))
        print(file=sys.stderr)
        over = Range(started, time.time(), given.interval)
        series = int(prometheus.instant(f'count({{run="{RUN}"}})', over.end).series[0].last)
        scraped = int(prometheus.instant(f'count({{run="{RUN}", job="trainers"}})', over.end).series[0].last)
        chunks, index, samples, known = block_of(url, folder / "data")
        daily = series * (DAY_SCRAPES * chunks / samples + BLOCKS_A_DAY * index / known)
        judged = series - scraped
        print(f"series of a run of one rank     {series}: {scraped} scraped, {judged} recorded and alerts")
        print(f"samples of the snapshot         {samples}, {chunks / samples:.2f} bytes each in chunks")
        print(f"index of the snapshot           {index / known:.0f} bytes for each of {known} series")
        print(f"storage per run-day, 5 s apart  {daily / 1e6:.1f} MB")
        print("evaluation of a board's queries, by Prometheus's own statistics, ms:")
        print(f"  {'board':<10} {'queries':>7} {'median':>7} {'slowest':>8}  slowest panel")
        for path in sorted((ROOT / "grafana/dashboards").glob("*.json")):
            report(json.loads(path.read_text()), path.stem, prometheus, over, given.repeat)
        prometheus.close()


def report(board: dict[str, object], name: str, prometheus: Prometheus, over: Range, repeat: int) -> None:
    """One line about a board: each query's median of some repetitions."""
    chosen = choose(board, prometheus, over)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeat):
        for one in put_questions(board, prometheus, over, chosen):
            times.setdefault((one.panel["title"], one.answer.query), []).append(one.answer.seconds)
    typical = {key: median(values) for key, values in times.items()}
    slowest = max(typical, key=typical.__getitem__)
    middle, most = 1e3 * median(typical.values()), 1e3 * typical[slowest]
    print(f"  {name:<10} {len(typical):>7} {middle:>7.2f} {most:>8.2f}  {slowest[0]}")


@contextmanager
def own_prometheus(written: Path, data: Path) -> Iterator[str]:
    """A Prometheus with the stack's configuration that may be told to write a snapshot."""
    document = yaml.safe_load((written / "prometheus.yml").read_text())
    del document["alerting"]
    (written / "bench.yml").write_text(yaml.safe_dump(document))
    program = find_binary("Prometheus")
    assert program is not None
    process = subprocess.Popen(
        [
            program,
            f"--config.file={written / 'bench.yml'}",
            f"--storage.tsdb.path={data}",
            "--web.enable-admin-api",
            "--web.listen-address=127.0.0.1:0",
            "--enable-feature=exemplar-storage",
            "--log.level=error",
        ]
    )
    try:
        while not (ports := listening(process.pid)):
            time.sleep(0.05)
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def training(output: Path) -> Iterator[None]:
    command = [
        sys.executable,
        "-m",
        "obsinfra.cli.main",
        "train",
        f"--output-dir={output}",
        f"--run={RUN}",
        *TRAINING,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def listening(pid: int) -> list[int]:
    return [
        one.laddr.port for one in psutil.Process(pid).net_connections() if one.status == psutil.CONN_LISTEN
    ]


def wait_for_run(prometheus: Prometheus) -> float:
    """When the run is scraped and trains."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with suppress(UserError):  # Prometheus does not answer yet
            if prometheus.instant(f'obsinfra_steps_total{{run="{RUN}"}} > 0', time.time()).series:
                return time.time()
        time.sleep(0.5)
    raise SystemExit(f"error: no step of the run in Prometheus within {START_SECONDS:.0f} s")


def block_of(url: str, data: Path) -> tuple[int, int, int, int]:
    """Bytes of chunks and index, samples and series of the block that a snapshot of the present data is."""
    answer = httpx.post(f"{url}/api/v1/admin/tsdb/snapshot", trust_env=False, timeout=120)
    folder = data / "snapshots" / answer.json()["data"]["name"]
    stats = [json.loads(path.read_text())["stats"] for path in folder.glob("*/meta.json")]
    return (
        sum(path.stat().st_size for path in folder.glob("*/chunks/*")),
        sum(path.stat().st_size for path in folder.glob("*/index")),
        sum(block["numSamples"] for block in stats),
        sum(block["numSeries"] for block in stats),
    )


if __name__ == "__main__":
    main()
