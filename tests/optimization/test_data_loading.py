"""The data loader: equal sequences after a resume, damage counted up to a limit, dead workers named."""

from __future__ import annotations

import builtins
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from events import captured_events
from real_tables import digits, flip_bytes, sp500, write_csv, write_hdf5, write_parquet
from torch import nn
from torch.utils.data import Dataset, IterableDataset

import obsinfra
from obsinfra.backup.state_tree import decode, encode
from obsinfra.catalog import metrics as catalog
from obsinfra.errors import DataError, DataWorkerError
from obsinfra.optimization import loading_plan
from obsinfra.optimization.data_loading import create_memory_efficient_dataloader
from obsinfra.optimization.datasets import CorruptRecord, ParquetRows, Skipped, csv_rows, hdf5_rows
from obsinfra.optimization.loading_plan import Wishes, plan_loading
from obsinfra.optimization.reclaimable import reclaimables


class Prices(IterableDataset[Any]):
    """A stream of somebody else: tells no position, knows nothing of workers; one record cannot be read."""

    def __iter__(self) -> Iterator[Any]:
        for row, price in enumerate(sp500()["close"][:50]):
            yield Skipped("row 30", "torn") if row == 30 else torch.tensor(price)


def loader_of(kind: str, folder: Path, workers: int | None, **more: Any) -> Any:
    options: dict[str, Any] = {"num_workers": workers, "prefetch": 2, **more}
    if kind == "digits":
        path = folder / "digits.h5"
        data: Any = hdf5_rows(path if path.exists() else write_hdf5(path))
        options |= {"shuffle": True, "seed": 5}
        size = 300
    elif kind == "stream":
        path = folder / "sp500.parquet"
        stored = path if path.exists() else write_parquet(path, rows_per_group=450)
        data = ParquetRows(stored, ["close", "volume"], shuffle=True, seed=2)
        size = 400
    else:
        data, size = Prices(), 8
    return create_memory_efficient_dataloader(data, size, **options)


def flat(batch: Any) -> Any:
    return batch.tolist() if isinstance(batch, torch.Tensor) else {k: v.tolist() for k, v in batch.items()}


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("digits", 0, 2),
        ("digits", 2, 0),
        ("digits", 2, 2),
        ("stream", 0, 0),
        ("stream", 2, 2),
        ("stream", 2, None),
        ("foreign stream", 0, 0),
        ("foreign stream", 1, None),
    ],
)
def test_resumed_in_the_middle_of_an_epoch_the_sequence_is_equal(
    tmp_path: Path, kind: str, before: int, after: int | None
) -> None:
    """Two epochs. Records by index may go on with another number of workers; a stream keeps its own."""
    loader = loader_of(kind, tmp_path, before)
    whole = [flat(batch) for _ in range(2) for batch in loader]
    if kind == "digits":
        assert sorted(np.concatenate([b["label"] for b in whole[:6]])) == sorted(digits()[1])
        assert whole[0] != whole[6]
    loader = loader_of(kind, tmp_path, before)
    used = [flat(batch) for batch in loader]
    for batch in loader:
        used.append(flat(batch))
        if len(used) == len(whole) // 2 + 3:
            break
    document, tensors = encode(loader.state_dict())  # as a checkpoint keeps it
    second = loader_of(kind, tmp_path, after)
    second.load_state_dict(decode(document, tensors))
    used += [flat(batch) for batch in second]
    assert used == whole
    if kind != "digits":
        assert second.num_workers == before


def test_a_stream_does_not_go_on_with_another_number_of_workers(tmp_path: Path) -> None:
    loader = loader_of("stream", tmp_path, 0)
    next(iter(loader))
    with pytest.raises(DataError, match="read by 0 workers and is to go on with 2"):
        loader_of("stream", tmp_path, 2).load_state_dict(loader.state_dict())


class Regression:
    """A linear model on the S&P 500's closing prices or on digits, watched by obsinfra."""

    def __init__(self, kind: str, folder: Path, workers: int) -> None:
        torch.manual_seed(0)
        self.kind, self.folder = kind, folder
        self.loader = loader_of(kind, folder, workers)
        self.model = nn.Linear(64 if kind == "digits" else 1, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-7)
        self.seen: list[Any] = []

    def train(self, name: str, stop_at: int | None = None, resume: str | None = None) -> Any:
        run = obsinfra.observe(
            self.model,
            self.optimizer,
            run=name,
            resume=resume,
            output_dir=self.folder,
            metrics_port=0,
            checkpoint_seconds=3600,
        )
        with run:
            for _ in run.epochs(2):
                for batch in run.steps(self.loader):
                    x = batch["image"].flatten(1) if self.kind == "digits" else batch["close"][:, None]
                    loss = self.model(x).square().mean()
                    loss.backward()
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    run.record(loss=loss)
                    self.seen.append(flat(batch))
                    if stop_at is not None and run.step + 1 == stop_at:
                        run.request_stop("test")
        return run


