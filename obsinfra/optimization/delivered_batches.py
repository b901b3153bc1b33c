"""What loader workers run: reading a batch from a data set, past corrupt records. Used by data_loading alone.

A batch travels with what was skipped for it, so a skip is counted in the trainer's process when the batch is
used, and a resume neither forgets one nor counts it twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, default_collate
from torch.utils.data._utils.pin_memory import pin_memory

from obsinfra.errors import DataError, UserError
from obsinfra.optimization.datasets.skipping import CorruptRecord, Skipped

Collate = Callable[[Any], Any]


@dataclass(slots=True)
class Delivery:
    """One batch on its way to the loop.

    Attributes:
        batch: None when every record of it was skipped.
        skipped: what was left out since the delivery before.
        error: why there is no batch; raised where it arrives, as it was, without a worker's traceback.
    """

    batch: Any
    skipped: tuple[Skipped, ...] = ()
    error: UserError | None = None

    def pin_memory(self) -> Delivery:
        """The same in page-locked memory; torch's loader calls it."""
        self.batch = pin_memory(self.batch)  # type: ignore[no-untyped-call]
        return self


@dataclass(frozen=True, slots=True)
class Ask:
    """The records of one batch.

    Attributes:
        indices: of the records.
        seed: of whatever the data set draws at random for them; None: it draws nothing.
    """

    indices: list[int]
    seed: int | None


class IndexedSource(Dataset[Delivery]):
    """A map-style data set by whole batches.

    Args:
        dataset: with `__getitem__`; torch data sets with `take`, and any with `__getitems__`, are read by
            whole batches. (`take` of an array is another thing.)
        collate: makes a batch of records (or of what `__getitems__` returns); None: torch's own, or the data
            set's `take`.
        corrupt_errors: what the data set raises for a record that is to be skipped.
    """

    def __init__(
        self, dataset: Any, collate: Collate | None, corrupt_errors: tuple[type[Exception], ...]
    ) -> None:
        self._dataset, self._corrupt_errors = dataset, corrupt_errors
        self._collate = collate or _batch_of
        self._whole: Callable[[list[int]], Any] | None = None
        take = method_of(dataset, "take") if isinstance(dataset, Dataset) else None
        if collate is None and take is not None:
            self._whole = take
        elif hasattr(dataset, "__getitems__"):
            self._whole = self._collated

    def _collated(self, indices: list[int]) -> Any:
        return self._collate(self._dataset.__getitems__(indices))

    def __getitem__(self, ask: Ask) -> Delivery:
        try:
            with _seeded(ask.seed):
                return self._read(ask.indices)
        except UserError as error:
            return Delivery(None, error=error)

    def _read(self, indices: list[int]) -> Delivery:
        if self._whole is not None:
            try:
                return Delivery(self._whole(indices))
            except self._corrupt_errors:
                pass  # which of them, is found out below
        sound: list[int] = []
        records: list[Any] = []
        skipped: list[Skipped] = []
        for index in indices:
            try:
                records.append(self._dataset[index])
                sound.append(index)
            except self._corrupt_errors as error:
                skipped.append(_told(index, error))
        if not sound:
            return Delivery(None, tuple(skipped))
        batch = self._whole(sound) if self._whole is not None else self._collate(records)
        return Delivery(batch, tuple(skipped))


class StreamSource(IterableDataset[Delivery]):
    """An iterable data set by whole batches.

    Args:
        dataset: yields records and `Skipped`; with `batches(batch_size, drop_last=)` it makes batches itself.
        collate: makes a batch of records; None: the data set's `batches`, else torch's own.
    """

    def __init__(self, dataset: Any, batch_size: int, drop_last: bool, collate: Collate | None) -> None:
        self._dataset, self._batch_size, self._drop_last = dataset, batch_size, drop_last
        self._collate = collate

    def __iter__(self) -> StreamDeliveries:
        batches = method_of(self._dataset, "batches")
        if self._collate is None and batches is not None:
            made = batches(self._batch_size, drop_last=self._drop_last)
            return StreamDeliveries(made, None, 1, True)
        return StreamDeliveries(
            iter(self._dataset), self._collate or _batch_of, self._batch_size, self._drop_last
        )


class StreamDeliveries:
    """Iterator of a stream's deliveries, with a position as torchdata asks for it.

    What cannot tell its own position is read again up to there.
    """

    def __init__(self, items: Iterator[Any], collate: Collate | None, size: int, drop_last: bool) -> None:
        self._items, self._collate, self._size, self._drop_last = items, collate, size, drop_last
        self._taken = 0
        self._over = False

    def __iter__(self) -> StreamDeliveries:
        return self

    def __next__(self) -> Delivery:
        try:
            return self._next()
        except UserError as error:
            self._over = True
            return Delivery(None, error=error)

    def _next(self) -> Delivery:
        skipped: list[Skipped] = []
        records: list[Any] = []
        while not self._over and len(records) < self._size:
            item = next(self._items, _END)
            self._taken += 1
            if item is _END:
                self._over = True
            elif isinstance(item, Skipped):
                skipped.append(item)
            else:
                records.append(item)
        if not records or (self._drop_last and len(records) < self._size):
            if skipped:
                return Delivery(None, tuple(skipped))
            raise StopIteration
        return Delivery(self._collate(records) if self._collate else records[0], tuple(skipped))

    def state_dict(self) -> dict[str, Any]:
        """Position after the last delivery."""
        own = self._items.state_dict() if hasattr(self._items, "state_dict") else None
        return {"taken": self._taken, "over": self._over, "items": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._taken, self._over = int(state["taken"]), bool(state["over"])
        if state["items"] is not None:
            self._items.load_state_dict(state["items"])  # type: ignore[attr-defined]
            return
        for _ in range(self._taken):
            next(self._items, _END)


def method_of(dataset: Any, name: str) -> Callable[..., Any] | None:
    """What a data set may offer to the loader; None where it has none, or the name means something else."""
    found = getattr(dataset, name, None)
    return found if callable(found) else None


def batch_bytes(batch: Any) -> int:
    """Bytes of every tensor and text of a nested batch."""
    if isinstance(batch, torch.Tensor):
        return batch.element_size() * batch.numel()
    if isinstance(batch, (str, bytes)):
        return len(batch)
    if isinstance(batch, Mapping):
        return sum(map(batch_bytes, batch.values()))
    if isinstance(batch, Sequence):
        return sum(map(batch_bytes, batch))
    return 0


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Torch, NumPy and Python draw from `seed` inside; outside, what they would have drawn is unchanged."""
    if seed is None:
        yield
        return
    with random_states_kept():
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)
        yield


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the random states of torch (CPU), NumPy and Python back afterwards."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def _batch_of(records: Any) -> Any:
    """Torch's own collation, whose refusal says what to do."""
    try:
        return default_collate(records)
    except (TypeError, RuntimeError) as error:
        raise DataError(
            f"records that torch cannot make a batch of: {error}"[:300],
            "tensors of one shape, arrays, numbers or text, also in lists and dicts",
            "collate=, a function that makes a batch of a list of records",
        ) from error


def _told(index: int, error: Exception) -> Skipped:
    if isinstance(error, CorruptRecord):
        return Skipped(error.where, error.reason)
    return Skipped(f"record {index}", f"{type(error).__name__}: {error}"[:300])


_END = object()
