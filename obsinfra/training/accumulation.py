"""Gradient accumulation as a view on the data: each step gets a list of micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from obsinfra.workloads.protocol import Batches


class MicroBatches:
    """Groups `count` batches into one step; the last group of an epoch may be shorter."""

    def __init__(self, batches: Batches, count: int) -> None:
        self._batches = batches
        self._count = count
        self.phase = batches.phase
        self.num_workers = int(getattr(batches, "num_workers", 0))

    def __iter__(self) -> Iterator[list[Any]]:
        iterator = iter(self._batches)
        while group := list(islice(iterator, self._count)):
            yield group

    def __len__(self) -> int:
        return -(-len(self._batches) // self._count)

    def state_dict(self) -> dict[str, Any]:
        """Position of the underlying data, which is between two groups whenever this is called."""
        return self._batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there."""
        self._batches.load_state_dict(state)
