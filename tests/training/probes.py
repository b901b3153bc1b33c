"""Workloads for tests, run by the real CLI as `probes:<factory>`: the built-in ones, steered from inside.

PROBE_LOSSES names a file that gets the exact loss of every micro-batch, PROBE_AT=N:EVENT makes EVENT happen
during the Nth micro-batch of the process: a signal by its name, `stop`, `checkpoint` or `rollback` through
the CLI, `out_of_memory`, or `wait`, which leaves a file PROBE_MARK and waits for it to go away. Several are
separated by commas.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obsinfra.workloads.digits import DigitImages, Digits
from obsinfra.workloads.protocol import StepOutput
from obsinfra.workloads.registry import create_workload


class Probe:
    """A workload that behaves like `inner`, with the events of the environment."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._count = 0
        events = (event.split(":") for event in os.environ.get("PROBE_AT", "0:").split(","))
        self._events = {int(at): event for at, event in events}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def training_step(self, model: nn.Module, batch: Any) -> StepOutput:
        output = self._inner.training_step(model, batch)
        if not isinstance(output, StepOutput):
            raise TypeError(type(output))
        self._count += 1
        if losses := os.environ.get("PROBE_LOSSES"):
            with open(losses, "a") as file:
                file.write(f"{output.loss.item().hex()}\n")
        if self._count in self._events:
            happen(self._events[self._count])
        return output


def happen(event: str) -> None:
    """Make an event come about, in the middle of a step."""
    if event in ("stop", "checkpoint", "rollback"):
        run, output = os.environ["PROBE_RUN"], os.environ["PROBE_OUTPUT"]
        arguments = ["command", run, event, "--no-wait", "--output-dir", output]
        subprocess.run([sys.executable, "-m", "obsinfra.cli.main", *arguments], check=True)
    elif event == "out_of_memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
    elif event == "wait":
        mark_and_wait()
    else:
        os.kill(os.getpid(), getattr(signal, event))


def mark_and_wait() -> None:
    """Say that we are there, and wait as long as the mark stays."""
    mark = Path(os.environ["PROBE_MARK"])
    mark.touch()
    pause = threading.Event()
    while mark.exists():
        pause.wait(0.02)


def digits(**given: Any) -> Probe:
    return Probe(create_workload("digits", **given))


def byte_gpt(**given: Any) -> Probe:
    return Probe(create_workload("byte_gpt", **given))


def tactical_mappo(**given: Any) -> Probe:
    return Probe(create_workload("tactical_mappo", **given))


class SlowValidation(Digits):
    """Its validation waits as `mark_and_wait`."""

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        mark_and_wait()
        return super().validate(model, device)


def slow_validation(*, data_path: str | None, model_size: str | None, seed: int) -> Probe:
    return Probe(SlowValidation())


class StallingImages(DigitImages):
    """A worker that comes to image 0 waits as `mark_and_wait`."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        if 0 in indices:
            mark_and_wait()
        return super().__getitems__(indices)


class Stalling(Digits):
    """Its training data stalls once an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.training = StallingImages(self.training.images, self.training.labels)


def stalling(*, data_path: str | None, model_size: str | None, seed: int) -> Probe:
    return Probe(Stalling())
