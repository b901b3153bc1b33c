"""The in-process history behind the live page: columns of bounded length, thinned instead of forgotten.

Filled by the monitor's housekeeping thread; read by the metrics server.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    "time",
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "samples_per_second",
    "step_time_seconds",
    "cpu_ratio",
    "memory_ratio",
    "gpu_ratio",
    "gpu_memory_ratio",
)
MAX_POINTS = 2_000


class History:
    """Points in time of a fixed set of columns: the newest all, the run before them evenly thinned."""

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self._lock = threading.Lock()
        self._max = max_points
        self._columns: dict[str, list[float | None]] = {name: [] for name in COLUMNS}
        self._seqs: list[int] = []
        self._next = 0
        self._thinned_at = 0
        self._validation_seqs: list[int] = []
        self._next_validation = 0
        self._validated_at = 0  # number of the point before which the last validation came
        self._validation_steps: list[int] = []
        self._validation: dict[str, list[float | None]] = {}

    def add(self, point: Mapping[str, float | None]) -> None:
        """Append one point; absent columns and values that are not finite become gaps."""
        with self._lock:
            if len(self._seqs) >= self._max:  # before adding, so that the newest point always stays
                kept = _kept(self._seqs, self._max)
                self._seqs = [self._seqs[i] for i in kept]
                self._columns = {name: [column[i] for i in kept] for name, column in self._columns.items()}
                self._thinned_at = self._next + 1
            for name, column in self._columns.items():
                value = point.get(name)
                column.append(value if value is not None and math.isfinite(value) else None)
            self._seqs.append(self._next)
            self._next += 1

    def add_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one validation result."""
        with self._lock:
            if len(self._validation_steps) >= self._max:
                kept = _kept(self._validation_seqs, self._max)
                self._validation_seqs = [self._validation_seqs[i] for i in kept]
                self._validation_steps = [self._validation_steps[i] for i in kept]
                self._validation = {name: [old[i] for i in kept] for name, old in self._validation.items()}
            self._validation_seqs.append(self._next_validation)
            self._next_validation += 1
            self._validated_at = self._next
            before = len(self._validation_steps)
            self._validation_steps.append(step)
            for name in {*self._validation, *metrics}:
                value = metrics.get(name)
                series = self._validation.setdefault(name, [None] * before)
                series.append(value if value is not None and math.isfinite(value) else None)

    def since(self, seq: int) -> dict[str, Any]:
        """Points numbered `seq` and later, or all with `reset` when the older ones changed since then.

        Returns:
            `series`, `validation_series` (all of them; None when none came since), `next` (the number to ask
            for next) and `reset`.
        """
        with self._lock:
            reset = seq <= 0 or seq < self._thinned_at or seq > self._next
            first = 0 if reset else next((i for i, s in enumerate(self._seqs) if s >= seq), len(self._seqs))
            return {
                "series": {name: column[first:] for name, column in self._columns.items()},
                "validation_series": self._validations() if reset or self._validated_at >= seq else None,
                "next": self._next,
                "reset": reset,
            }

    def _validations(self) -> dict[str, Any]:
        return {
            "step": list(self._validation_steps),
            "metrics": {name: list(series) for name, series in self._validation.items()},
        }


def _kept(seqs: Sequence[int], room: int) -> list[int]:
    """Indices that stay when `room` is used up: the newest quarter, and an even half of what is older.

    Dropping every second of all points each time would leave of the beginning one point in 2ⁿ: nothing.
    """
    older = len(seqs) - room // 4
    stride = 1
    while sum(seq % stride == 0 for seq in seqs[:older]) > max(1, room // 2):
        stride *= 2
    return [i for i, seq in enumerate(seqs) if i >= older or seq % stride == 0]
