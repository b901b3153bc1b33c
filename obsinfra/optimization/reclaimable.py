"""What can give host memory back when it runs short: dataset caches, prefetched batches, anybody's caches.

Each registers a function; the host-memory guard calls them in their order. Knows nothing of who registers.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType

PREFETCH_ORDER = 30
"""Fewer batches loaded ahead: costs overlap only, so it comes before any cache."""
DATASET_CACHE_ORDER = 40
"""Data that has to be read again when it is wanted again."""

Reclaim = Callable[[], int]
"""Gives back what it can; returns how many bytes it let go of, as it counts them itself."""


@dataclass(frozen=True, slots=True)
class Reclaimable:
    """One thing that can give memory back.

    Attributes:
        name: for logs and metrics.
        order: lower is asked first.
        reclaim: does it; returns bytes. May be called from any thread, and more than once.
    """

    name: str
    order: int
    reclaim: Reclaim


class _Registry:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0
        self._entries: dict[int, tuple[str, int, Callable[[], Reclaim | None]]] = {}

    def add(self, name: str, order: int, reclaim: Reclaim) -> Callable[[], None]:
        find: Callable[[], Reclaim | None]
        if isinstance(reclaim, MethodType):
            find = weakref.WeakMethod(reclaim)
        else:
            find = lambda: reclaim  # noqa: E731
        with self._lock:
            key = self._next = self._next + 1
            self._entries[key] = (name, order, find)
        return lambda: self._remove(key)

    def _remove(self, key: int) -> None:
        with self._lock:
            self._entries.pop(key, None)

    def living(self) -> list[Reclaimable]:
        with self._lock:
            entries = list(self._entries.items())
        found: list[tuple[int, int, Reclaimable]] = []
        for key, (name, order, find) in entries:
            reclaim = find()
            if reclaim is None:
                self._remove(key)
            else:
                found.append((order, key, Reclaimable(name, order, reclaim)))
        return [entry for _, _, entry in sorted(found, key=lambda item: item[:2])]


_REGISTRY = _Registry()


def register_reclaimable(name: str, order: int, reclaim: Reclaim) -> Callable[[], None]:
    """Have `reclaim` called when host memory runs short.

    A bound method is held weakly: its object goes when nobody else needs it, and its entry with it. Any
    other callable is held until it is withdrawn.

    Args:
        name: for logs and metrics; need not be unique.
        order: lower is asked first; see `PREFETCH_ORDER` and `DATASET_CACHE_ORDER`.
        reclaim: gives back what it can, from any thread, and returns the bytes it let go of.

    Returns:
        A function that withdraws the entry; may be called more than once.
    """
    return _REGISTRY.add(name, order, reclaim)


def reclaimables() -> list[Reclaimable]:
    """Everything registered in this process that still lives, in the order to ask it in."""
    return _REGISTRY.living()
