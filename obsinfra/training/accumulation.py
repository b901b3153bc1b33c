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
        self._before_group: dict[str, Any] | None = None
        self.phase = batches.phase
        self.num_workers = int(getattr(batches, "num_workers", 0))

    def __iter__(self) -> Iterator[list[Any]]:
        iterator = iter(self._batches)
        if self._count == 1:
            yield from ([batch] for batch in iterator)
            return
        while True:
            self._before_group = self._batches.state_dict()
            group = list(islice(iterator, self._count))
            self._before_group = None
            if not group:
                return
            yield group

    def __len__(self) -> int:
        return -(-len(self._batches) // self._count)

    def state_dict(self) -> dict[str, Any]:
        """Position after the last whole group; a wait for data may be left in the middle of the next one."""
        return self._batches.state_dict() if self._before_group is None else self._before_group

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there."""
        self._batches.load_state_dict(state)
