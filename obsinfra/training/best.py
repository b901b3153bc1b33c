"""The best validation value so far, and when to give up waiting for a better one."""

from __future__ import annotations

import math
from typing import Any, Literal


class BestTracker:
    """Follows one validation metric.

    Args:
        mode: whether better is smaller or larger.
        patience: validations without improvement before `exhausted`; 0 means never.
    """

    def __init__(self, mode: Literal["min", "max"], patience: int) -> None:
        self._sign = 1.0 if mode == "min" else -1.0
        self._patience = patience
        self.best: float | None = None
        self.bad = 0

    def update(self, value: float) -> bool:
        """Take a new value; True when it is the best so far. NaN never is."""
        if not math.isnan(value) and (self.best is None or self._sign * value < self._sign * self.best):
            self.best, self.bad = value, 0
            return True
        self.bad += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return 0 < self._patience <= self.bad

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.bad = state["best"], int(state["bad"])
