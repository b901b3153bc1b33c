"""What a checkpoint costs the loop and how long it takes, beside torch's own ways of saving.

    python benchmarks/bench_checkpoint.py [--state-mb 360 1200] [--rounds 7] [--folder DIR] [--only stall …]

The state is a Transformer with AdamW, of 360 MB and then of 1.2 GB. In every round each contender saves the
same state once, in rotating order, on the same disk; ratios are medians of the ratios within a round. Between
rounds every parameter changes. A target is printed beside its figure, met or not; nothing is asserted.

    memory copy       every tensor into a warm buffer of ordinary memory: what a host snapshot costs at least
    snapshot          Checkpointer.snapshot: what the loop waits for
    torch.save        to a file, with fsync
    dcp.save          torch.distributed.checkpoint, FileSystemWriter, which syncs its files
    dcp.async_save    what the call takes, default staging; its background work ends before the round goes on
    torch_checkpointing   Meta's second way, where it is installed: save(), and the wait until the parameters
                      may be stepped (manager.lock()); its background write ends before the round goes on. It
                      does not sync its files. Its default staging, on the CPU unpinned shared memory;
                      without its O_DIRECT, with which its writes fail on ext4 (EINVAL: not aligned)
    raw write + fsync one file with the bytes of all tensors
    hash              sha256 of the same bytes
    commit            from the call of snapshot() to the durable manifest
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import structlog
import torch
from machine import processor_name
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.checkpointer import Checkpointer, create_checkpointer
from obsinfra.backup.retention import Retention
from obsinfra.backup.state_tree import encode
from obsinfra.backup.tensors import tensor_bytes

SECONDS = 600.0
SIZES = {360: (512, 9, 4096), 1200: (1024, 8, 4096)}
"""Width, layers and vocabulary of the model, by its size in MB with its optimizer."""

PARTS = ("stall", "commit", "restore", "steps", "hashes")


class Training:
    """A model, its optimizer, and a step without a forward and backward."""

    def __init__(self, state_mb: int, *, prepared: bool = True) -> None:
        width, layers, vocabulary = SIZES[state_mb]
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # nested tensors, which nobody uses here
            encoder = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True), layers
            )
        self.model = nn.ModuleDict({"embedding": nn.Embedding(vocabulary, width), "encoder": encoder})
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.step = 0
        if prepared:
            self.change(1.0)

    def change(self, share: float) -> None:
        """An optimizer step of the last parameters that make up `share` of all elements."""
        self.step += 1
        wanted = share * sum(parameter.numel() for parameter in self.model.parameters())
        for parameter in reversed(list(self.model.parameters())):
            if wanted <= 0:
                parameter.grad = None
                continue
            parameter.grad = torch.randn_like(parameter)  # else moments of one shape would all be equal
            wanted -= parameter.numel()
        self.optimizer.step()

    def train_step(self) -> None:
        """A whole step on a small batch: forward, backward, update."""
        self.optimizer.zero_grad()
        tokens = torch.randint(0, self.model["embedding"].num_embeddings, (2, 16))  # [B, T]
        self.model["encoder"](self.model["embedding"](tokens)).square().mean().backward()
        self.optimizer.step()
        self.step += 1

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def timed(call: Callable[[], Any]) -> float:
    began = perf_counter()
    call()
    return perf_counter() - began


class Contenders:
    """Every way of saving, each with its own folder."""

    def __init__(self, training: Training, folder: Path) -> None:
        self.training = training
        self.folder = folder
        _, tensors = encode(training.state())
        self.buffers = [torch.empty_like(tensor).zero_() for tensor in tensors]
        self.checkpointer = create_checkpointer(folder / "store", retention=Retention(keep_last=1))
        self.commits: list[float] = []
        self.peer, self.peer_problem = self.torch_checkpointing_manager()
        for _ in range(3):  # both slots exist, the writer runs
            self.snapshot_and_commit()
        self.commits.clear()

    def tensors(self) -> list[Tensor]:
        return encode(self.training.state())[1]

    def memory_copy(self) -> float:
        tensors = self.tensors()

        def copy() -> None:
            for buffer, tensor in zip(self.buffers, tensors, strict=True):
                buffer.copy_(tensor)

        return timed(copy)

    def snapshot_and_commit(self) -> float:
        """The stall; the commit's time goes into `commits`."""
        state = self.training.state()
        began = perf_counter()
        assert self.checkpointer.snapshot(state, step=self.training.step, epoch=0)
        stall = perf_counter() - began
        self.checkpointer.commit("regular", "bench").wait(SECONDS)
        self.commits.append(perf_counter() - began)
        return stall

    def torch_save(self) -> float:
        path = self.folder / "torch.pt"

        def write() -> None:
            with path.open("wb") as file:
                torch.save(self.training.state(), file)
                file.flush()
                os.fsync(file.fileno())

        return self.cleanly(path, write)

    def dcp_save(self) -> float:
        path = self.folder / "dcp"
        return self.cleanly(path, lambda: save(self.training.state(), checkpoint_id=path, no_dist=True))

    def dcp_async_save(self) -> float:
        path = self.folder / "dcp-async"
        shutil.rmtree(path, ignore_errors=True)
        futures: list[Any] = []
        took = timed(
            lambda: futures.append(async_save(self.training.state(), checkpoint_id=path, no_dist=True))
        )
        futures[0].result()
        shutil.rmtree(path)
        return took

    def torch_checkpointing_manager(self) -> tuple[Any, str]:
        """Its manager, after a first save that starts its process; or None and why it cannot be timed."""
        try:
            from torch_checkpointing import CheckpointManager
            from torch_checkpointing.checkpoint_process import CheckpointProcessConfig
            from torch_checkpointing.config import AsyncCheckpointSaverConfig
            from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig
        except ImportError as error:
            return None, f"cannot be imported: {error}"
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        process = CheckpointProcessConfig(subprocess_init_timeout_secs=int(SECONDS))
        manager = CheckpointManager(
            CheckpointManager.Config(
                save=AsyncCheckpointSaverConfig(process_config=process), storage_config=storage
            )
        )
        try:
            self.peer_save(manager)
        except Exception as error:  # whatever it is, it is shown
            with contextlib.suppress(Exception):
                manager.close()
            return None, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        return manager, ""

    def peer_save(self, manager: Any) -> float:
        path = self.folder / "torch-checkpointing"
        written: list[Any] = []

        def save() -> None:
            written.append(manager.save(str(path), self.training.state()))
            with manager.lock():
                pass

        took = timed(save)
        written[0].result(SECONDS)
        shutil.rmtree(path)
        return took

    def close(self) -> None:
        self.checkpointer.close()
        if self.peer is not None:
            self.peer.close()

    def raw_write(self) -> float:
        path = self.folder / "raw"
        chunks = [tensor_bytes(tensor) for tensor in self.tensors()]

        def write() -> None:
            with path.open("wb", buffering=0) as file:
                for chunk in chunks:
                    left = chunk
                    while left:
                        left = left[file.write(left) :]
                os.fsync(file.fileno())

        return self.cleanly(path, write)

    def hash(self) -> float:
        chunks = [tensor_bytes(tensor) for tensor in self.tensors()]
        return timed(lambda: [hashlib.sha256(chunk).digest() for chunk in chunks])

    def cleanly(self, path: Path, write: Callable[[], Any]) -> float:
        took = timed(write)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return took


