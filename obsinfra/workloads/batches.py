"""Map-style data as `Batches`: shuffled by (seed, epoch), resumed at the exact batch, workers or none.

Used by the workloads over fixed data sets; never draws from torch's global generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from obsinfra.errors import DataError
from obsinfra.optimization.data_order import derived_seed, ignore_trainer_signals, trainer_signals_held


class Portion(NamedTuple):
    """One rank's part of a global batch.

    Attributes:
        batch: its samples.
        rows: how many. 0 for a rank whose part of a last batch is empty; it gets one sample all the same, as
            it must take part in the exchange of gradients.
        of: samples of the global batch.
    """

    batch: Any
    rows: int
    of: int


class MapBatches:
    """`Batches` over a map-style data set.

    The data set must be a function of the index alone: anything random in it would differ after a resume.

    Args:
        dataset: with `__len__` and `__getitem__`, or `__getitems__` for whole batches.
        batch_size: samples per batch.
        seed: of the order.
        num_workers: processes that load ahead; 0 loads in this one.
        kind: what the data is, part of the fingerprint; data of equal length and another content should
            have another kind.
        epoch_samples: samples of an epoch; None: every sample once. Smaller epochs go on through the same
            shuffled pass until it is used up.
        drop_last: leave out a last batch that would be smaller.
        collate: makes a batch of what the data set returned; None: torch's own way.

    Attributes:
        phase: `data`.
    """

    phase = "data"

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        kind: str,
        epoch_samples: int | None = None,
        drop_last: bool = False,
        collate: Callable[[Any], Any] | None = None,
    ) -> None:
        if not isinstance(dataset, Sized):
            raise TypeError("the data set needs __len__")
        self.dataset, self.batch_size, self.seed, self.num_workers = dataset, batch_size, seed, num_workers
        self.kind, self.drop_last, self.collate = kind, drop_last, collate
        self.samples = len(dataset)
        self.epoch_samples = self.samples if epoch_samples is None else epoch_samples
        self.epoch = 0
        self.position = 0
        self._continue = False
        self._divided, self._rank, self._ranks = False, 0, 1

    def divide(self, rank: int, ranks: int) -> None:
        """Yield `Portion`s from here on: rank `rank`'s contiguous part of each batch. The position goes on
        counting whole batches, so that it is the same for any number of ranks, also of one: all that is left
        of an elastic group."""
        self._divided, self._rank, self._ranks = True, rank, ranks

    def __len__(self) -> int:
        if self.drop_last:
            return self.epoch_samples // self.batch_size
        return -(-self.epoch_samples // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        if not self._continue and self.position:
            self._finish_epoch()
        self._continue = False
        return self._epoch()

    def _epoch(self) -> Iterator[Any]:
        if self.position < len(self):
            whole = self._order()[self.position : len(self)]
            parts = [self._part(indices) for indices in whole]
            loaded = self._load([part or indices[:1] for part, indices in zip(parts, whole, strict=True)])
            for batch, part, indices in zip(loaded, parts, whole, strict=True):
                self.position += 1
                yield Portion(batch, len(part), len(indices)) if self._divided else batch
        self._finish_epoch()

    def _part(self, indices: list[int]) -> list[int]:
        """This rank's part of a batch."""
        first, end = (rank * len(indices) // self._ranks for rank in (self._rank, self._rank + 1))
        return indices[first:end]

    def _finish_epoch(self) -> None:
        self.epoch += 1
        self.position = 0

    def _order(self) -> list[list[int]]:
        """Indices of every batch of this epoch."""
        first = self.epoch * self.epoch_samples
        wanted, parts = self.epoch_samples, []
        while wanted:
            shuffled_pass, offset = divmod(first, self.samples)
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", shuffled_pass))
            part = torch.randperm(self.samples, generator=generator)[offset : offset + wanted]
            parts.append(part)
            first += len(part)
            wanted -= len(part)
        return [batch.tolist() for batch in torch.split(torch.cat(parts), self.batch_size)]

    def _load(self, batches: list[list[int]]) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=self.collate,
            worker_init_fn=ignore_trainer_signals if self.num_workers else None,
            generator=torch.Generator().manual_seed(derived_seed(self.seed, "workers", self.epoch)),
        )
        if not self.num_workers:
            return iter(loader)
        with trainer_signals_held():
            return iter(loader)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position and what they refer to; batches that workers loaded ahead do not count."""
        return {**self._identity(), "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there at the next `iter()`.

        Raises:
            DataError: it belongs to other data, another batch size or another seed.
        """
        for name, mine in self._identity().items():
            if name not in state or state[name] != mine:
                raise DataError(
                    f"the saved data position has {name} {state.get(name)!r}, this run {mine!r}",
                    "the data and settings the run was started with",
                    "resume with the same --data-path, --seed and --batch-size, or start a new run",
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._continue = True

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "samples": self.samples,
            "epoch_samples": self.epoch_samples,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }
