"""A linear regression whose validations can be scripted, trained in the process of the test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from obsinfra.config.settings import Settings
from obsinfra.training.trainer import Trainer
from obsinfra.workloads.batches import MapBatches
from obsinfra.workloads.protocol import Batches, Defaults, StepOutput

SAMPLES = 64


class Line(nn.Module):
    """A module of one's own: a bare nn.Linear is never compiled."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.linear(inputs)
        return outputs


class Regression:
    """Four weights. `scripted` are the validation losses to report, one after the other.

    Attributes:
        seen: input rows of every training step.
        forwards: (autocast on, dtype of the result) of every training step.
    """

    name = "regression"
    defaults = Defaults(epochs=2, batch_size=16, learning_rate=0.1)

    def __init__(self, scripted: Iterator[float] | None = None, **defaults: Any) -> None:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(SAMPLES, 4, generator=generator)
        self.data = TensorDataset(inputs, inputs @ torch.tensor([1.0, -2.0, 3.0, 0.5]) + 1.0)
        self.scripted = scripted
        self.defaults = replace(type(self).defaults, **defaults)
        self.seen: list[Tensor] = []
        self.forwards: list[tuple[bool, torch.dtype]] = []

    def build_model(self) -> nn.Module:
        return Line(1)

    def train_batches(
        self, model: nn.Module, *, batch_size: int, seed: int, num_workers: int, device: torch.device
    ) -> Batches:
        return MapBatches(self.data, batch_size=batch_size, seed=seed, num_workers=num_workers, kind="line")

    def training_step(self, model: nn.Module, batch: Any) -> StepOutput:
        inputs, targets = batch
        self.seen.append(inputs)
        outputs = model(inputs)[:, 0]
        self.forwards.append((torch.is_autocast_enabled("cpu"), outputs.dtype))
        return StepOutput(nn.functional.mse_loss(outputs.float(), targets), len(targets))

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        assert not model.training and torch.is_inference_mode_enabled()
        if self.scripted is not None:
            return {"loss": next(self.scripted)}
        inputs, targets = self.data.tensors
        return {"loss": float(nn.functional.mse_loss(model(inputs)[:, 0].float(), targets))}

    def flops_per_sample(self, model: nn.Module) -> float | None:
        return None

    def describe_data(self) -> dict[str, Any]:
        return {}


def trainer(tmp_path: Path, workload: Regression | None = None, **settings: Any) -> Trainer:
    """A trainer of the regression with quiet settings."""
    usual = {
        "model_name": "regression",
        "output_dir": tmp_path / "runs",
        "precision": "fp32",
        "disable_monitoring": True,
    }
    return Trainer(workload or Regression(), Settings(**{**usual, **settings}))