@pytest.mark.parametrize(("kind", "workers"), [("digits", 0), ("digits", 2), ("stream", 2)])
def test_a_run_that_stops_inside_an_epoch_and_resumes_equals_one_that_did_not(
    tmp_path: Path, kind: str, workers: int
) -> None:
    whole = Regression(kind, tmp_path, workers)
    whole.train("whole")
    first, second = Regression(kind, tmp_path, workers), Regression(kind, tmp_path, workers)
    steps = len(whole.seen)
    first.train("cut", stop_at=steps // 2 + 2)
    assert len(first.seen) == steps // 2 + 2
    run = second.train("cut", resume="auto")
    assert run.step == steps
    assert first.seen + second.seen == whole.seen
    for mine, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def damaged_csv(folder: Path, *rows: int) -> Any:
    path = write_csv(folder / "sp500.csv")
    lines = path.read_text().split("\n")
    for row in rows:
        lines[1 + row] = lines[1 + row].replace(".", "·", 1)
    path.write_text("\n".join(lines))
    return csv_rows(path, ["close", "open"])


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_records_are_left_out_counted_and_reported(tmp_path: Path, workers: int) -> None:
    """A whole batch of them gives no batch; each is told once, however many epochs."""
    data = damaged_csv(tmp_path, 7, 9, 1000, *range(1200, 1300))
    loader = create_memory_efficient_dataloader(data, 100, num_workers=workers)
    with captured_events() as events:
        batches = [batch["close"] for batch in loader]
        assert loader.ledger.total == 103
        assert sum(1 for _ in loader) == len(batches) == 50
    assert loader.ledger.total == 206
    assert [len(batch) for batch in batches[:12]] == [98, *[100] * 9, 99, 100]
    kept = np.delete(sp500()["close"], [7, 9, 1000, *range(1200, 1300)])
    assert torch.equal(torch.cat(batches), torch.from_numpy(kept))
    told = [event for event in events if event["event"] == "record_skipped"]
    assert [event["where"] for event in told[:3]] == [f"sp500.csv line {n}" for n in (9, 11, 1002)]
    assert len(told) == 103 and "open is" in told[0]["reason"]


class Readings(Dataset[Any]):
    """Somebody's own: says of one record that it is corrupt, and of another what its parser said."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        if index == 1:
            raise CorruptRecord("sensor 1", "cut short")
        return float("3,1" if index == 3 else index)


def test_errors_that_are_named_add_to_what_is_known_to_be_corrupt() -> None:
    loader = create_memory_efficient_dataloader(Readings(), 6, num_workers=0, corrupt_errors=(ValueError,))
    assert [batch.tolist() for batch in loader] == [[0, 2, 4, 5]]
    assert list(loader.ledger.seen) == ["sensor 1", "record 3"]


class Named(Prices):
    """Has attributes that mean something else than those of `ParquetRows`."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.batches = self.set_epoch = self.cache_use = self.workers_ended = 3


@pytest.mark.parametrize("rows", [object(), 7, [1, 2]])
def test_an_attribute_of_somebodys_stream_is_not_taken_for_its_length(rows: Any) -> None:
    loader = create_memory_efficient_dataloader(Named(rows), 8, num_workers=0)
    assert loader.state_dict()["records"] is None and not hasattr(loader, "__len__")
    assert len(next(iter(loader))) == 8 and loader.cache_use() is None
    document, tensors = encode(loader.state_dict())
    create_memory_efficient_dataloader(Named(8), 8, num_workers=0).load_state_dict(decode(document, tensors))


class Told(Named):
    """A stream that says of each worker's rows what it is told to say."""

    def __init__(self, told: Any) -> None:
        super().__init__(4)
        self.told = told

    def shard_rows(self, workers: int) -> Any:
        return self.told(workers)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (lambda workers: "many", "shard_rows(1) returned 'many'; expected a list of 1 whole number of at"),
        (lambda workers: None, "shard_rows(1) returned None"),
        (lambda workers: [1, 2], "shard_rows(1) returned [1, 2]"),
        (lambda workers: ["7"], "shard_rows(1) returned ['7'], in it '7'"),
        (lambda workers: [-1], "in it -1"),
        (lambda workers: [2.5], "in it 2.5"),
        (lambda workers: [True], "in it True"),
        (lambda: [7], "shard_rows(1) raised TypeError: "),
    ],
)
def test_a_stream_that_says_nonsense_of_its_rows_is_refused_before_it_is_read(told: Any, said: str) -> None:
    with pytest.raises(DataError) as error:
        create_memory_efficient_dataloader(Told(told), 8)
    assert said in str(error.value) and "fix: correct it, or leave it out" in str(error.value)


