"""A tiny training run whose trainer and writer are killed over and over, and what must be true after that.

Used by the tests here and by `benchmarks/torture_checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import multiprocessing
import os
import random
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import nn

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.checkpointer import create_checkpointer, wait_for_heir
from obsinfra.backup.commit_queue import PendingCommit
from obsinfra.backup.retention import Retention
from obsinfra.backup.rng import capture_rng_state, restore_rng_state
from obsinfra.backup.state_tree import encode
from obsinfra.backup.tensors import tensor_bytes

Victim = Literal["trainer", "writer", "both"]

CONTEXT = multiprocessing.get_context("forkserver")
# The first step of an optimizer would load dynamo, in every trainer anew.
CONTEXT.set_forkserver_preload(["obsinfra.backup.checkpointer", "torch._dynamo"])

SNAPSHOT_EVERY, COMMIT_EVERY = 3, 20
"""Steps."""

SECONDS = 60.0


class Training:
    """Dropout, batch norm, AdamW, and data from the global generator: all of it must come back."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.step = 0

    def advance(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 8)).square().mean().backward()
        self.optimizer.step()
        self.step += 1

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": capture_rng_state() | {"python": None, "numpy": None},
            "step": self.step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        restore_rng_state(capture_rng_state() | {"torch": state["rng"]["torch"]})
        self.step = state["step"]


def fingerprint(state: dict[str, Any]) -> str:
    """Every bit of a state."""
    document, tensors = encode(state)
    digest = hashlib.sha256(json.dumps(document).encode())
    for tensor in tensors:
        digest.update(str((tensor.dtype, tensor.shape)).encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


class Progress:
    """Numbers in a file that outlive whoever wrote them: the trainer's steps, as far as it came."""

    NAMES = ("step", "snapshot", "committed", "writer", "restarts")

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(8 * len(self.NAMES)))
        with path.open("r+b") as file:
            self._numbers = mmap.mmap(file.fileno(), 0)

    def __getitem__(self, name: str) -> int:
        return int(struct.unpack_from("<q", self._numbers, 8 * self.NAMES.index(name))[0])

    def __setitem__(self, name: str, number: int) -> None:
        struct.pack_into("<q", self._numbers, 8 * self.NAMES.index(name), number)


def train(root: Path, progress_path: Path) -> None:
    """Resume from the newest checkpoint and train until killed."""
    torch.set_num_threads(1)
    progress = Progress(progress_path)
    training = Training()
    if root.is_dir():
        assert wait_for_heir(root, SECONDS)
        if create_backup_system(root).list():
            training.restore(create_backup_system(root).load().state)
    retention = Retention(keep_last=2, keep_emergency=2)
    checkpointer = create_checkpointer(root, retention=retention, compression="auto")  # the random state
    pending: PendingCommit | None = None

    def durable(commit: PendingCommit) -> None:
        progress["committed"] = commit.wait(0).step

    while True:
        training.advance()
        if training.step % SNAPSHOT_EVERY == 0:
            assert checkpointer.snapshot(training.state(), step=training.step, epoch=0, wait=SECONDS)
            progress["snapshot"] = training.step
            progress["writer"] = checkpointer.writer_pid or 0
            progress["restarts"] = checkpointer.writer_restarts
            if pending is None or training.step % COMMIT_EVERY < SNAPSHOT_EVERY:
                if pending is not None:
                    pending.wait(SECONDS)
                pending = checkpointer.commit("regular", "interval")
                pending.add_done_callback(durable)
        progress["step"] = training.step


class Spree:
    """Kill after kill of one run; every `kill` checks what it left.

    Args:
        seed: of the instants; the training has its own.

    Attributes:
        kills: how many of whom.
        lost: steps lost at each kill.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.root = folder / "store"
        self.kills: Counter[str] = Counter()
        self.lost: list[tuple[str, int]] = []
        self._progress_path = folder / "progress"
        self._random = random.Random(seed)
        torch.set_num_threads(1)  # as in the trainer: sums are to be the same bits
        self._reference = Training()
        self._generator = torch.get_rng_state()
        self._expected: list[str] = [""]

    def kill(self, victim: Victim) -> None:
        """Start or resume the run, kill at a random instant, and check what is there."""
        self._progress_path.unlink(missing_ok=True)
        progress = Progress(self._progress_path)
        process = CONTEXT.Process(target=train, args=(self.root, self._progress_path), daemon=True)
        process.start()
        try:
            self._until(process, lambda: progress["committed"] > 0)
            begun = progress["step"]
            steps = self._random.randrange(0, 60)
            self._until(process, lambda: progress["step"] >= begun + steps)
            instant = time.perf_counter() + self._random.random() * 0.004
            while time.perf_counter() < instant:
                pass
            if victim == "writer":
                _kill(progress["writer"])
                at = progress["step"]
                self._until(process, lambda: progress["committed"] > at and progress["restarts"] > 0)
            elif victim == "both":
                both = [progress["writer"], process.pid]
                self._random.shuffle(both)
                for pid in both:
                    _kill(pid)
        finally:
            _kill(process.pid)
        process.join(SECONDS)
        assert process.exitcode == -signal.SIGKILL
        self.kills[victim] += 1
        self._check(victim, progress)

    def _until(self, process: ForkServerProcess, condition: Callable[[], bool]) -> None:
        """Poll closely: the instant is what matters."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert process.is_alive(), f"the trainer ended by itself with {process.exitcode}"
            assert time.monotonic() < deadline, "the trainer makes no progress"
            time.sleep(0.0005)

    def _check(self, victim: Victim, progress: Progress) -> None:
        assert wait_for_heir(self.root, SECONDS), "the writer ends after the trainer"
        backup = create_backup_system(self.root)
        loaded = backup.load()
        assert loaded.skipped == (), "the newest is sound"
        assert [result.problem for result in backup.verify()] == [None] * len(backup.list())
        step = loaded.info.step
        if victim == "both":
            assert step >= progress["committed"], "what was acknowledged is durable"
            allowed = 2 * COMMIT_EVERY  # one interval, and what is trained until its commit is durable
        else:
            assert step >= progress["snapshot"], "the last snapshot is durable"
            allowed = SNAPSHOT_EVERY
        lost = progress["step"] - step
        assert lost <= allowed, f"{lost} steps are lost"
        self.lost.append((victim, max(lost, 0)))
        assert fingerprint(loaded.state) == self._uninterrupted(step), f"step {step} is not what it should be"

    def _uninterrupted(self, step: int) -> str:
        """The fingerprint of a run that nobody disturbed."""
        rng = torch.get_rng_state()
        torch.set_rng_state(self._generator)
        while self._reference.step < step:
            self._reference.advance()
            self._expected.append(fingerprint(self._reference.state()))
        self._generator = torch.get_rng_state()
        torch.set_rng_state(rng)
        return self._expected[step]


def _kill(pid: int | None) -> None:
    if pid:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            assert not psutil.pid_exists(pid)