def measure_stalls(contenders: Contenders, rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round, order rotated, every parameter changed in between."""
    calls: dict[str, Callable[[], float]] = {
        "memory copy": contenders.memory_copy,
        "snapshot": contenders.snapshot_and_commit,
        "torch.save": contenders.torch_save,
        "dcp.save": contenders.dcp_save,
        "dcp.async_save": contenders.dcp_async_save,
        "raw write + fsync": contenders.raw_write,
        "hash": contenders.hash,
    }
    if contenders.peer is not None:
        calls["torch_checkpointing"] = lambda: contenders.peer_save(contenders.peer)
    calls["dcp.async_save"]()  # starts its threads
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        contenders.training.change(1.0)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(calls[name]())
    taken["commit"] = list(contenders.commits)
    return taken


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def verdict(name: str, figure: float, target: float, unit: str = "×") -> None:
    met = "met" if figure <= target else "NOT MET"
    print(f"  {name:<66} {figure:>7.2f} {unit:<2} target ≤ {target:g} {unit:<2} {met}")


def report_stalls(taken: Mapping[str, list[float]], nbytes: int, peer_problem: str) -> None:
    print(f"\n{'ms':<20} {'median':>8} {'min':>8} {'max':>8} {'ratio to snapshot':>18}")
    for name, values in taken.items():
        row = [statistics.median(values), min(values), max(values)]
        beside = f"{ratio(values, taken['snapshot']):.2f}"
        print(f"{name:<20} {' '.join(f'{value * 1e3:>8.1f}' for value in row)} {beside:>18}")
    if peer_problem:
        print(f"torch_checkpointing  not timed: {peer_problem}")
    else:
        print(f"torch_checkpointing is {version('torch_checkpointing')}")
    print(f"snapshot moves {nbytes / statistics.median(taken['snapshot']) / 1e9:.1f} GB/s")
    verdict("stall / memory copy", ratio(taken["snapshot"], taken["memory copy"]), 1.5)
    verdict("stall / dcp.async_save's stall", ratio(taken["snapshot"], taken["dcp.async_save"]), 1 / 3)
    verdict("stall / torch.save", ratio(taken["snapshot"], taken["torch.save"]), 1 / 8)
    if "torch_checkpointing" in taken:
        beside = ratio(taken["snapshot"], taken["torch_checkpointing"])
        print(f"  {'stall / torch_checkpointing, which does not sync':<66} {beside:>7.2f} ×")
    alone = [a + b for a, b in zip(taken["raw write + fsync"], taken["hash"], strict=True)]
    verdict("snapshot to durable commit / (raw write + fsync + hash)", ratio(taken["commit"], alone), 2)


def measure_commits(training: Training, folder: Path, rounds: int) -> None:
    """A first commit, an unchanged one, and one of which 2 % changed, each time into a fresh store.

    Between the first two lies an unchanged one that is not timed: it is the first from the second slot, which
    the writer has to map.
    """
    first: list[float] = []
    again: list[float] = []
    little: list[float] = []
    bytes_first: list[float] = []
    bytes_again: list[float] = []
    bytes_little: list[float] = []
    writer_bytes = 0
    for number in range(rounds):
        training.change(1.0)
        root = folder / f"store-{number}"
        checkpointer = create_checkpointer(root)
        checkpointer.snapshot(training.state(), step=0, epoch=0)
        checkpointer.snapshot(training.state(), step=0, epoch=0)
        pid = checkpointer.writer_pid
        for times, sizes in (
            (first, bytes_first),
            ([], []),
            (again, bytes_again),
            (little, bytes_little),
        ):
            if times is little:
                training.change(0.02)
            began = perf_counter()
            checkpointer.snapshot(training.state(), step=1, epoch=0)
            saved = checkpointer.commit("regular", "bench").wait(SECONDS)
            times.append(perf_counter() - began)
            sizes.append(saved.bytes_written / saved.bytes_total)
        if pid is not None:
            writer_bytes = max(writer_bytes, _own_bytes(pid))
        checkpointer.close()
        shutil.rmtree(root)
    print(
        f"\nfirst commit {statistics.median(first) * 1e3:.0f} ms ({100 * min(bytes_first):.0f} % of the "
        f"bytes new), unchanged {statistics.median(again) * 1e3:.0f} ms, 2 % changed "
        f"{statistics.median(little) * 1e3:.0f} ms"
    )
    verdict("unchanged / first, time", 100 * ratio(again, first), 15, "%")
    verdict("unchanged / first, bytes", 100 * max(bytes_again), 1, "%")
    verdict("2 % changed / first, bytes", 100 * max(bytes_little), 5, "%")
    verdict("writer's memory beside the shared buffers", writer_bytes / 1e6, 150, "MB")


def _own_bytes(pid: int) -> int:
    """Unique memory of a process: what it shares with the trainer is left out."""
    return int(psutil.Process(pid).memory_full_info().uss)


def measure_restores(training: Training, folder: Path, rounds: int, state_mb: int) -> None:
    """A verified load, and torch.load of the same state with a hash of its tensors' bytes in memory."""
    backup = create_backup_system(folder / "restore")
    backup.save(training.state(), step=1, epoch=0)
    chunks = [tensor_bytes(tensor) for tensor in encode(training.state())[1]]
    path = folder / "restore.pt"
    torch.save(training.state(), path)
    ours: list[float] = []
    theirs: list[float] = []
    hashes: list[float] = []
    for number in range(rounds + 1):
        calls: list[tuple[list[float], Callable[[], Any]]] = [
            (ours, backup.load),
            (theirs, lambda: torch.load(path, weights_only=True)),
            (hashes, lambda: [hashlib.sha256(chunk).digest() for chunk in chunks]),
        ]
        for times, call in calls[number % 3 :] + calls[: number % 3]:
            took = timed(call)
            if number:
                times.append(took)
    print(
        f"\nverified restore {statistics.median(ours) * 1e3:.0f} ms, torch.load "
        f"{statistics.median(theirs) * 1e3:.0f} ms, hash of as much "
        f"in memory {statistics.median(hashes) * 1e3:.0f} ms (files in the page cache)"
    )
    together = [a + b for a, b in zip(theirs, hashes, strict=True)]
    verdict("verified restore / (torch.load + hash)", ratio(ours, together), 1.5)
    path.unlink()
    shutil.rmtree(folder / "restore")
    backup.create_checkpoint(training.model, training.optimizer, step=training.step)
    report_resumes(folder / "restore", state_mb)
    shutil.rmtree(folder / "restore")


RESUME_PARTS = ("imports", "model", "verified restore", "first step")


def report_resumes(store: Path, state_mb: int) -> None:
    """From the start of a process to the end of its first resumed step, as whoever starts it sees it."""
    command = [sys.executable, __file__, "--state-mb", str(state_mb), "--resume-from", str(store)]
    runs = []
    for _ in range(3):
        marks = [time.time()]
        marks += map(
            float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        )
        runs.append([after - before for before, after in pairwise(marks)])
    parts = [statistics.median(values) for values in zip(*runs, strict=True)]
    whole = statistics.median(sum(values) for values in runs)
    print(
        f"process start to first resumed step: {whole:.2f} s ("
        + ", ".join(f"{name} {seconds:.2f}" for name, seconds in zip(RESUME_PARTS, parts, strict=True))
        + f"; medians of {len(runs)})"
    )


def resume(store: Path, state_mb: int, started: float) -> None:
    """What a process of `report_resumes` does; prints the time after each of `RESUME_PARTS`."""
    training = Training(state_mb, prepared=False)
    built = time.time()
    found = create_backup_system(store).restore_from_checkpoint(training.model, training.optimizer)
    restored = time.time()
    training.step = found.step
    training.train_step()
    print(started, built, restored, time.time())


@contextlib.contextmanager
def checkpointing(training: Training, folder: Path) -> Iterator[Checkpointer]:
    checkpointer = create_checkpointer(folder / "steps", retention=Retention(keep_last=1))
    checkpointer.snapshot(training.state(), step=0, epoch=0)
    checkpointer.snapshot(training.state(), step=0, epoch=0)
    checkpointer.commit("regular", "warm up").wait(SECONDS)
    yield checkpointer
    checkpointer.close()
    shutil.rmtree(folder / "steps")


def measure_steps(training: Training, folder: Path, rounds: int) -> None:
    """Steps of another, small model while the big state is written, and without; turn and turn about.

    On one core less than there are, and on all: the writer needs one, and a loop on a GPU leaves it one.
    """
    cores = os.cpu_count() or 1
    threads_before = torch.get_num_threads()
    small = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
    batch = torch.randn(64, 256)

    def step() -> float:
        began = perf_counter()
        optimizer.zero_grad()
        small(batch).square().mean().backward()
        optimizer.step()
        return perf_counter() - began

    with checkpointing(training, folder) as checkpointer:
        for threads in sorted({max(1, cores - 1), cores}):
            torch.set_num_threads(threads)
            quiet: list[float] = []
            busy: list[float] = []
            for _ in range(50):
                step()
            for _ in range(rounds):
                training.change(1.0)
                checkpointer.snapshot(training.state(), step=training.step, epoch=0)
                pending = checkpointer.commit("regular", "bench")
                during = []
                while not pending.done:
                    during.append(step())
                busy += during
                quiet += [step() for _ in during]
            if not busy:
                continue
            p99 = [statistics.quantiles(values, n=100)[98] * 1e3 for values in (quiet, busy)]
            middle = [statistics.median(values) * 1e3 for values in (quiet, busy)]
            print(
                f"\nsteps of {threads} threads on {cores} cores: median {middle[0]:.2f} ms, {middle[1]:.2f} "
                f"while a checkpoint is written; p99 {p99[0]:.2f} and {p99[1]:.2f} ms; {len(busy)} steps"
            )
            verdict("median step during the write, slower by", 100 * (middle[1] / middle[0] - 1), 10, "%")
    torch.set_num_threads(threads_before)


def measure_hashes() -> None:
    """Hashes of the standard library, 64 MB at a time, one thread and two."""
    from concurrent.futures import ThreadPoolExecutor

    data = os.urandom(64_000_000)
    print("\nhash        1 thread  2 threads, GB/s")
    with ThreadPoolExecutor(2) as pool:
        for name in ("sha256", "sha1", "blake2b", "blake2s", "sha512", "sha3_256"):
            call = getattr(hashlib, name)
            single = min(timed(lambda call=call: call(data).digest()) for _ in range(3))  # type: ignore[misc]
            double = min(
                timed(lambda call=call: list(pool.map(lambda _: call(data).digest(), range(2))))  # type: ignore[misc]
                for _ in range(3)
            )
            print(f"{name:<10} {0.064 / single:>9.2f} {0.128 / double:>10.2f}")


def environment() -> str:
    return (
        f"{processor_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; "
        f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


def measure_state(state_mb: int, arguments: argparse.Namespace) -> None:
    """Everything that depends on the size of the state."""
    training = Training(state_mb)
    tensors = encode(training.state())[1]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    print(
        f"\n== state of {nbytes / 1e6:.0f} MB in {len(tensors)} tensors, {arguments.rounds} rounds",
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        if "stall" in arguments.only:
            contenders = Contenders(training, folder)
            report_stalls(measure_stalls(contenders, arguments.rounds), nbytes, contenders.peer_problem)
            contenders.close()
            del contenders
        if "commit" in arguments.only:
            measure_commits(training, folder, arguments.rounds)
        if "restore" in arguments.only:
            measure_restores(training, folder, arguments.rounds, state_mb)
        if "steps" in arguments.only:
            measure_steps(training, folder, max(2, arguments.rounds // 2))


def main() -> None:
    started = time.time()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--state-mb", nargs="+", type=int, choices=SIZES, default=list(SIZES))
    parser.add_argument("--resume-from", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; a temporary one")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    if arguments.resume_from is not None:
        resume(arguments.resume_from, arguments.state_mb[0], started)
        return
    print(environment(), flush=True)
    warnings.filterwarnings("ignore", module=r"torch\.distributed")
    for state_mb in arguments.state_mb:
        measure_state(state_mb, arguments)
    if "hashes" in arguments.only:
        measure_hashes()
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