def test_nonsense_that_comes_later_or_from_an_attribute_of_that_name() -> None:
    """Two workers have two numbers; what cannot be called is no such method."""
    loader = create_memory_efficient_dataloader(Told(lambda workers: [1] * (workers == 1)), 8, num_workers=1)
    assert len(loader) == 1
    with pytest.raises(DataError, match=r"shard_rows\(2\) returned \[\]; expected a list of 2 whole numbers"):
        create_memory_efficient_dataloader(Told(lambda workers: [1] * (workers == 1)), 8, num_workers=2)
    stream = Named(4)
    stream.shard_rows = 3  # type: ignore[attr-defined]
    loader = create_memory_efficient_dataloader(stream, 8, num_workers=0)
    assert loader.state_dict()["records"] is None and not hasattr(loader, "__len__")


def test_beyond_the_limit_training_ends_with_the_reason(tmp_path: Path) -> None:
    """The limit is one epoch's, and a resume does not forget what was skipped before it."""
    data = damaged_csv(tmp_path, 7, 9, 1000)
    assert sum(1 for _ in create_memory_efficient_dataloader(data, 100, max_skipped=3, num_workers=0)) == 51
    loader = create_memory_efficient_dataloader(data, 100, max_skipped=2, num_workers=0)
    batches = iter(loader)
    for _ in range(10):
        next(batches)
    resumed = create_memory_efficient_dataloader(data, 100, max_skipped=2, num_workers=0)
    resumed.load_state_dict(loader.state_dict())
    for rest in (batches, iter(resumed)):
        with pytest.raises(DataError, match=r"3 corrupt records in one epoch, the last: sp500\.csv line 10"):
            list(rest)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_row_group_and_chunk_on_the_way_through_workers(tmp_path: Path, workers: int) -> None:
    import h5py
    import pyarrow.parquet as parquet

    table = write_parquet(tmp_path / "a.parquet")
    column = parquet.ParquetFile(table).metadata.row_group(9).column(4)
    flip_bytes(table, column.data_page_offset + 40)
    loader = create_memory_efficient_dataloader(ParquetRows(table), 128, num_workers=workers)
    rows = sum(len(batch["close"]) for batch in loader)
    assert (rows, loader.ledger.total) == (4531, 500)
    assert list(loader.ledger.seen) == ["a.parquet row group 9"]

    store = write_hdf5(tmp_path / "d.h5")
    with h5py.File(store) as file:
        offset = file["label"].id.get_chunk_info(1).byte_offset
    flip_bytes(store, offset)
    loader = create_memory_efficient_dataloader(hdf5_rows(store), 128, num_workers=workers)
    assert sum(len(batch["label"]) for batch in loader) == 1797 - 128
    assert loader.ledger.total == 128


def test_metrics_of_the_data_are_exported(tmp_path: Path) -> None:
    data = damaged_csv(tmp_path, 7, 9)
    loader = create_memory_efficient_dataloader(data, 64, num_workers=2)
    model = nn.Linear(2, 1)
    with obsinfra.observe(model, run="r", output_dir=tmp_path, metrics_port=0, disable_backups=True) as run:
        for step, _ in enumerate(run.steps(loader)):
            if step == 20:
                held = {s.metric: s.value for s in run.monitor.samples()}[catalog.DATA_CACHE_BYTES]
                assert 0 < held <= 2 * data.cache.max_bytes
        found = {(s.metric, *s.labels.values()): s.value for s in run.monitor.samples()}
    assert found[(catalog.DATA_RECORDS_SKIPPED,)] == 2
    assert found[(catalog.DATA_LOADER_WORKERS,)] == 2
    assert found[(catalog.DATA_CACHE_BYTES,)] == 0  # gone with the workers
    lookups = found[(catalog.DATA_CACHE_LOOKUPS, "hit")] + found[(catalog.DATA_CACHE_LOOKUPS, "miss")]
    assert lookups >= 79
    assert found[(catalog.DATA_CACHE_LOOKUPS, "miss")] >= 20


