"""`create_memory_efficient_dataloader`: batches of any data set, resumed exactly in the middle of an epoch.

torchdata's StatefulDataLoader loads them (`loading_engine`), in the order of `batch_order`; the position and
what is skipped are kept here. Works alone, and under `obsinfra.observe`, which asks for its state and shows
its metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from numbers import Integral
from typing import Any, Protocol

import torch
from torch.utils.data import IterableDataset

from obsinfra.catalog import metrics as catalog
from obsinfra.errors import DataError, UserError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.sample import Sample
from obsinfra.optimization.arguments import LONGEST_SECONDS, flag, function, number, shown, whole_number
from obsinfra.optimization.batch_order import BatchOrder
from obsinfra.optimization.data_order import derived_seed
from obsinfra.optimization.datasets.block_cache import CacheUse
from obsinfra.optimization.datasets.skipping import CorruptRecord, SkipLedger
from obsinfra.optimization.delivered_batches import (
    Collate,
    IndexedSource,
    StreamSource,
    batch_bytes,
    method_of,
    random_states_kept,
)
from obsinfra.optimization.loading_engine import LoadingEngine, Trial, start_engine
from obsinfra.optimization.loading_plan import LoadingPlan, Wishes, plan_loading, usable_processors
from obsinfra.optimization.precision import choose_device
from obsinfra.optimization.reclaimable import PREFETCH_ORDER, register_reclaimable

MOST_WORKERS = 1024
"""Processes; more are a slip of the finger that would take the host down."""

MOST_BATCHES_AHEAD = 10_000
"""Per worker; torch goes through as many places before it gives the first batch."""


class SharedOut(Protocol):
    """A stream that gives each worker rows of its own, as `ParquetRows` does."""

    def shard_rows(self, workers: int) -> list[int]:
        """Rows each of so many workers will read in this epoch."""
        ...


def create_memory_efficient_dataloader(
    dataset: Any,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
    collate: Collate | None = None,
    random_records: bool = False,
    num_workers: int | None = None,
    prefetch: int | None = None,
    pin_memory: bool | None = None,
    device: str | torch.device = "cpu",
    step_seconds: float | None = None,
    measure_seconds: float = 2.0,
    max_memory_percent: float = 85.0,
    max_skipped: int = 1000,
    corrupt_errors: tuple[type[Exception], ...] = (),
    timeout_seconds: float = 0.0,
) -> MemoryEfficientDataLoader:
    """Batches of `dataset`, an epoch per `iter()`, with `state_dict` and `load_state_dict`.

    Args:
        dataset: map-style (`__len__` and `__getitem__`; `take` or `__getitems__` for whole batches) or an
            `IterableDataset`.
        batch_size: records per batch; a batch of which some were skipped is smaller.
        shuffle: another order every epoch, by (seed, epoch). Map-style only; a stream shuffles itself.
        seed: of the order and of `random_records`.
        drop_last: leave out a last batch that would be smaller.
        collate: makes a batch of a list of records; None: the data set's own, else torch's.
        random_records: the data set draws from torch, NumPy or `random` (augmentation): each batch is seeded
            by (seed, epoch, place), so that a resume draws the same. Map-style only.
        num_workers, prefetch, pin_memory: None: measured, see docs/data.md.
        device: where batches will go; pinned memory is for CUDA devices.
        step_seconds: time your loop computes per batch, if you know it.
        measure_seconds: most time to spend on measuring, about.
        max_memory_percent: of the memory limit (cgroup or host), within which workers and prefetch must fit.
        max_skipped: most corrupt records to leave out in one epoch.
        corrupt_errors: what the data set raises for a record to be skipped, besides `CorruptRecord`.
        timeout_seconds: longest wait for a batch from workers; 0: as long as they live.

    Raises:
        DataError: torchdata is missing, an argument makes no sense, or the data set is empty.
    """
    batch_size = whole_number("batch_size", batch_size, least=1, error=DataError)
    seed = whole_number("seed", seed, error=DataError)
    max_skipped = whole_number("max_skipped", max_skipped, least=0, error=DataError)
    if num_workers is not None:
        num_workers = whole_number("num_workers", num_workers, least=0, most=MOST_WORKERS, error=DataError)
    if prefetch is not None:
        prefetch = whole_number("prefetch", prefetch, least=1, most=MOST_BATCHES_AHEAD, error=DataError)
    if pin_memory is not None:
        flag("pin_memory", pin_memory, error=DataError)
    if step_seconds is not None:
        number("step_seconds", step_seconds, least=0, error=DataError)
    number("timeout_seconds", timeout_seconds, least=0, most=LONGEST_SECONDS, error=DataError)
    number("measure_seconds", measure_seconds, least=0, most=LONGEST_SECONDS, error=DataError)
    number("max_memory_percent", max_memory_percent, above=0, most=100, error=DataError)
    for name, value in (("shuffle", shuffle), ("drop_last", drop_last), ("random_records", random_records)):
        flag(name, value, error=DataError)
    if collate is not None:
        function("collate", collate, "a function of a list of records", error=DataError)
    if not isinstance(corrupt_errors, tuple) or not all(map(_is_error, corrupt_errors)):
        raise DataError(
            f"corrupt_errors {shown(corrupt_errors)}", "a tuple of exception classes", "(ValueError,)"
        )
    target = choose_device(device)
    try:
        import torchdata.stateful_dataloader  # noqa: F401
    except ImportError as error:
        raise DataError(
            "the data loader needs torchdata", "the extra `data`", "pip install 'obsinfra[data]'"
        ) from error
    streams = isinstance(dataset, IterableDataset)
    if streams and (shuffle or random_records):
        raise DataError(
            f"shuffle={shuffle}, random_records={random_records} of a stream",
            "a data set with records by index",
            "let the stream shuffle itself (ParquetRows(…, shuffle=True))",
        )
    if not streams:
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise DataError(
                f"a {type(dataset).__name__} without __len__ and __getitem__",
                "a data set with both, or an IterableDataset",
            )
        if isinstance(dataset, Mapping) and 0 not in dataset:
            raise DataError(
                f"a {type(dataset).__name__} with keys {shown(list(dataset)[:3])}",
                "records by number from 0",
                "list(records.values())",
            )
        if len(dataset) < (batch_size if drop_last else 1):
            raise DataError(f"{len(dataset)} records give no batch of {batch_size}", "one batch or more")
    shares = streams and _shares(dataset)
    if shares:
        _rows_of_workers(dataset, num_workers or 1)
    sized = not streams or shares
    return (_Sized if sized else MemoryEfficientDataLoader)(
        dataset,
        batch_size,
        order=BatchOrder(batch_size, shuffle, seed, drop_last, random_records),
        collate=collate,
        wishes=Wishes(
            workers=num_workers,
            prefetch=prefetch,
            pin_memory=pin_memory,
            device=target,
            step_seconds=step_seconds,
            measure_seconds=measure_seconds,
            max_memory_percent=max_memory_percent,
            most_workers=_most_workers(dataset, streams),
            measurable=not isinstance(dataset, Iterator),
        ),
        ledger=SkipLedger(max_skipped),
        corrupt_errors=(CorruptRecord, *corrupt_errors),
        timeout_seconds=timeout_seconds,
    )


class MemoryEfficientDataLoader:
    """Made by `create_memory_efficient_dataloader`; iterate it.

    Attributes:
        dataset, batch_size: as given.
        ledger: what was skipped.
        epoch: the epoch under way, or the next one.
        phase: `data`.
    """

    phase = "data"

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        order: BatchOrder,
        collate: Collate | None,
        wishes: Wishes,
        ledger: SkipLedger,
        corrupt_errors: tuple[type[Exception], ...],
        timeout_seconds: float,
    ) -> None:
        self.dataset, self.batch_size, self.ledger = dataset, batch_size, ledger
        self.epoch = 0
        self._streams = isinstance(dataset, IterableDataset)
        self._source: Any = (
            StreamSource(dataset, batch_size, order.drop_last, collate)
            if self._streams
            else IndexedSource(dataset, collate, corrupt_errors)
        )
        self._order, self._wishes, self._timeout_seconds = order, wishes, timeout_seconds
        self._plan: LoadingPlan | None = None
        self._delivered = 0
        self._stream_state: dict[str, Any] | None = None
        self._continue = False
        self._prefetch_given_up = False
        self._batch_bytes = 0
        name = type(dataset).__name__
        register_reclaimable(f"prefetched batches of {name}", PREFETCH_ORDER, self.reclaim_prefetch)

    @property
    def plan(self) -> LoadingPlan:
        """Workers, prefetch and pinned memory, measured at the first use."""
        if self._plan is None:
            self._set_epoch()
            with random_states_kept():
                self._plan = plan_loading(self._trial, self._wishes)
            forget = method_of(self.dataset, "forget")
            if self._plan.workers and forget is not None:
                forget()  # what measuring has left in this process's cache, workers cannot use
            get_logger("performance").info(
                "data_loading_planned",
                workers=self._plan.workers,
                prefetch=self._plan.prefetch,
                pin_memory=self._plan.pin_memory,
                batch_bytes=self._plan.batch_bytes,
                reason=self._plan.reason,
            )
        return self._plan

    @property
    def num_workers(self) -> int:
        """Worker processes."""
        return self.plan.workers

    def __iter__(self) -> Iterator[Any]:
        if not self._continue and self._delivered:
            self._finish_epoch()
        self._continue = False
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        engine = self._start()
        try:
            while True:
                if self._prefetch_given_up:
                    self._prefetch_given_up = False
                    engine.close()
                    engine = self._start()
                try:
                    delivery = next(engine)
                except StopIteration:
                    break
                if delivery.error is not None:
                    raise delivery.error
                self._delivered += 1
                if self._streams:
                    self._stream_state = engine.state_dict()
                self.ledger.note(delivery.skipped)
                if delivery.batch is not None:
                    self._batch_bytes = self._batch_bytes or batch_bytes(delivery.batch)
                    yield delivery.batch
        except RuntimeError as error:  # torch raises it wherever this thread is when a worker dies
            engine.explain(error)
            raise
        finally:
            engine.close()
        self._finish_epoch()

    def _finish_epoch(self) -> None:
        self.epoch += 1
        self._delivered = 0
        self._stream_state = None
        self.ledger.in_epoch = 0

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch: epoch, batches, skips; of a stream each worker's own too."""
        return {
            **self._identity(),
            "epoch": self.epoch,
            "delivered": self._delivered,
            "skipped": self.ledger.in_epoch,
            "workers": self._plan.workers if self._plan is not None else None,
            "stream": self._stream_state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there at the next `iter()`.

        The order of a stream depends on the number of workers, so a stream goes on with as many as it had.
        Records by index may be loaded by any number.

        Raises:
            DataError: it is none, of another data set, batch size, seed or order, or of a stream with
                another number of workers than asked for.
        """
        if not isinstance(state, Mapping):
            raise DataError(f"a data position {shown(state)}", "what state_dict() returned", "give that")
        for name, mine in self._identity().items():
            if name not in state or state[name] != mine:
                raise DataError(
                    f"the saved data position has {name} {state.get(name)!r}, this loader {mine!r}",
                    "the data and settings the run was started with",
                    "resume with the same data, or start a new run",
                )
        epoch, delivered, skipped = (
            whole_number(f"a data position with {name}", state.get(name), least=0, error=DataError)
            for name in ("epoch", "delivered", "skipped")
        )
        batches = delivered if self._streams else self._order.batches(len(self.dataset))
        if delivered > batches:
            raise DataError(
                f"a data position with delivered {delivered}",
                f"up to the {batches} batches of an epoch",
                "resume with the same data, or start a new run",
            )
        self.epoch, self._delivered, self.ledger.in_epoch = epoch, delivered, skipped
        self._stream_state = state.get("stream")
        if self._stream_state is not None:
            self._go_on_with(
                whole_number("a data position with workers", state.get("workers"), least=0, error=DataError)
            )
        self._continue = True

    def _go_on_with(self, workers: int) -> None:
        """A stream goes on with the workers it had."""
        if workers == self._planned_workers():
            return
        if self._wishes.workers is not None:
            raise DataError(
                f"a stream that was read by {workers} workers and is to go on with {self._wishes.workers}",
                "the same number within an epoch",
                f"num_workers={workers}, or None",
            )
        prefetch = self._wishes.prefetch or 2
        pin = bool(self._wishes.pin_memory)
        self._plan = LoadingPlan(workers, prefetch if workers else 0, pin, reason="as when it was saved")

    def _planned_workers(self) -> int | None:
        return self._plan.workers if self._plan is not None else self._wishes.workers

    def _identity(self) -> dict[str, Any]:
        records = None
        if not self._streams:
            records = len(self.dataset)
        elif _shares(self.dataset):
            records = sum(_rows_of_workers(self.dataset, 1))
        return {"kind": type(self.dataset).__name__, "records": records, **self._order.identity()}

    # ---- memory and metrics --------------------------------------------------------------------

    def reclaim_prefetch(self) -> int:
        """Load only one batch ahead per worker from the next batch on; from any thread.

        Returns:
            Bytes that batches beyond that take when all are loaded; 0 where it is so already.
        """
        plan = self._plan
        if plan is None or plan.prefetch < 2:
            return 0
        self._plan = LoadingPlan(
            plan.workers, 1, plan.pin_memory, plan.batch_bytes, "memory ran short", plan.measured
        )
        self._prefetch_given_up = True
        return (plan.prefetch - 1) * plan.workers * (plan.batch_bytes or self._batch_bytes)

    def telemetry(self) -> list[Sample]:
        """Values of this loader's metrics now; `ObservedRun.steps` has them exported."""
        found = [
            Sample(catalog.DATA_RECORDS_SKIPPED, {}, self.ledger.total),
            Sample(catalog.DATA_LOADER_WORKERS, {}, self._plan.workers if self._plan is not None else 0),
        ]
        use = self.cache_use()
        if use is not None:
            found += [
                Sample(catalog.DATA_CACHE_BYTES, {}, use.bytes),
                Sample(catalog.DATA_CACHE_LOOKUPS, {"outcome": "hit"}, use.hits),
                Sample(catalog.DATA_CACHE_LOOKUPS, {"outcome": "miss"}, use.misses),
            ]
        return found

    def cache_use(self) -> CacheUse | None:
        """What the data set's cache did, in all processes; None where it has none."""
        use = method_of(self.dataset, "cache_use")
        return use() if use is not None else None

    # ---- the engine ----------------------------------------------------------------------------

    def _set_epoch(self) -> None:
        set_epoch = method_of(self.dataset, "set_epoch")
        if set_epoch is not None:
            set_epoch(self.epoch)

    def _start(self) -> LoadingEngine:
        """Loading from the present position."""
        plan = self.plan
        self._set_epoch()
        return self._engine(plan.workers, plan.prefetch, plan.pin_memory, self._delivered, self._stream_state)

    def _trial(self, workers: int, prefetch: int, pin_memory: bool) -> Trial:
        return Trial(self._engine(workers, prefetch, pin_memory, 0, None))

    def _engine(
        self, workers: int, prefetch: int, pin_memory: bool, delivered: int, state: dict[str, Any] | None
    ) -> LoadingEngine:
        return start_engine(
            self._source,
            None if self._streams else self._order.asks(len(self.dataset), self.epoch, delivered),
            workers=workers,
            prefetch=prefetch,
            pin_memory=pin_memory,
            seed=derived_seed(self._order.seed, "workers", self.epoch),
            timeout_seconds=self._timeout_seconds,
            snapshots=self._streams,
            state=state,
            workers_ended=method_of(self.dataset, "workers_ended"),
        )


class _Sized(MemoryEfficientDataLoader):
    """With a known number of batches."""

    def __len__(self) -> int:
        """Batches of the epoch under way, as many as there are when none is skipped."""
        if not self._streams:
            return self._order.batches(len(self.dataset))
        return sum(self._order.batches(rows) for rows in _rows_of_workers(self.dataset, self.num_workers))


def _most_workers(dataset: Any, streams: bool) -> int:
    """How many could be of use. A stream that we do not know may give every worker the same records."""
    return usable_processors() if not streams or _shares(dataset) else 1


def _shares(stream: Any) -> bool:
    """Whether it is `SharedOut`; an attribute of that name may mean something else."""
    return method_of(stream, "shard_rows") is not None


def _rows_of_workers(dataset: SharedOut, workers: int) -> list[int]:
    """What the stream says of itself, looked at: somebody else has written it.

    Raises:
        DataError: it is not what `SharedOut` says.
    """
    call, of = f"{type(dataset).__name__}.shard_rows({workers})", max(1, workers)
    expected = f"a list of {of} whole number{'s' * (of > 1)} of at least 0, the rows that each worker reads"
    fix = "correct it, or leave it out: the stream is then read by one worker at most"
    try:
        rows: Any = dataset.shard_rows(workers)
    except UserError:
        raise
    except Exception as error:
        raise DataError(f"{call} raised {type(error).__name__}: {error}"[:300], expected, fix) from error
    if not isinstance(rows, (list, tuple)) or len(rows) != of:
        raise DataError(f"{call} returned {shown(rows)}", expected, fix)
    for one in rows:
        if not isinstance(one, Integral) or isinstance(one, bool) or int(one) < 0:
            raise DataError(f"{call} returned {shown(rows)}, in it {shown(one)}", expected, fix)
    return [int(one) for one in rows]


def _is_error(one: object) -> bool:
    return isinstance(one, type) and issubclass(one, Exception)
