"""Parquet files streamed row group by row group: one group is in memory at a time, in each process.

An iterable data set for `create_memory_efficient_dataloader`. Row groups are shared out among workers; the
position is (row group, row), so a resume reads nothing again but the group it is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from obsinfra.errors import DataError
from obsinfra.optimization.arguments import file_path
from obsinfra.optimization.data_order import derived_seed
from obsinfra.optimization.datasets.skipping import Skipped

Columns = dict[str, NDArray[Any] | list[str]]


@dataclass(frozen=True, slots=True)
class _Group:
    path: Path
    number: int
    rows: int

    def __str__(self) -> str:
        return f"{self.path.name} row group {self.number}"


class ParquetRows(IterableDataset[Any]):
    """The rows of one or more Parquet files, in file order or shuffled.

    Yields dicts by column: numbers as they are, booleans, times as int64 in the file's unit, fixed-size lists
    of numbers as vectors, text as `str`. A missing float is NaN. A row group that cannot be read, a row with
    another missing value, and a file without a sound footer among others, are yielded as `Skipped`.

    Args:
        files: a file, several, or a folder (its `.parquet` files by name).
        columns: names of the columns to read; None: all.
        shuffle: shuffle the order of the row groups and the rows within each, by (seed, epoch). Rows of one
            group stay near each other.
        seed: of that order.

    Attributes:
        epoch: set by the data loader.

    Raises:
        DataError: pyarrow is missing, nothing there, no file is sound, a column is missing, or of a type
            that is none of the above.
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        columns: Sequence[str] | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self.paths = _files(files)
        self._groups: list[_Group] = []
        self._broken: list[Skipped] = []
        schema: Any = None
        for path in self.paths:
            try:
                with _open(path) as file:
                    metadata, found = file.metadata, file.schema_arrow
            except _damage() as error:
                if len(self.paths) == 1:
                    raise DataError(f"cannot open {path}: {error}", "a sound Parquet file") from error
                self._broken.append(Skipped(path.name, f"no sound Parquet file: {error}"[:300]))
                continue
            if schema is None:
                schema = found
                self.columns = list(columns) if columns is not None else list(found.names)
                _check(path, found, self.columns)
            elif [found.field(n).type for n in self.columns if n in found.names] != [
                schema.field(name).type for name in self.columns
            ]:
                raise DataError(
                    f"{path} has other columns than {self.paths[0].name}", "files of one schema, or `columns`"
                )
            self._groups += [
                _Group(path, number, metadata.row_group(number).num_rows)
                for number in range(metadata.num_row_groups)
            ]
        if not self._groups:
            raise DataError(
                f"no rows in {', '.join(map(str, self.paths))[:300]}", "sound Parquet files with rows"
            )

    @property
    def rows(self) -> int:
        """Rows as the footers tell, damaged ones included."""
        return sum(group.rows for group in self._groups)

    def set_epoch(self, epoch: int) -> None:
        """The order of the next iteration."""
        self.epoch = epoch

    def shard_rows(self, workers: int) -> list[int]:
        """Rows each of so many workers will read in this epoch."""
        order, shards = self._order(), max(1, workers)
        return [sum(group.rows for group in order[shard::shards]) for shard in range(shards)]

    def batches(self, batch_size: int, *, drop_last: bool = False) -> ParquetBatches:
        """Batches of this process's share: dicts of tensors [rows, …] or lists of text, and `Skipped`."""
        worker = get_worker_info()
        shard, shards = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        return ParquetBatches(
            self._order()[shard::shards],
            self._broken if shard == 0 else [],
            self.columns,
            batch_size,
            drop_last,
            derived_seed(self.seed, "rows", self.epoch) if self.shuffle else None,
        )

    def __iter__(self) -> Iterator[dict[str, Any] | Skipped]:
        for batch in self.batches(1024):
            if isinstance(batch, Skipped):
                yield batch
                continue
            for row in range(len(next(iter(batch.values())))):
                yield {name: values[row] for name, values in batch.items()}

    def _order(self) -> list[_Group]:
        if not self.shuffle:
            return self._groups
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "groups", self.epoch))
        return [self._groups[i] for i in torch.randperm(len(self._groups), generator=generator).tolist()]