class Dies(Dataset[int]):
    """Its worker is killed, or waits for ever, at one record."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        if index == 17 and self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 17 and self.how == "stuck":
            threading.Event().wait()
        return index


def test_a_killed_worker_is_an_error_with_its_name_and_no_hang() -> None:
    loader = create_memory_efficient_dataloader(Dies("killed"), 2, num_workers=2, prefetch=1)
    with pytest.raises(DataWorkerError, match=r"worker \d+ was killed by SIGKILL.*fewer workers"):
        list(loader)


def test_a_worker_that_gives_nothing_is_an_error_after_the_time_given() -> None:
    loader = create_memory_efficient_dataloader(
        Dies("stuck"), 2, num_workers=1, prefetch=2, timeout_seconds=1
    )
    with pytest.raises(DataWorkerError, match=r"timed out after 1.*timeout_seconds"):
        list(loader)


class Noisy(Dataset[Any]):
    """Digits with noise drawn anew each time, from every source of randomness there is."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        noise = torch.rand(1).item() + float(np.random.rand()) + random.random()
        return torch.from_numpy(digits()[0][index]) + noise


def test_augmentation_is_drawn_alike_after_a_resume_and_by_any_number_of_workers() -> None:
    def made(workers: int) -> Any:
        return create_memory_efficient_dataloader(
            Noisy(), 8, shuffle=True, random_records=True, num_workers=workers, prefetch=2
        )

    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    loader = made(0)
    whole = [flat(batch) for batch in loader]
    assert whole[0] != flat(next(iter(loader)))
    assert [flat(batch) for batch in made(2)] == whole
    loader = made(2)
    batches = iter(loader)
    head = [flat(next(batches)) for _ in range(3)]
    resumed = made(0)
    resumed.load_state_dict(loader.state_dict())
    assert head + [flat(batch) for batch in resumed] == whole
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]


@pytest.mark.parametrize("kind", ["digits", "stream"])
def test_when_memory_runs_short_prefetch_shrinks_and_the_sequence_stays(tmp_path: Path, kind: str) -> None:
    whole = [flat(batch) for batch in loader_of(kind, tmp_path, 2)]
    loader = loader_of(kind, tmp_path, 2, prefetch=4)
    batches = iter(loader)
    used = [flat(next(batches)) for _ in range(2)]
    order = [entry.order for entry in reclaimables()]
    assert order == sorted(order)
    freed = loader.reclaim_prefetch()
    assert freed == 3 * 2 * (300 * (64 * 4 + 8) if kind == "digits" else 400 * 12)
    assert loader.reclaim_prefetch() == 0
    used += [flat(batch) for batch in batches]
    assert used == whole
    assert (loader.plan.prefetch, loader.plan.reason) == (1, "memory ran short")


