"""Rows along the first axis of HDF5 data sets, read chunk by chunk. Used through `hdf5_rows`.

HDF5's handles must not cross a fork, so each process opens the file for itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from obsinfra.errors import DataError
from obsinfra.optimization.arguments import file_path
from obsinfra.optimization.datasets.row_blocks import Block, BlockedRows

CONTIGUOUS_BLOCK_BYTES = 1 << 20
"""Read at a time where the file is not chunked."""


def hdf5_rows(
    path: str | Path, datasets: Sequence[str] | None = None, *, max_cache_bytes: int = 64 << 20
) -> BlockedRows:
    """The rows of an HDF5 file, by index.

    Args:
        path: the file.
        datasets: names of data sets of equal length, which become the columns; None: all at the root.
        max_cache_bytes: most bytes of chunks kept by each process.

    Returns:
        A map-style data set of dicts of tensors. Rows of a chunk that cannot be read are `CorruptRecord`s;
        that takes a compressed or checksummed (`fletcher32`) chunk: HDF5 reads others as they are.

    Raises:
        DataError: h5py is missing, the file is none or cut short, a data set is missing, empty, not numeric,
            or of another length.
    """
    return BlockedRows(_Hdf5Reader(file_path("path", path, error=DataError), datasets), max_cache_bytes)


class _Hdf5Reader:
    def __init__(self, path: Path, datasets: Sequence[str] | None) -> None:
        self.path = path.resolve()
        self.name = path.name
        self._opened: tuple[int, Any] | None = None
        file = self._file()
        import h5py

        found = [name for name, item in file.items() if isinstance(item, h5py.Dataset)]
        self.columns = list(datasets) if datasets is not None else found
        lengths: dict[str, int] = {}
        for name in self.columns:
            item = file.get(name)
            if not isinstance(item, h5py.Dataset):
                raise DataError(
                    f"{path} has no data set {name!r}",
                    f"one of {', '.join(found) or 'its own (none)'}",
                )
            if item.ndim == 0 or item.dtype.kind not in "biuf":
                raise DataError(
                    f"{path}: data set {name} has shape {item.shape} and type {item.dtype}",
                    "numbers, with rows along the first axis",
                    "name the data sets to read",
                )
            lengths[name] = item.shape[0]
        if not lengths or len(set(lengths.values())) > 1 or not min(lengths.values()):
            raise DataError(f"{path} has data sets of these lengths: {lengths}", "equal lengths, 1 or more")
        self.rows = next(iter(lengths.values()))
        self.rows_per_block = max(_block_rows(file[name]) for name in self.columns)

    def _file(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                import h5py
            except ImportError as error:
                raise DataError(
                    f"reading {self.path} needs h5py", "the extra `data`", "pip install 'obsinfra[data]'"
                ) from error
            try:
                self._opened = (os.getpid(), h5py.File(self.path, "r"))
            except OSError as error:
                raise DataError(f"cannot open {self.path}: {error}", "a sound HDF5 file") from error
        return self._opened[1]

    def read(self, first: int, stop: int) -> Block:
        try:
            file = self._file()
            columns = {name: np.asarray(file[name][first:stop]) for name in self.columns}
        # RuntimeError and KeyError are h5py's for damaged metadata.
        except (OSError, RuntimeError, KeyError, DataError) as error:
            return Block(all_damaged=f"chunk of rows {first} to {stop - 1} cannot be read: {error}"[:300])
        return Block({name: _native(values) for name, values in columns.items()})

    def where(self, row: int) -> str:
        return f"{self.path.name} row {row}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def _block_rows(item: Any) -> int:
    """Rows to read at once: whole chunks, so that none is decompressed twice for one block."""
    if item.chunks is not None:
        return int(item.chunks[0])
    row_bytes = max(1, item.dtype.itemsize * int(np.prod(item.shape[1:])))
    return int(max(1, min(item.shape[0], CONTIGUOUS_BLOCK_BYTES // row_bytes)))


def _native(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return values.astype(values.dtype.newbyteorder("="), copy=False)
