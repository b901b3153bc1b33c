"""NumPy files and plain bytes as map-style data sets, memory-mapped: the kernel's page cache is the cache.

Mapped pages count as the process's resident memory, but the kernel takes them back when it needs them.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from obsinfra.errors import DataError
from obsinfra.optimization.arguments import file_path, whole_number
from obsinfra.optimization.datasets.row_numbers import places, row_numbers
from obsinfra.optimization.reclaim import resident_bytes
from obsinfra.optimization.reclaimable import DATASET_CACHE_ORDER, register_reclaimable


class MappedArrays(Dataset[Any]):
    """Rows along the first axis of `.npy` files.

    Args:
        files: one file, whose rows are tensors; or several by name, whose rows are dicts of tensors.

    Raises:
        DataError: a file is missing, no `.npy`, shorter than its header says, not numeric, or the files have
            different lengths.
    """

    def __init__(self, files: str | Path | Mapping[str, str | Path]) -> None:
        self._single = not isinstance(files, Mapping)
        named = files if isinstance(files, Mapping) else {"": files}
        self._paths = {
            name: file_path("a file", path, error=DataError).resolve() for name, path in named.items()
        }
        self._arrays = {name: _mapped_array(path) for name, path in self._paths.items()}
        lengths = {str(path): len(self._arrays[name]) for name, path in self._paths.items()}
        if not lengths or len(set(lengths.values())) > 1 or not min(lengths.values()):
            raise DataError(f"arrays of these lengths: {lengths}", "equal lengths, 1 or more")
        self._rows = next(iter(lengths.values()))
        names = ", ".join(path.name for path in self._paths.values())
        register_reclaimable(f"mapped pages of {names}", DATASET_CACHE_ORDER, self.release)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int | slice | Sequence[int]) -> Any:
        """One row, or those of a slice or a list of numbers, copied out of the file.

        Raises:
            DataError: an index that is no whole number.
        """
        place = places(index)
        row = {name: torch.from_numpy(np.array(array[place])) for name, array in self._arrays.items()}
        return row[""] if self._single else row

    def take(self, indices: Sequence[int]) -> Any:
        """Rows as one batch: a tensor [rows, …], or a dict of them.

        Raises:
            DataError: indices that are no whole numbers.
        """
        wanted = row_numbers(indices)
        rows = {name: torch.from_numpy(np.asarray(array[wanted])) for name, array in self._arrays.items()}
        return rows[""] if self._single else rows

    def release(self) -> int:
        """Let go of the pages this process has mapped; they are read again when wanted. Returns bytes."""
        return _release(self._arrays.values())

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self._paths[""] if self._single else self._paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["files"])  # type: ignore[misc]


class MappedBytes(Dataset[Tensor]):
    """Windows of a file's bytes: uint8 [window].

    Args:
        path: any file.
        window: bytes of a record.
        stride: bytes from one record's start to the next one's; None: `window`, so that none overlap.

    Raises:
        DataError: the file is missing, unreadable, or shorter than one window.
    """

    def __init__(self, path: str | Path, window: int, stride: int | None = None) -> None:
        whole_number("window", window, least=1, error=DataError)
        if stride is not None:
            whole_number("stride", stride, least=1, error=DataError)
        self.path, self.window, self.stride = (
            file_path("path", path, error=DataError).resolve(),
            window,
            stride or window,
        )
        try:
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise DataError(f"cannot map {path}: {reason}", "a file you may read") from error
        if len(self._bytes) < window:
            raise DataError(f"{path} has {len(self._bytes)} bytes", f"at least one window of {window}")
        self._windows = np.lib.stride_tricks.sliding_window_view(self._bytes, window)[:: self.stride]
        register_reclaimable(f"mapped pages of {self.path.name}", DATASET_CACHE_ORDER, self.release)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int | slice | Sequence[int]) -> Tensor:
        """One window, or those of a slice or a list of numbers.

        Raises:
            DataError: an index that is no whole number.
        """
        return torch.from_numpy(np.array(self._windows[places(index)]))

    def take(self, indices: Sequence[int]) -> Tensor:
        """Windows as one batch, uint8 [windows, window].

        Raises:
            DataError: indices that are no whole numbers.
        """
        return torch.from_numpy(np.asarray(self._windows[row_numbers(indices)]))

    def release(self) -> int:
        """Let go of the pages this process has mapped; they are read again when wanted. Returns bytes."""
        return _release([self._bytes])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "window": self.window, "stride": self.stride}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _mapped_array(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"cannot map {path}: {reason}", "a sound .npy file of numbers") from error
    if not isinstance(array, np.memmap) or array.ndim == 0:
        raise DataError(f"{path} holds no array with rows", "a .npy file of one or more dimensions")
    try:
        torch.from_numpy(np.zeros(1, array.dtype))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{path} has the type {array.dtype}", "numbers in the machine's byte order", "convert it once"
        ) from error
    return array


def _release(arrays: Any) -> int:
    before = resident_bytes()
    for array in arrays:
        mapping = getattr(array, "_mmap", None)
        if isinstance(mapping, mmap.mmap):
            with contextlib.suppress(OSError, ValueError):  # a locked page stays
                mapping.madvise(mmap.MADV_DONTNEED)
    return max(0, before - resident_bytes())