class Clock:
    """Time that passes when a loader is asked, and nowhere else."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeTrial:
    """Batches that take their time, in this process or meanwhile in others that share the work perfectly."""

    def __init__(
        self, clock: Clock, seconds: float, workers: int, prefetch: int, batches: int, size: int
    ) -> None:
        self.clock, self.seconds, self.left, self.size = clock, seconds, batches, size
        self.workers, self.ahead = workers, workers * prefetch
        self.ready_at = clock.now

    def __next__(self) -> Any:
        if self.left == 0:
            raise StopIteration
        self.left -= 1
        if self.workers:
            each = self.seconds / self.workers
            self.clock.now = max(self.clock.now, self.ready_at) + 2e-5
            self.ready_at = max(self.ready_at, self.clock.now - self.ahead * each) + each
        else:
            self.clock.now += self.seconds
        return torch.empty(self.size, dtype=torch.uint8)

    def worker_pids(self) -> list[int]:
        return []

    def close(self) -> None:
        pass


MIB = 1 << 20


@pytest.mark.parametrize(
    ("loading", "step", "batches", "size", "room", "asked", "workers", "prefetch", "reason"),
    [
        pytest.param(5e-5, None, 999, 100, 4096, None, 0, 0, "faster than a hand-over", id="fast"),
        pytest.param(0.01, 2.0, 999, 100, 4096, None, 0, 0, "0.5% of a step", id="hidden in the step"),
        pytest.param(0.01, 0.02, 999, 100, 4096, None, 1, 2, "wait per batch", id="one overlaps"),
        pytest.param(0.08, 0.01, 999, 100, 4096, None, 8, 2, "wait per batch", id="slow data"),
        pytest.param(0.08, 0.01, 999, 100, 200, None, 2, 2, "4 workers do not fit", id="little memory"),
        pytest.param(0.08, 0.01, 999, 60 * MIB, 250, None, 1, 2, "2 workers do not fit", id="large batches"),
        pytest.param(0.08, 0.01, 999, 60 * MIB, 250, 2, 2, 1, "prefetch 1 so that", id="workers as asked"),
        pytest.param(0.08, 0.01, 1, 100, 4096, None, 0, 0, "too few batches", id="hardly any data"),
    ],
)
def test_the_plan_follows_the_measurements_and_the_memory(
    monkeypatch: pytest.MonkeyPatch,
    loading: float,
    step: float | None,
    batches: int,
    size: int,
    room: int,
    asked: int | None,
    workers: int,
    prefetch: int,
    reason: str,
) -> None:
    """Under a clock of the test's own; `room` in MiB is what the plan may use."""
    clock = Clock()
    monkeypatch.setattr(loading_plan, "time", clock)
    left = int(room * MIB / loading_plan.HEADROOM_SHARE)
    monkeypatch.setattr(loading_plan, "headroom_bytes", lambda percent: left)

    def start(workers: int, prefetch: int, pin_memory: bool) -> Any:
        return FakeTrial(clock, loading, workers, prefetch, batches, size)

    wishes = Wishes(asked, None, None, torch.device("cpu"), step, 60.0, 85.0, most_workers=8)
    plan = plan_loading(start, wishes)
    assert (plan.workers, plan.prefetch, plan.pin_memory) == (workers, prefetch, False)
    assert reason in plan.reason


def test_measuring_leaves_no_trace_in_order_or_randomness(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "sp500.csv")

    def made(workers: int | None) -> Any:
        data = csv_rows(path, ["close"], max_cache_bytes=0)
        return create_memory_efficient_dataloader(
            data, 500, shuffle=True, num_workers=workers, measure_seconds=0.2
        )

    before = torch.get_rng_state()
    loader = made(None)
    found = [flat(batch) for batch in loader]
    assert [one.workers for one in loader.plan.measured][:2] == [0, 1]
    assert loader.plan.batch_bytes == 2000
    assert found == [flat(batch) for batch in made(0)]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_that_is_its_own_iterator_is_not_used_up_by_measuring() -> None:
    class Once(IterableDataset[Any]):
        def __init__(self) -> None:
            self.rows = iter(range(10))

        def __iter__(self) -> Iterator[Any]:
            return self

        def __next__(self) -> int:
            return next(self.rows)

    loader = create_memory_efficient_dataloader(Once(), 4)
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert "use it up" in loader.plan.reason


@pytest.mark.parametrize("rows", [np.arange(12.0).reshape(6, 2), torch.arange(12.0).reshape(6, 2)])
def test_an_array_as_data_set_gives_its_rows(rows: Any) -> None:
    """Arrays have a `take` too, which picks single numbers."""
    loader = create_memory_efficient_dataloader(rows, batch_size=2, shuffle=False, num_workers=0)
    assert torch.cat(list(loader)).tolist() == rows.tolist()


def test_bad_arguments_and_a_missing_package_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [1, 2, 3]
    for arguments, message in (
        ({"batch_size": 0}, "batch_size 0; expected a whole number of at least 1"),
        ({"batch_size": 4, "drop_last": True}, "3 records give no batch of 4"),
        ({"batch_size": 1, "num_workers": -1}, "num_workers -1"),
        ({"batch_size": 1, "max_memory_percent": 101}, "max_memory_percent 101"),
    ):
        with pytest.raises(DataError, match=message):
            create_memory_efficient_dataloader(data, **arguments)
    with pytest.raises(DataError, match="of a stream"):
        create_memory_efficient_dataloader(Prices(), 1, shuffle=True)
    other = create_memory_efficient_dataloader(data, 2, num_workers=0)
    with pytest.raises(DataError, match="batch_size 2, this loader 1"):
        create_memory_efficient_dataloader(data, 1, num_workers=0).load_state_dict(other.state_dict())
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("torchdata"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"needs torchdata.*pip install 'obsinfra\[data\]'"):
        create_memory_efficient_dataloader(data, 1)
