"""Digits on several ranks of which rank 1 has a fault, named by RANK_FAULT; as a workload factory.

`unsavable` and `lazy` are wrong on every rank.

A fault in training shows once: the file RANK_FAULT_MARK tells the ranks of a later attempt that it is over.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from torch import nn

from obsinfra.workloads.digits import Digits
from obsinfra.workloads.protocol import StepOutput

AT_STEP = 40
SLOW_SECONDS = 0.05
"""The fault `slow`: that much more in each forward pass, and again in each backward pass."""


class Unsavable(nn.Sequential):
    """A model with a part of its state that no checkpoint can hold."""

    def get_extra_state(self) -> object:
        return threading.Lock()

    def set_extra_state(self, state: object) -> None:
        pass


class FaultyDigits(Digits):
    """What is wrong is wrong on rank 1 alone."""

    name = "faulty_digits"

    def __init__(self) -> None:
        super().__init__()
        self._fault = os.environ.get("RANK_FAULT", "") if os.environ.get("RANK") == "1" else ""
        self._calls = 0

    def describe_data(self) -> dict[str, Any]:
        facts = super().describe_data()
        return {**facts, "training_images": 7} if self._fault == "data" else facts

    def build_model(self) -> nn.Module:
        model = super().build_model()
        if os.environ.get("RANK_FAULT") == "unsavable":
            return Unsavable(model)
        if os.environ.get("RANK_FAULT") == "lazy":
            return nn.Sequential(model, nn.LazyLinear(10))
        if self._fault == "frozen":
            next(model.parameters()).requires_grad_(False)
        return nn.Sequential(model, nn.Linear(10, 10)) if self._fault == "model" else model

    def training_step(self, model: nn.Module, batch: Any) -> StepOutput:
        output = super().training_step(model, batch)
        self._calls += 1
        if self._fault == "slow":
            time.sleep(SLOW_SECONDS)
            output.loss.register_hook(lambda gradient: time.sleep(SLOW_SECONDS))
        if self._calls == AT_STEP and self._fault == "nan":
            return StepOutput(output.loss * float("nan"), output.samples)
        mark = os.environ.get("RANK_FAULT_MARK")
        if self._calls == AT_STEP and self._fault == "hang" and mark and not Path(mark).exists():
            Path(mark).touch()
            threading.Event().wait()
        return output


def create_workload(*, data_path: str | None, model_size: str | None, seed: int) -> FaultyDigits:
    """Digits with the fault of the environment."""
    workload = FaultyDigits()
    if workload._fault == "code":
        # As if rank 1 had another version of this file: Python finds a class by its module's name.
        workload.__class__ = type("FaultyDigits", (FaultyDigits,), {"__module__": "small_workload"})
    return workload
