"""A cache of blocks of a file, bounded in bytes, that gives memory back when the host runs short.

One per data set. Each worker process has its own content; budget and sizes are in shared memory, so that one
call in the trainer's process shrinks the caches of all.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import get_worker_info

from obsinfra.errors import DataError
from obsinfra.optimization.arguments import whole_number
from obsinfra.optimization.reclaimable import DATASET_CACHE_ORDER, register_reclaimable

V = TypeVar("V")
PROCESSES = 129
"""Places for the sizes of this process and its workers; workers beyond 128 share theirs."""


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What a cache did.

    Attributes:
        bytes: held now.
        hits, misses: look-ups since the data set was made.
    """

    bytes: int = 0
    hits: int = 0
    misses: int = 0

    def __add__(self, other: CacheUse) -> CacheUse:
        return CacheUse(self.bytes + other.bytes, self.hits + other.hits, self.misses + other.misses)


class BlockCache(Generic[V]):
    """The most recently used blocks.

    Args:
        name: for logs and metrics.
        max_bytes: most bytes held by each process; 0 keeps nothing.
        size: bytes of a block.
    """

    def __init__(self, name: str, max_bytes: int, size: Callable[[V], int]) -> None:
        whole_number("max_cache_bytes", max_bytes, least=0, error=DataError)
        self.name = name
        self._size = size
        # Rows: [budget, generation, –], then [bytes, hits, misses] of each process.
        self._shared = torch.zeros(1 + PROCESSES, 3, dtype=torch.int64)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]
        self._table = self._shared.numpy()
        self._table[0, 0] = max_bytes
        self._begin()
        register_reclaimable(f"cache of {name}", DATASET_CACHE_ORDER, self.reclaim)

    def _begin(self) -> None:
        """Empty, in this process; a forked worker neither counts nor keeps what it inherited."""
        worker = get_worker_info()
        self._pid = os.getpid()
        self._row = 1 if worker is None else 2 + worker.id % (PROCESSES - 1)
        self._lock = threading.Lock()  # a new one: the inherited one may be held by a thread that is not here
        self._blocks: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._generation = int(self._table[0, 1])
        self._table[self._row, 0] = 0

    def get(self, key: Hashable, read: Callable[[], V]) -> V:
        """The block, read if it is not held. What `read` raises is passed on and nothing kept."""
        if os.getpid() != self._pid:
            self._begin()
        own = self._table[self._row]
        with self._lock:
            if self._generation != self._table[0, 1]:
                self._drop()
            found = self._blocks.get(key)
            if found is not None:
                self._blocks.move_to_end(key)
                own[1] += 1
                return found[0]
        own[2] += 1
        block = read()
        size = self._size(block)
        with self._lock:
            budget = self._table[0, 0]
            if size <= budget and key not in self._blocks:
                self._blocks[key] = (block, size)
                own[0] += size
                while own[0] > budget:
                    _, (_, gone) = self._blocks.popitem(last=False)
                    own[0] -= gone
        return block

    def _drop(self) -> None:
        self._blocks.clear()
        self._table[self._row, 0] = 0
        self._generation = int(self._table[0, 1])

    def reclaim(self) -> int:
        """Drop every block and halve the budget, here and in the workers, each at its next look-up.

        Returns:
            Bytes held until now by all processes.
        """
        if os.getpid() != self._pid:
            self._begin()
        with self._lock:
            held = int(self._table[1:, 0].sum())
            self._table[0, 0] //= 2
            self._table[0, 1] += 1
            self._drop()
        return held

    def clear(self) -> None:
        """Drop every block of this process; the budget stays."""
        with self._lock:
            self._drop()

    @property
    def max_bytes(self) -> int:
        """Most bytes each process may hold now."""
        return int(self._table[0, 0])

    def use(self) -> CacheUse:
        """What the caches of this process and all workers did."""
        held, hits, misses = (int(total) for total in self._table[1:].sum(axis=0))
        return CacheUse(held, hits, misses)

    def workers_ended(self) -> None:
        """Worker processes are gone, and what they held with them."""
        self._table[2:, 0] = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "size": self._size, "shared": self._shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.name, self._size, self._shared = state["name"], state["size"], state["shared"]
        self._table = self._shared.numpy()
        self._begin()
