"""What the sidecar and the control channel hold: webhooks, round trips, the poll in the step, many runs.

    python benchmarks/bench_control.py [--rate 500] [--seconds 30] [--only webhooks roundtrip poll runs]

webhooks    a sidecar (a process of its own) gets so many notifications a second, each sent when it is due
            whether or not the ones before it were answered; its latency counts from that moment. One in
            ten is an alert never seen before that asks for an action of one of four runs (a second process
            with a real control channel each, acks written durably); the others repeat those, inform, or
            resolve. Then: every notification must be in the journal, every action carried out exactly once.
roundtrip   a command over the socket to a channel whose loop waits for nothing, to its final ack
poll        what a step pays when no command waits
runs        a folder of 1,000 runs, 50 of them live: scanned first, scanned again, told over HTTP

Everything runs on one machine and competes for it, sender and trainers included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil

from obsinfra.control.channel import ControlChannel
from obsinfra.control.client import send_command
from obsinfra.control.command import new_command
from obsinfra.control.journal import Journal
from obsinfra.control.run_watch import RunWatch
from obsinfra.run.folder import RunFolder, RunInfo
from obsinfra.run.process import ProcessId

RUNS = ("r0", "r1", "r2", "r3")
CONNECTIONS = 32
POLICY = "[policy]\ncool_down_seconds = 0\nemergency_checkpoints_per_hour = 3600\n"
ACTION = "checkpoint"
"""Not an emergency checkpoint, of which no policy allows more than 3,600 an hour."""

Json = dict[str, Any]


def make_run(output_dir: Path, name: str, **info: Any) -> RunFolder:
    folder = RunFolder(output_dir / name)
    folder.create()
    processes = {"0": asdict(ProcessId.current())}
    known = {"id": name, "model": "bench", "state": "running", "processes": processes}
    folder.write_info(RunInfo(**{**known, **info}))
    return folder


# ---- the trainers' process -----------------------------------------------------------------------------


def trainers(output_dir: Path) -> None:
    """Serve the control channels of `RUNS` until stdin ends, then print how often each command was done."""
    import threading

    done: Counter[str] = Counter()
    arrived = threading.Event()
    ended = threading.Event()
    channels = []
    for name in RUNS:
        channel = ControlChannel(
            make_run(output_dir, name),
            on_garbage=lambda door, why: None,
            on_outcome=lambda command, ack: None,
            on_arrival=arrived.set,
        )
        channel.start()
        channels.append(channel)

    def loop() -> None:
        while not ended.is_set():
            arrived.wait(0.2)
            arrived.clear()
            for channel in channels:
                for command in channel.take():
                    channel.ack(command.id, "running", step=1)
                    done[command.id] += 1
                    channel.ack(command.id, "done", step=1)

    thread = threading.Thread(target=loop)
    thread.start()
    print("ready", flush=True)
    sys.stdin.read()
    ended.set()
    thread.join()
    for channel in channels:
        channel.stop()
    print(json.dumps(done), flush=True)


@contextlib.contextmanager
def trainers_process(place: str) -> Iterator[Callable[[], Json]]:
    """`trainers` as a process of its own; gives what ends it and returns how often each command was done."""
    with subprocess.Popen(
        [sys.executable, __file__, "--trainers", place],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"

        def end() -> Json:
            assert process.stdout is not None and process.stdin is not None
            process.stdin.close()
            done: Json = json.loads(process.stdout.readline())
            return done

        yield end


# ---- webhooks ------------------------------------------------------------------------------------------


class Notifications:
    """The notifications of one round, made before it begins."""

    def __init__(self, count: int) -> None:
        chance = random.Random(0)
        self.bodies: list[bytes] = []
        self.fresh: list[str] = []
        seen: list[Json] = []
        for number in range(count):
            kind = chance.random()
            if kind < 0.1 or not seen:
                one = self._alert(f"f{number:06d}", chance.choice(RUNS), ACTION)
                seen.append(one)
                self.fresh.append(one["fingerprint"])
            elif kind < 0.5:
                one = chance.choice(seen)
            elif kind < 0.9:
                one = self._alert(f"i{number:06d}", chance.choice(RUNS), "")
            else:  # of an alert long over, so that it takes nothing away from the count
                one = self._alert(f"i{number:06d}", chance.choice(RUNS), "") | {"status": "resolved"}
            self.bodies.append(json.dumps({"version": "4", "receiver": "sidecar", "alerts": [one]}).encode())

    @staticmethod
    def _alert(fingerprint: str, run: str, action: str) -> Json:
        labels = {"alertname": "SlowStep", "run": run, "model": "bench", "rank": "0", "severity": "warning"}
        return {
            "status": "firing",
            "labels": labels | ({"action": action} if action else {}),
            "annotations": {"summary": "A step takes longer than 10 s", "description": "x" * 200},
            "startsAt": (datetime.now(UTC) - timedelta(seconds=5)).isoformat(),
            "endsAt": "0001-01-01T00:00:00Z",
            "fingerprint": fingerprint,
        }


class Sender:
    """An open loop over keep-alive connections: as cheap as it can be, so that it does not measure itself."""

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._head = (
            f"POST /webhook HTTP/1.1\r\nHost: sidecar\r\nAuthorization: Bearer {token}\r\n"
            "Content-Type: application/json\r\nContent-Length: "
        )
        self.latencies: list[float] = []
        self.statuses: Counter[int] = Counter()

    async def send(self, bodies: list[bytes], rate: float) -> None:
        queue: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue()
        workers = [asyncio.create_task(self._work(queue)) for _ in range(CONNECTIONS)]
        begin = time.perf_counter() + 0.5
        for number, body in enumerate(bodies):
            due = begin + number / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            queue.put_nowait((due, body))
        for _ in workers:
            queue.put_nowait(None)
        await asyncio.gather(*workers)

    async def _work(self, queue: asyncio.Queue[tuple[float, bytes] | None]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        while (item := await queue.get()) is not None:
            due, body = item
            writer.write(f"{self._head}{len(body)}\r\n\r\n".encode() + body)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            self.latencies.append(time.perf_counter() - due)
            self.statuses[int(head[9:12])] += 1
        writer.close()


@contextlib.contextmanager
def sidecar(output_dir: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    state = output_dir / ".stack"
    state.mkdir(exist_ok=True)
    (state / "policy.toml").write_text(POLICY)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "obsinfra.control.sidecar",
            f"--output-dir={output_dir}",
            f"--token-file={state / 'token'}",
            f"--state-dir={state / 'sidecar'}",
            f"--policy={state / 'policy.toml'}",
            f"--port={port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(trust_env=False) as client:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if client.get(f"http://127.0.0.1:{port}/healthz").status_code == 200:
                        break
                time.sleep(0.1)
        yield process, port, (state / "token").read_text().strip()
    finally:
        process.terminate()
        process.wait()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def bench_webhooks(rate: float, seconds: float) -> bool:
    with tempfile.TemporaryDirectory() as place:
        output_dir = Path(place)
        with trainers_process(place) as ended:
            with sidecar(output_dir) as (process, port, token):
                resident = psutil.Process(process.pid).memory_info
                warm = Notifications(int(2 * rate))
                asyncio.run(Sender(port, token).send(warm.bodies[: int(rate)], rate / 2))
                before = resident().rss
                used = sum(psutil.Process(process.pid).cpu_times()[:2])
                sent = Notifications(int(rate * seconds))
                sender = Sender(port, token)
                began = time.perf_counter()
                asyncio.run(sender.send(sent.bodies, rate))
                took = time.perf_counter() - began - 0.5
                used = sum(psutil.Process(process.pid).cpu_times()[:2]) - used
                after = resident().rss
                journal = Journal(output_dir / ".stack" / "sidecar" / "journal.sqlite")
                drained = time.perf_counter()
                while journal.waiting() and time.perf_counter() - drained < 60:
                    time.sleep(0.05)
                heard = journal.alerts(10**7)
                outcomes = Counter(entry.outcome for entry in journal.commands(10**7))
                journal.close()
            done = Counter(ended())
    accepted = sum(entry.decision == "accepted" for entry in heard)
    lost = len(sent.bodies) + int(rate) - len(heard)
    fresh = len(set(sent.fresh) | {e.fingerprint for e in heard if e.decision == "accepted"})
    print(f"webhooks   {rate:.0f}/s for {took:.1f} s: {dict(sender.statuses)}")
    print(
        f"           latency p50 {1e3 * statistics.median(sender.latencies):.1f} ms, "
        f"p99 {1e3 * percentile(sender.latencies, 0.99):.1f} ms, "
        f"p99.9 {1e3 * percentile(sender.latencies, 0.999):.1f} ms, max {1e3 * max(sender.latencies):.1f} ms"
    )
    print(
        f"           sidecar: {used / took:.2f} processors; resident {before / 2**20:.1f} MiB before, "
        f"{after / 2**20:.1f} MiB after"
    )
    print(
        f"           {len(heard)} alerts journalled, {lost} lost; {accepted} commands of {fresh} firings: "
        f"{dict(outcomes)}; {sum(count > 1 for count in done.values())} done twice, "
        f"{accepted - len(done)} not done"
    )
    return lost == 0 and set(outcomes) == {"done"} and set(done.values()) == {1} and accepted == len(done)


# ---- the rest ------------------------------------------------------------------------------------------


def bench_roundtrip(count: int = 500) -> None:
    with tempfile.TemporaryDirectory() as place:
        with trainers_process(place) as ended:
            folder = RunFolder(Path(place) / RUNS[0])
            taken = []
            for _ in range(count):
                command = new_command(folder.id, ACTION, source="bench")
                began = time.perf_counter()
                assert send_command(folder, command, door="socket").state == "done"
                taken.append(time.perf_counter() - began)
            ended()
        synced = timeit.repeat(lambda: _durable_write(Path(place)), number=20, repeat=5)
    print(
        f"roundtrip  p50 {1e3 * statistics.median(taken):.2f} ms, p99 {1e3 * percentile(taken, 0.99):.2f} ms "
        f"({count} commands, two durable marks each; one durable write here: {1e3 * min(synced) / 20:.2f} ms)"
    )


def _durable_write(place: Path) -> None:
    fd = os.open(place / "x", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"x" * 200)
    os.fsync(fd)
    os.close(fd)


def bench_poll() -> None:
    import torch

    import obsinfra

    with tempfile.TemporaryDirectory() as place:
        model = torch.nn.Linear(2, 2)
        with obsinfra.observe(
            model, run="poll", output_dir=Path(place), disable_backups=True, metrics_port=0
        ) as run:
            name = "_attention"
            spent = min(
                timeit.repeat(f"if run.{name}: boundary()", globals={"run": run}, number=10**6, repeat=7)
            )
            idle = min(timeit.repeat("pass", number=10**6, repeat=7))
    print(f"poll       {spent - idle:.4f} µs a step")


def bench_runs(count: int = 1_000, live: int = 50) -> None:
    with tempfile.TemporaryDirectory() as place:
        output_dir = Path(place)
        urls = {"0": "http://127.0.0.1:9464/metrics"}
        for number in range(count):
            state = "running" if number < live else "finished"
            make_run(output_dir, f"run{number:04d}", state=state, metrics_urls=urls)
        watch = RunWatch(output_dir, lambda states: None)
        cold = timeit.timeit(watch._scan, number=1)
        warm = timeit.repeat(watch._scan, number=1, repeat=20)
        told = timeit.repeat(watch.targets, number=1, repeat=20)
        with sidecar(output_dir) as (_, port, token), httpx.Client(trust_env=False) as client:
            listed = []
            for _ in range(20):
                began = time.perf_counter()
                answer = client.get(
                    f"http://127.0.0.1:{port}/v1/runs", headers={"authorization": f"Bearer {token}"}
                )
                listed.append(time.perf_counter() - began)
                assert len(answer.json()) == count
    ms = [1e3 * statistics.median(times) for times in ([cold], warm, told, listed)]
    print(
        f"runs       {count} ({live} live): first scan {ms[0]:.1f} ms, next ones {ms[1]:.1f} ms, "
        f"/sd {ms[2]:.2f} ms, GET /v1/runs {ms[3]:.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=500.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--only", nargs="*", default=["runs", "poll", "roundtrip", "webhooks"])
    parser.add_argument("--trainers", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trainers is not None:
        trainers(given.trainers)
        return
    load = os.getloadavg()[0]
    print(f"Python {platform.python_version()}, {os.cpu_count()} processors, load {load:.1f} at the start")
    sound = True
    for name in given.only:
        if name == "webhooks":
            sound = bench_webhooks(given.rate, given.seconds)
        else:
            {"runs": bench_runs, "poll": bench_poll, "roundtrip": bench_roundtrip}[name]()
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
