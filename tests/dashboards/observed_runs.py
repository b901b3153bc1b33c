"""A stack that has watched real runs: one that exploded, was saved, killed and resumed; one of two ranks with
GPUs. What the boards are tested on, and what their previews show.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml
from stack_versions import StackVersion
from waiting import wait_for

from obsinfra.config.settings import Settings, environment_names
from obsinfra.control.client import send_command
from obsinfra.control.command import new_command
from obsinfra.dashboards.asking import Prometheus, Range
from obsinfra.deployment.native_stack import NativeStack, StackInfo
from obsinfra.deployment.ports import StackPorts
from obsinfra.run.folder import RunFolder, RunInfo
from obsinfra.run.process import ProcessId

TESTS = Path(__file__).parents[1]
SINGLE, RANKS = "digits-single", "digits-two-ranks"
EXPLODE_AT = 40
SCRAPE_SECONDS = 1.0

TRAINING = (
    "--model-name=digits --epochs=400 --schedule=cosine --threads=1 --precision=fp32 "
    "--checkpoint-seconds=4 --metrics-port=0 --sample-seconds=0.5 --stack=off --disable-testing "
    f"--trace-every=20 --inject=explode@{EXPLODE_AT}x3"
).split()

GIB = 2**30
GPUS = {"count": 2} | {
    f"{index}.{name}": value
    for index in range(2)
    for name, value in {
        "uuid": f"GPU-{index}",
        "name": "NVIDIA Stand-in",
        "utilization": 93 - 11 * index,
        "memory.total": 80 * GIB,
        "memory.used": (61 + 7 * index) * GIB,
        "temperature": 71 + 6 * index,
        "power": 412_000 + 30_000 * index,
        "reasons": hex(0x4 if index else 0),
        "clock.sm": 1755,
        "clock.memory": 2619,
        "ecc.corrected": 3 * index,
        "ecc.uncorrected": 0,
        "pcie.replays": 1,
        "nvlink.crc": 0,
    }.items()
}


EXPECTED = (
    f'obsinfra:samples_per_second:sum{{run="{SINGLE}"}}',
    f'obsinfra:samples_per_second:sum{{run="{RANKS}"}}',
    f'obsinfra:step_own_median:ratio_to_peers{{run="{SINGLE}"}}',
    f'obsinfra:data_share:ratio{{run="{SINGLE}"}}',
    f'obsinfra:step_duration_seconds:p99{{run="{SINGLE}"}} > 0',
    f'obsinfra:phase_seconds:rate1m{{run="{RANKS}", phase="data"}} > 0',
    f'obsinfra_validation_metric{{run="{SINGLE}"}}',
    f'obsinfra_validation_metric{{run="{RANKS}", rank="1"}}',
    f'obsinfra:train_loss:spread{{run="{SINGLE}"}}',
    f'obsinfra:lost_share:ratio{{run="{RANKS}", rank="1"}}',
    f'obsinfra:step_own_median:ratio_to_peers{{run="{RANKS}", rank="1"}} > 1',
)
"""What every Prometheus must have seen before the runs end."""

GPU_HOURS = (f'count_over_time(obsinfra:gpus:count{{run="{RANKS}"}}[1h:30s]) > 0',)
"""The panel looks every 30 seconds."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What was observed.

    Attributes:
        stack: the native stack, with the installed Prometheus.
        urls: name of a version → address of the Prometheus of it that scraped the same runs.
        over: from before the first run until all had happened that should.
    """

    stack: StackInfo
    urls: dict[str, str]
    over: Range


@contextlib.contextmanager
def observed_runs(
    folder: Path, newer: StackVersion | None = None, seconds: float = 0.0, gpus: bool = True
) -> Iterator[Observed]:
    """Bring the stack up, let the runs happen, stop them, and yield while the stack is still up.

    Args:
        folder: for all of it.
        newer: a Prometheus beside the installed one, if it is there.
        seconds: let the runs go on for so long at least, for fuller pictures.
        gpus: whether the two ranks see GPUs: an NVML that the tests make.
    """
    output = folder / "runs"
    stack = NativeStack(output / ".stack")
    started = time.time()
    with contextlib.ExitStack() as closing:
        closing.callback(stack.down)
        info = stack.up(output, ports=StackPorts(0, 0, 0), scrape_interval=f"{SCRAPE_SECONDS:.0f}s")
        urls = {"installed": info.prometheus_url}
        program = newer.find("prometheus") if newer is not None else None
        if newer is not None and program is not None:
            urls[newer.name] = closing.enter_context(_second_prometheus(program, info, folder))
        with contextlib.ExitStack() as running:
            running.enter_context(_two_ranks(output, folder, gpus))
            seen_by = [Prometheus(url) for url in urls.values()]
            _one_run(output, running, seen_by, seconds, started)
            expected = (*EXPECTED, *(GPU_HOURS if gpus and shutil.which("gcc") else ()))
            for what in expected:
                _seen(seen_by, what)
            ended = wait_for(lambda: _complete(seen_by, expected), "a moment at which no scrape was missing")
        yield Observed(info, urls, Range(started, ended, SCRAPE_SECONDS))


def _one_run(
    output: Path, running: contextlib.ExitStack, seen_by: list[Prometheus], seconds: float, started: float
) -> None:
    """Explodes, is saved by the alert, told to save by a person, killed, and resumed."""
    run = RunFolder(output / SINGLE)
    first = running.enter_context(_trainer(output, f"--run={SINGLE}"))
    _seen(seen_by, f'obsinfra_checkpoints_total{{run="{SINGLE}", kind="emergency"}} > 0')
    told = send_command(run, new_command(run.id, "checkpoint", source="cli", reason="before the kill"))
    assert told.state == "done", told
    wait_for(lambda: time.time() - started > seconds / 2, "half of the time", seconds + 1)
    _seen(seen_by, f'obsinfra_control_commands_total{{run="{SINGLE}", action="checkpoint"}} > 0')
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    running.enter_context(_trainer(output, f"--resume={SINGLE}"))
    wait_for(lambda: time.time() - started > seconds, "the other half", seconds + 1)
    resumed = f'obsinfra_steps_total{{run="{SINGLE}"}} < obsinfra_step{{run="{SINGLE}"}}'
    _seen(seen_by, f'obsinfra_checkpoints_total{{run="{SINGLE}", kind="regular"}} > 0 and on (run) {resumed}')


def _complete(by: list[Prometheus], expected: tuple[str, ...]) -> float | None:
    """This moment, if every Prometheus has all that is expected: a busy machine misses scrapes."""
    at = time.time() - SCRAPE_SECONDS
    return at if all(prometheus.instant(what, at).series for prometheus in by for what in expected) else None


def _seen(by: list[Prometheus], query: str) -> None:
    """Wait until each Prometheus answers the query with something."""
    for prometheus in by:
        wait_for(
            lambda asked=prometheus: asked.instant(query, time.time()).series,
            f"{query} at {prometheus.url}",
            180,
        )


@contextlib.contextmanager
def _trainer(output: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "obsinfra.cli.main", "train", f"--output-dir={output}", *TRAINING]
    with (output / "trainer.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment()
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()


@contextlib.contextmanager
def _two_ranks(output: Path, folder: Path, gpus: bool) -> Iterator[None]:
    """Two ranks of one run, the second the slower; on a machine with two GPUs where gcc can make them."""
    environment = _environment() | (_gpus(folder) if gpus else {})
    run = RunFolder(output / RANKS)
    run.create()
    processes = [
        subprocess.Popen(
            [
                sys.executable, TESTS / "dashboards/rank_of_digits.py", f"--run={RANKS}", f"--rank={rank}",
                "--ranks=2", f"--data-seconds={0.01 + 0.02 * rank}", f"--folder={folder}",
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        urls = [process.stdout.readline().strip() for process in processes if process.stdout is not None]
        assert all(urls), urls
        ids = [ProcessId(process.pid, psutil.Process(process.pid).create_time()) for process in processes]
        run.write_info(
            RunInfo(
                RANKS,
                "digits",
                state="running",
                world_size=2,
                processes={str(rank): {"pid": me.pid, "created": me.created} for rank, me in enumerate(ids)},
                metrics_urls={str(rank): f"{url}/metrics" for rank, url in enumerate(urls)},
            )
        )
        yield
        run.update_info(state="finished")
    finally:
        for process in processes:
            process.communicate(timeout=30)


def _gpus(folder: Path) -> dict[str, str]:
    if shutil.which("gcc") is None:
        return {}
    library = folder / "nvml"
    library.mkdir()
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", library / "libnvidia-ml.so.1",
         TESTS / "monitoring/fake_nvml/fake_nvml.c"],
        check=True, timeout=120,
    )  # fmt: skip
    state = folder / "nvml_state"
    state.write_text("".join(f"{key} {value}\n" for key, value in GPUS.items()))
    return {"LD_LIBRARY_PATH": str(library), "FAKE_NVML_STATE": str(state)}


@contextlib.contextmanager
def _second_prometheus(program: str, stack: StackInfo, folder: Path) -> Iterator[str]:
    """Another one with the stack's configuration, less Alertmanager: it hears of each alert once."""
    written = stack.state_dir / "prometheus"
    document = yaml.safe_load((written / "prometheus.yml").read_text())
    del document["alerting"]
    configuration = written / "second.yml"
    configuration.write_text(yaml.safe_dump(document))
    log_path = folder / "second-prometheus.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [program, f"--config.file={configuration}", f"--storage.tsdb.path={folder / 'second-data'}",
             "--web.listen-address=127.0.0.1:0", "--enable-feature=exemplar-storage"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield wait_for(lambda: _listening(process), "the second Prometheus listens")
    finally:
        process.terminate()
        process.wait(30)


def _listening(process: subprocess.Popen[bytes]) -> str | None:
    assert process.poll() is None, "the second Prometheus ended"
    for connection in psutil.Process(process.pid).net_connections():
        if connection.status == psutil.CONN_LISTEN:
            return f"http://127.0.0.1:{connection.laddr.port}"
    return None


def _environment() -> dict[str, str]:
    """The present one without anything that would steer a training."""
    steering = {name for field in Settings.model_fields for name in environment_names(field)}
    clean = {name: value for name, value in os.environ.items() if name not in steering}
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