class ParquetBatches:
    """Iterator over batches and `Skipped`; says and takes its position, as torchdata asks for it."""

    def __init__(
        self,
        groups: Sequence[_Group],
        broken: Sequence[Skipped],
        columns: Sequence[str],
        batch_size: int,
        drop_last: bool,
        row_seed: int | None,
    ) -> None:
        self._groups, self._columns = groups, columns
        self._batch_size, self._drop_last, self._row_seed = batch_size, drop_last, row_seed
        self._broken = list(broken)
        self._start = (0, 0)
        self._group, self._row = 0, 0
        """The next row to hand out: place in `groups`, and row among its sound ones in this order."""
        self._loaded: tuple[int, Columns, int] | None = None
        self._parts: list[dict[str, Any]] = []
        self._have = 0
        self._told = 0
        """Groups up to here have been told of if they are damaged."""

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch. What a batch not yet full has is read again."""
        return {
            "group": self._start[0],
            "row": self._start[1],
            "told": self._told,
            "broken": len(self._broken),
        }

    _start = (0, 0)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._group, self._row = self._start = int(state["group"]), int(state["row"])
        self._told = int(state["told"])
        self._broken = self._broken[len(self._broken) - int(state["broken"]) :]
        self._parts, self._have, self._loaded = [], 0, None

    def __iter__(self) -> ParquetBatches:
        return self

    def __next__(self) -> dict[str, Any] | Skipped:
        if self._broken:
            return self._broken.pop(0)
        while self._group < len(self._groups):
            columns, rows, damage = self._load()
            if damage is not None and self._told <= self._group:
                self._told = self._group + 1
                return damage
            share = min(rows - self._row, self._batch_size - self._have)
            if share > 0:
                span = slice(self._row, self._row + share)
                self._parts.append({name: values[span] for name, values in columns.items()})
                self._have += share
                self._row += share
            if self._row >= rows:
                self._group, self._row, self._loaded = self._group + 1, 0, None
            if self._have == self._batch_size:
                return self._batch()
        if self._have and not self._drop_last:
            return self._batch()
        raise StopIteration

    def _batch(self) -> dict[str, Any]:
        parts, self._parts, self._have = self._parts, [], 0
        self._start = (self._group, self._row)
        out: dict[str, Any] = {}
        for name in self._columns:
            pieces = [part[name] for part in parts]
            if isinstance(pieces[0], list):
                out[name] = [cell for piece in pieces for cell in piece]
            else:
                out[name] = torch.from_numpy(np.concatenate(pieces))
        return out

    def _load(self) -> tuple[Columns, int, Skipped | None]:
        """The group under way: its sound rows in the order of this epoch, and what of it is damaged."""
        group = self._groups[self._group]
        if self._loaded is None or self._loaded[0] != self._group:
            self._loaded = None  # before the next one is read: never two at once
            self._damage: Skipped | None = None
            try:
                with _open(group.path) as file:
                    table = file.read_row_group(group.number, columns=list(self._columns))
                columns, lacking = _sound_rows(table, self._columns)
                rows = table.num_rows - lacking
                if lacking:
                    self._damage = Skipped(str(group), f"{lacking} rows lack a value", lacking)
                if self._row_seed is not None:
                    columns = _shuffled(columns, rows, derived_seed(self._row_seed, str(group)))
            except _damage() as error:
                columns, rows = {}, 0
                self._damage = Skipped(str(group), f"cannot be read: {error}"[:300], group.rows)
            self._loaded = (self._group, columns, rows)
        return self._loaded[1], self._loaded[2], self._damage


def _sound_rows(table: Any, names: Sequence[str]) -> tuple[Columns, int]:
    """Columns without the rows that lack a value that cannot be NaN, and how many those are."""
    import pyarrow.types as types

    keep = np.ones(table.num_rows, dtype=bool)
    for name in names:
        column = table.column(name)
        if column.null_count and not types.is_floating(column.type):
            keep &= ~column.is_null().to_numpy()
    lacking = int((~keep).sum())
    if lacking:
        table = table.filter(keep)
    return {name: _values(table.column(name)) for name in names}, lacking


def _values(column: Any) -> NDArray[Any] | list[str]:
    import pyarrow.types as types

    kind = column.type
    if types.is_string(kind) or types.is_large_string(kind):
        return list(column.to_pylist())
    if types.is_fixed_size_list(kind):
        flat = column.combine_chunks().flatten()
        return np.array(flat.to_numpy(zero_copy_only=False)).reshape(len(column), kind.list_size)
    if types.is_temporal(kind):
        column = column.cast("int32" if kind.bit_width == 32 else "int64").cast("int64")
    return np.array(column.to_numpy())


def _shuffled(columns: Columns, rows: int, seed: int) -> Columns:
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).numpy()
    return {
        name: [values[i] for i in order] if isinstance(values, list) else values[order]
        for name, values in columns.items()
    }


def _check(path: Path, schema: Any, columns: Sequence[str]) -> None:
    import pyarrow.types as types

    missing = [name for name in columns if name not in schema.names]
    if missing or not columns:
        raise DataError(
            f"{path} has no column {', '.join(missing) or 'at all'}",
            f"some of {', '.join(schema.names)[:300]}",
        )
    for name in columns:
        kind = schema.field(name).type
        inner = kind.value_type if types.is_fixed_size_list(kind) else kind
        number = types.is_integer(inner) or types.is_floating(inner)
        plain = types.is_boolean(kind) or types.is_temporal(kind) or types.is_string(kind)
        if not (number or plain or types.is_large_string(kind)):
            raise DataError(
                f"{path}: column {name} is of the type {kind}",
                "numbers, booleans, times, text or fixed-size lists of numbers",
                "name the columns to read",
            )


def _files(files: str | Path | Sequence[str | Path]) -> list[Path]:
    given = list(files) if isinstance(files, (list, tuple)) else [files]
    found: list[Path] = []
    for path in (file_path("a file", one, error=DataError) for one in given):
        if path.is_dir():
            found += sorted(path.glob("*.parquet"))
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"no Parquet data at {path}", "a file or a folder of .parquet files")
    if not found:
        raise DataError(f"no .parquet file in {', '.join(map(str, given)) or 'an empty list'}", "one or more")
    return [path.resolve() for path in found]


def _open(path: Path) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            f"reading {path} needs pyarrow", "the extra `data`", "pip install 'obsinfra[data]'"
        ) from error
    # Checksums of pages are verified where the writer made them.
    return parquet.ParquetFile(path, page_checksum_verification=True)


def _damage() -> tuple[type[BaseException], ...]:
    """What pyarrow raises for a damaged file; all derive from OSError or ValueError but its own few."""
    try:
        import pyarrow
    except ImportError:
        return ()
    return (OSError, ValueError, pyarrow.ArrowException, MemoryError)
