"""Which records make which batch of an epoch: a function of seed and epoch alone, from any place on.

For the data loader, which asks from where it stands. Knows no data set and no worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from obsinfra.optimization.data_order import derived_seed
from obsinfra.optimization.delivered_batches import Ask


class BatchOrder:
    """Which records make which batch; a function of (seed, epoch)."""

    def __init__(
        self, batch_size: int, shuffle: bool, seed: int, drop_last: bool, random_records: bool
    ) -> None:
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.drop_last, self.random_records = drop_last, random_records

    def identity(self) -> dict[str, Any]:
        """What makes it another order; plain data."""
        return dict(vars(self))

    def batches(self, records: int) -> int:
        """How many there are of so many records."""
        return records // self.batch_size if self.drop_last else -(-records // self.batch_size)

    def asks(self, records: int, epoch: int, first: int) -> _Asks:
        """Batches of the epoch from the `first` on."""
        order = None
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
            order = torch.randperm(records, generator=generator)
        return _Asks(self, order, records, epoch, first)


class _Asks:
    def __init__(
        self, order: BatchOrder, permutation: torch.Tensor | None, records: int, epoch: int, first: int
    ) -> None:
        self._order, self._permutation, self._records = order, permutation, records
        self._epoch, self._first = epoch, first

    def __len__(self) -> int:
        return self._order.batches(self._records) - self._first

    def __iter__(self) -> Iterator[Ask]:
        size, order = self._order.batch_size, self._order
        for place in range(self._first, order.batches(self._records)):
            begin, stop = place * size, min((place + 1) * size, self._records)
            chosen = self._permutation
            indices = list(range(begin, stop)) if chosen is None else chosen[begin:stop].tolist()
            seed = derived_seed(order.seed, "batch", self._epoch, place) if order.random_records else None
            yield Ask(indices, seed)
