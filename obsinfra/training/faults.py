"""Fault injection for drills and tests: real faults in a real loop, never a faked metric.

`--inject FAULT@STEP[xCOUNT]`, several separated by commas: `explode` multiplies the gradients by a million,
`nan` poisons the loss, `slow` makes a step wait 5 seconds, `leak` keeps 8 MiB more with each step, `hang`
stops the loop's thread, `error` raises, `oom` lets memory run out once in the middle of a step.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from obsinfra.errors import ConfigError
from obsinfra.monitoring.logging_config import get_logger

EXPLOSION = 1e6
SLOW_SECONDS = 5.0
LEAKED_BYTES = 8 * 2**20
FAULTS = ("explode", "nan", "slow", "leak", "hang", "error", "oom")


class InjectedError(RuntimeError):
    """What `--inject error@STEP` raises."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault and the half-open range of steps it strikes."""

    kind: str
    first: int
    last: int


class Faults:
    """The faults of a run; without any, every call returns at once."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self._faults = tuple(faults)
        self._announced: set[str] = set()
        self._leaked: list[Tensor] = []
        self._ran_out: set[int] = set()

    @classmethod
    def parse(cls, text: str | None) -> Faults:
        """Parse `FAULT@STEP[xCOUNT],…`.

        Raises:
            ConfigError: it is malformed.
        """
        faults = []
        for item in filter(None, (text or "").replace(" ", "").split(",")):
            match = re.fullmatch(r"([a-z]+)@(\d+)(?:x(\d+))?", item)
            if match is None or match[1] not in FAULTS:
                raise ConfigError(
                    f"--inject {item!r}", f"FAULT@STEP or FAULT@STEPxCOUNT, FAULT one of {', '.join(FAULTS)}"
                )
            first = int(match[2])
            faults.append(Fault(match[1], first, first + int(match[3] or 1)))
        return cls(faults)

    def _strikes(self, kind: str, step: int) -> bool:
        strikes = any(fault.kind == kind and fault.first <= step < fault.last for fault in self._faults)
        if strikes and kind not in self._announced:
            self._announced.add(kind)
            get_logger("training").warning("fault_injected", kind=kind, at_step=step)
        return strikes

    def before_forward(self, step: int) -> None:
        """`hang` waits here until the process is ended from outside; `slow`, `leak` and `error` as named."""
        if not self._faults:
            return
        if self._strikes("slow", step):
            threading.Event().wait(SLOW_SECONDS)
        if self._strikes("leak", step):
            self._leaked.append(torch.ones(LEAKED_BYTES, dtype=torch.uint8))  # written to, so it is resident
        if self._strikes("hang", step):
            threading.Event().wait()
        if self._strikes("error", step):
            raise InjectedError(f"injected at step {step}")

    def before_backward(self, step: int, *, last: bool) -> None:
        """`oom` raises once per step, before the last micro-batch's backward pass: when most is spoilt."""
        if self._faults and last and step not in self._ran_out and self._strikes("oom", step):
            self._ran_out.add(step)
            raise torch.OutOfMemoryError(f"CUDA out of memory, injected at step {step}")

    def on_loss(self, step: int, loss: Tensor) -> Tensor:
        """`nan` turns the loss, and so every gradient, into NaN."""
        return loss * float("nan") if self._faults and self._strikes("nan", step) else loss

    def on_gradients(self, step: int, parameters: Iterable[Tensor]) -> None:
        """`explode` multiplies every gradient."""
        if self._faults and self._strikes("explode", step):
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, EXPLOSION)
