"""Rows of a file that is read block by block, as a map-style data set over a bounded cache.

HDF5 and CSV are such files: their modules give a `BlockReader`. A block's damaged rows do not stop others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from obsinfra.optimization.datasets.block_cache import BlockCache, CacheUse
from obsinfra.optimization.datasets.row_numbers import row_number, row_numbers
from obsinfra.optimization.datasets.skipping import CorruptRecord

Column = NDArray[Any] | list[str]
"""Values of consecutive rows: numbers [rows, …], or text."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows.

    Attributes:
        columns: by name; what stands at damaged rows means nothing.
        damaged: reason by row within the block.
        all_damaged: why no row of it can be read; `columns` is empty then.
    """

    columns: Mapping[str, Column] = field(default_factory=dict)
    damaged: Mapping[int, str] = field(default_factory=dict)
    all_damaged: str = ""

    def bytes(self) -> int:
        """Memory held, as good as it can be told: text by its characters and Python's usual overhead."""
        return sum(
            column.nbytes if isinstance(column, np.ndarray) else sum(57 + len(cell) for cell in column)
            for column in self.columns.values()
        )


class BlockReader(Protocol):
    """A file of `rows` rows, `rows_per_block` read at a time."""

    name: str
    rows: int
    rows_per_block: int

    def read(self, first: int, stop: int) -> Block:
        """Rows `first` to `stop`; damage is told in the block, never raised."""
        ...

    def where(self, row: int) -> str:
        """The row, for people."""
        ...


class BlockedRows(Dataset[dict[str, Any]]):
    """Rows by index: a dict of tensors, and of text where a column is text.

    Args:
        reader: of the file.
        max_cache_bytes: most bytes of blocks kept by each process.

    Attributes:
        cache: the blocks kept.
    """

    def __init__(self, reader: BlockReader, max_cache_bytes: int) -> None:
        self.reader = reader
        self.cache: BlockCache[Block] = BlockCache(reader.name, max_cache_bytes, Block.bytes)

    def __len__(self) -> int:
        return self.reader.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row.

        Raises:
            CorruptRecord: it is damaged.
            IndexError: there is no such row.
            DataError: an index that is no whole number.
        """
        return {name: values[0] for name, values in self.take([row_number(index)]).items()}

    def take(self, indices: Sequence[int]) -> dict[str, Any]:
        """Rows as one batch: per column a tensor [rows, …], or a list of text, in the order asked for.

        Raises:
            CorruptRecord: one of them is damaged.
            IndexError: there is no such row.
            DataError: indices that are no whole numbers.
        """
        wanted = row_numbers(indices)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"row {wanted.min()} … {wanted.max()} of {len(self)}")
        per_block = self.reader.rows_per_block
        blocks, offsets = np.divmod(wanted, per_block)
        out: dict[str, Any] = {}
        for number in dict.fromkeys(blocks.tolist()):
            block = self._block(number)
            places = np.flatnonzero(blocks == number)
            inside = offsets[places]
            if block.all_damaged or block.damaged:
                for offset in inside.tolist():
                    if reason := block.all_damaged or block.damaged.get(offset, ""):
                        raise CorruptRecord(self.reader.where(number * per_block + offset), reason)
            for name, values in block.columns.items():
                if isinstance(values, np.ndarray):
                    if name not in out:
                        out[name] = np.empty((len(wanted), *values.shape[1:]), dtype=values.dtype)
                    out[name][places] = values[inside]
                else:
                    into = out.setdefault(name, [""] * len(wanted))
                    for place, offset in zip(places.tolist(), inside.tolist(), strict=True):
                        into[place] = values[offset]
        return {
            name: torch.from_numpy(values) if isinstance(values, np.ndarray) else values
            for name, values in out.items()
        }

    def _block(self, number: int) -> Block:
        first = number * self.reader.rows_per_block
        stop = min(first + self.reader.rows_per_block, self.reader.rows)
        return self.cache.get(number, lambda: self.reader.read(first, stop))

    def cache_use(self) -> CacheUse:
        """What the cache did, in all processes."""
        return self.cache.use()

    def forget(self) -> None:
        """Empty this process's cache, whose budget stays."""
        self.cache.clear()

    def workers_ended(self) -> None:
        """Told by the data loader."""
        self.cache.workers_ended()
