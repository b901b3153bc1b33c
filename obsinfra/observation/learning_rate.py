"""Scaling the learning rate from outside, so that it lasts: in the optimizer and in whatever schedules it.

Used by the action `scale_lr` and by `LoopState`, which saves the scale. Knows no commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from obsinfra.backup.backup_system import Stateful
from obsinfra.catalog.actions import SCALE_LR
from obsinfra.errors import CommandError

_FACTOR = next(argument for argument in SCALE_LR.arguments if argument.name == "factor")
_GROUP_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""What optimizers and torch's schedulers keep in a parameter group (OneCycleLR, SWALR, …)."""

_SCHEDULER_LISTS = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_SCHEDULER_NUMBERS = ("eta_min",)


@runtime_checkable
class ScalableSchedule(Protocol):
    """A schedule that multiplies all its rates by `learning_rate_scale` itself, as ours does."""

    learning_rate_scale: float


class LearningRateScale:
    """What all learning rates of one loop are multiplied by, over what the loop was made with.

    Args:
        parts: where `optimizer` and `scheduler` are, if there are any.

    Attributes:
        total: product of all factors so far; 1 as the loop was made.
    """

    def __init__(self, parts: Mapping[str, Stateful]) -> None:
        self.total = 1.0
        self._optimizer: Any = parts.get("optimizer")
        self._scheduler: Any = parts.get("scheduler")

    def rates(self) -> list[float]:
        """Present learning rate of each parameter group."""
        return [float(group["lr"]) for group in self._groups()]

    def set(self, total: float) -> None:
        """Scale everything so that `total` is the scale.

        Torch's own schedulers are scaled in their bases and bounds, so that the rest of their curve is the
        old one times the scale.

        Raises:
            CommandError: there is no optimizer with parameter groups, or `total` is out of bounds.
        """
        if not _FACTOR.accepts(total):
            raise CommandError(
                f"a learning rate of {total:.6g} times the original; expected {_FACTOR.expected} over all "
                "factors together; fix: take them back with undo=true first"
            )
        groups, ratio = self._groups(), total / self.total
        if isinstance(self._scheduler, ScalableSchedule):
            self._scheduler.learning_rate_scale = total
        else:
            for group in groups:
                for key in _GROUP_KEYS:
                    if key in group:
                        group[key] = _times(group[key], ratio)
            _scale_scheduler(self._scheduler, ratio)
        self.total = total

    @property
    def lasts(self) -> bool:
        """Whether the schedule, if there is one, is of a kind that takes the scale up."""
        return (
            self._scheduler is None
            or isinstance(self._scheduler, ScalableSchedule)
            or _known(self._scheduler)
        )

    def _groups(self) -> list[dict[str, Any]]:
        groups = getattr(self._optimizer, "param_groups", None)
        if not groups:
            raise CommandError(
                "the loop has no optimizer with parameter groups; expected one given to observe(); "
                "fix: observe(model, optimizer)"
            )
        return list(groups)


def _known(scheduler: Any) -> bool:
    return isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)


def _scale_scheduler(scheduler: Any, ratio: float) -> None:
    if scheduler is None:
        return
    for name in _SCHEDULER_LISTS:
        values = getattr(scheduler, name, None)
        if isinstance(values, list):
            setattr(scheduler, name, [_times(value, ratio) for value in values])
    for name in _SCHEDULER_NUMBERS:
        if isinstance(value := getattr(scheduler, name, None), (int, float)):
            setattr(scheduler, name, value * ratio)
    for inner in getattr(scheduler, "_schedulers", ()):
        _scale_scheduler(inner, ratio)


def _times(value: Any, ratio: float) -> Any:
    if isinstance(value, torch.Tensor):  # a capturable optimizer reads it from the device, at this address
        with torch.no_grad():
            return value.mul_(ratio)
    return value * ratio
