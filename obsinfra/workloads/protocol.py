"""What a workload is: a model, its data, one training step and a validation. The trainer knows no more.

A factory `create_workload(*, data_path, model_size, seed) -> Workload` is registered as an entry point
in the group `obsinfra.workloads`, or named as `package.module:factory`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the trainer uses where the user sets nothing.

    Attributes:
        epochs, batch_size, learning_rate, weight_decay, warmup_steps: the usual meaning; `batch_size` in
            samples per step.
        schedule: learning-rate schedule over the whole run.
        metric: name of the validation metric that chooses the best model and drives early stopping.
        mode: whether a better `metric` is smaller (`min`) or larger (`max`).
        autocast: False keeps fp32 under `precision = auto`, for models that lose more than they gain.
        validate_every: validate every N epochs by default.
        betas, eps: AdamW's.
        splittable: the loss of a batch is the mean over its rows, so that it may be computed in pieces; False
            for losses that compare rows with each other.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "plateau"] = "constant"
    metric: str = "loss"
    mode: Literal["min", "max"] = "min"
    autocast: bool = True
    validate_every: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    splittable: bool = True


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one training step computed.

    Attributes:
        loss: scalar tensor attached to the graph; the trainer calls backward on it.
        samples: samples this batch stands for, for throughput.
        metrics: further values worth seeing, means over the rows, detached; kept on the device, never
            synchronised here.
    """

    loss: Tensor
    samples: int
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)


@runtime_checkable
class Batches(Protocol):
    """The training data. Each `iter()` is one epoch, or the rest of one after `load_state_dict`.

    Whatever `iter()` yields depends only on the constructor's arguments, the state below and, where the
    model takes part (reinforcement learning), the model and torch's global random state. So a run resumed
    from `state_dict()` sees exactly the batches the uninterrupted run would have seen next.

    Attributes:
        phase: where the time inside `next()` belongs, `data` or `rollout`.
    """

    phase: str

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int:
        """Batches of a full epoch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch yielded: nested dicts, lists, scalars, strings and tensors.

        Called between two batches only. Prefetched batches that were not yielded do not count.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there at the next `iter()`.

        Raises:
            DataError: the state belongs to other data, another batch size or another seed.
        """
        ...


@runtime_checkable
class Workload(Protocol):
    """One thing to train."""

    name: str
    defaults: Defaults

    def build_model(self) -> nn.Module:
        """A freshly initialised model on the CPU; uses torch's global generator, seeded by the trainer.

        For `--parallel tp` it has a method `tensor_parallel_plan(size)`: from names of its modules to the
        styles of `torch.distributed.tensor.parallel`, or a ConfigError. The rest of it is whole on
        every rank.
        """
        ...

    def train_batches(
        self, model: nn.Module, *, batch_size: int, seed: int, num_workers: int, device: torch.device
    ) -> Batches:
        """The training data. `model` is the (possibly compiled) model on `device`, for rollouts."""
        ...

    def training_step(self, model: nn.Module, batch: Any) -> StepOutput:
        """Forward pass and loss of one batch already on the model's device, under autocast."""
        ...

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Validation metrics; the trainer has switched to eval mode and inference mode. Draws no randomness
        from torch's global generator, so that validating more or less often never changes training."""
        ...

    def flops_per_sample(self, model: nn.Module) -> float | None:
        """Floating-point operations of forward and backward per sample, or None when not known."""
        ...

    def describe_data(self) -> dict[str, Any]:
        """JSON-able facts about the data in use (source, sizes, dates), for logs and run.json."""
        ...
