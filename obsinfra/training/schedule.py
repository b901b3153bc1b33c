"""The learning rate over a run: linear warm-up, then constant, cosine or plateau."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

COSINE_FLOOR = 0.1
"""Cosine ends at this share of the peak rate."""


class Schedule:
    """Sets the learning rate before each optimizer step.

    Args:
        optimizer: its groups' present `lr` is the peak.
        kind: `constant`, `cosine` (to `COSINE_FLOOR` × peak at `total_steps`), or `plateau` (halved after
            `plateau_patience` validations without improvement).
        warmup_steps: linear rise from 0 over this many steps.
        total_steps: length of the run in optimizer steps, for cosine.
        mode: whether a better validation value is smaller or larger, for plateau.

    Attributes:
        learning_rate_scale: what every rate is multiplied by on top; set it and it holds from now on.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        kind: Literal["constant", "cosine", "plateau"],
        *,
        warmup_steps: int,
        total_steps: int,
        mode: Literal["min", "max"] = "min",
        plateau_patience: int = 5,
    ) -> None:
        self._optimizer = optimizer
        self._kind = kind
        self._warmup = warmup_steps
        self._total = max(total_steps, warmup_steps + 1)
        self._sign = 1.0 if mode == "min" else -1.0
        self._patience = plateau_patience
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self._step = 0
        self._factor = 1.0
        self._lr_scale = 1.0
        self._best = math.inf
        self._bad = 0
        self._apply()

    @property
    def learning_rate(self) -> float:
        """Of the first group, for the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def learning_rate_scale(self) -> float:
        return self._lr_scale

    @learning_rate_scale.setter
    def learning_rate_scale(self, scale: float) -> None:
        self._lr_scale = scale
        self._apply()

    def step(self) -> None:
        """One optimizer step was taken."""
        self._step += 1
        self._apply()

    def validated(self, value: float) -> None:
        """A validation result, for plateau."""
        if self._kind != "plateau":
            return
        if self._sign * value < self._best:
            self._best, self._bad = self._sign * value, 0
            return
        self._bad += 1
        if self._bad > self._patience:
            self._factor *= 0.5
            self._bad = 0
            self._apply()

    def scale(self) -> float:
        """Present rate as a share of the peak."""
        if self._step < self._warmup:
            return (self._step + 1) / self._warmup
        if self._kind == "cosine":
            progress = min(1.0, (self._step - self._warmup) / (self._total - self._warmup))
            return COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))
        return self._factor

    def state_dict(self) -> dict[str, Any]:
        """Counters; the peaks and the kind come from the settings."""
        return {
            "step": self._step,
            "factor": self._factor,
            "best": self._best,
            "bad": self._bad,
            "lr_scale": self._lr_scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self._step, self._factor = int(state["step"]), float(state["factor"])
        self._best, self._bad = float(state["best"]), int(state["bad"])
        self._lr_scale = float(state.get("lr_scale", 1.0))  # checkpoints of earlier versions have none
        self._apply()

    def _apply(self) -> None:
        scale = self.scale() * self._lr_scale
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * scale
