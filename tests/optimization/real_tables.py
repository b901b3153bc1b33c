"""The market data and digits that the tests of data sets write into files of each format."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
from numpy.typing import NDArray

PRICES = ("open", "high", "low", "close")


@cache
def sp500() -> dict[str, NDArray[Any]]:
    """5,031 days of the S&P 500: date as text, prices float32, volume int64."""
    from arch.data import sp500 as source

    table = source.load()
    columns: dict[str, NDArray[Any]] = {"date": table.index.strftime("%Y-%m-%d").to_numpy(dtype=str)}
    for name in PRICES:
        columns[name] = table[name.title()].to_numpy(dtype=np.float32)
    columns["volume"] = table["Volume"].to_numpy(dtype=np.int64)
    return columns


@cache
def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """1,797 images [8, 8] and labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images.reshape(-1, 8, 8).astype(np.float32), labels.astype(np.int64)


def write_csv(path: Path) -> Path:
    """Quoted dates, so that quotation marks are exercised."""
    table = sp500()
    lines = ["date,open,high,low,close,volume"]
    for row in range(len(table["date"])):
        prices = ",".join(repr(float(table[name][row])) for name in PRICES)
        lines.append(f'"{table["date"][row]}",{prices},{table["volume"][row]}')
    path.write_text("\n".join(lines) + "\n")
    return path


def write_parquet(path: Path, *, rows_per_group: int = 500, first: int = 0, stop: int | None = None) -> Path:
    """With checksums of its pages."""
    table = arrow.table({name: values[first:stop] for name, values in sp500().items()})
    parquet.write_table(table, path, row_group_size=rows_per_group, write_page_checksum=True)
    return path


def write_hdf5(path: Path, *, rows_per_chunk: int = 128) -> Path:
    """Digits, in chunks with checksums."""
    import h5py

    images, labels = digits()
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=images, chunks=(rows_per_chunk, 8, 8), fletcher32=True)
        file.create_dataset("label", data=labels, chunks=(rows_per_chunk,), fletcher32=True)
    return path


def flip_bytes(path: Path, offset: int, count: int = 16) -> None:
    """Damage that no size or date tells."""
    with path.open("r+b") as file:
        file.seek(offset)
        raw = file.read(count)
        file.seek(offset)
        file.write(bytes(byte ^ 0xFF for byte in raw))
