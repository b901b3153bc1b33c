"""When Python's garbage collector runs: between two steps, instead of in the middle of one.

The trainer calls `step_done` after every step; so may any loop. Knows no run.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from obsinfra.catalog import metrics as catalog
from obsinfra.errors import ConfigError
from obsinfra.monitoring.instruments import Instruments

FULL_SECONDS = 60.0
"""Between two full collections. The first one may take a second, so a short run does without."""

_running: BoundaryGc | None = None
"""The one schedule in charge; a process has one collector."""


class GcSchedule(Protocol):
    """Decides when garbage is collected while its block runs."""

    instruments: Instruments

    def step_done(self) -> None: ...

    def __enter__(self) -> GcSchedule: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class PythonGc:
    """Leaves it to Python: a collection begins wherever the threshold of allocations is crossed."""

    def __init__(self) -> None:
        self.instruments = Instruments()

    def step_done(self) -> None:
        pass

    def __enter__(self) -> PythonGc:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class BoundaryGc:
    """Between steps: young generations when Python's own thresholds say so, all of them at intervals.

    Within its block automatic collection is off. What outlives the first full collection is left out of the
    later ones (`gc.freeze`): model, libraries and data set are not garbage. Processes forked meanwhile, such
    as data-loader workers, collect as Python would.

    Args:
        full_seconds: between two full collections.
        clock: seconds, monotonic.

    Attributes:
        instruments: where collections and their time are counted.
        collections: by generation, 0 to 2.
        seconds: spent in each.
        longest_seconds: the longest single one of each.
    """

    def __init__(
        self, full_seconds: float = FULL_SECONDS, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.full_seconds = full_seconds
        self.instruments = Instruments()
        self.collections = [0, 0, 0]
        self.seconds = [0.0, 0.0, 0.0]
        self.longest_seconds = [0.0, 0.0, 0.0]
        self._clock = clock
        self._due = 0.0
        self._was_enabled = self._frozen = False
        self._young, self._middle, _ = gc.get_threshold()

    def step_done(self) -> None:
        """A step has ended: collect what is due."""
        young, middle, _ = gc.get_count()
        if young <= self._young:
            return
        if self._clock() >= self._due:
            self._collect(2)
            if not self._frozen:
                self._frozen = True
                gc.freeze()
            self._due = self._clock() + self.full_seconds
        else:
            self._collect(1 if middle >= self._middle else 0)

    def __enter__(self) -> BoundaryGc:
        global _running
        if _running is not None:
            raise ConfigError(
                "a second BoundaryGc in a process, which has one collector",
                "one at a time",
                "leave the first, or create_memory_optimizer(gc='python') for one of them",
            )
        _running = self
        self._was_enabled = gc.isenabled()
        self._young, self._middle, _ = gc.get_threshold()
        gc.disable()
        self._due = self._clock() + self.full_seconds
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _running
        _running = None
        if self._frozen:
            self._frozen = False
            gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def _collect(self, generation: int) -> None:
        started = self._clock()
        gc.collect(generation)
        seconds = self._clock() - started
        self.collections[generation] += 1
        self.seconds[generation] += seconds
        self.longest_seconds[generation] = max(self.longest_seconds[generation], seconds)
        self.instruments.add(catalog.GC_COLLECTIONS, generation=str(generation))
        self.instruments.add(catalog.GC_SECONDS, seconds, generation=str(generation))


def create_gc_schedule(wanted: str) -> GcSchedule:
    """The schedule of the setting `gc`: `boundary` or `python`."""
    return BoundaryGc() if wanted == "boundary" else PythonGc()


def all_objects() -> list[Any]:
    """Every object the collector knows, frozen ones too; the next full collection freezes them again."""
    if gc.get_freeze_count():
        if _running is not None:
            _running._frozen = False
        gc.unfreeze()
    return gc.get_objects()


def _leave_to_python_in_a_child() -> None:
    global _running
    if _running is not None and _running._was_enabled:
        gc.enable()
    _running = None


os.register_at_fork(after_in_child=_leave_to_python_in_a_child)
