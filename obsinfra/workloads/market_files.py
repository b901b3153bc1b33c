"""Reads OHLCV tables from CSV, Parquet and HDF5 files into plain columns. Used by market_data alone.

Knows file formats and column names; whether the numbers make sense is judged by market_data.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from obsinfra.errors import DataError

PRICE_COLUMNS = ("open", "high", "low", "close")
COLUMNS = (*PRICE_COLUMNS, "volume")
DATE_COLUMNS = ("date", "datetime", "timestamp", "time")
ADJUSTED_COLUMNS = ("adj close", "adj_close", "adjusted close", "adjusted_close", "adjclose")
_EXPECTED = "columns date, open, high, low, close, volume (any case, any order; adj close is used if there)"
_EXAMPLES = "pip install 'obsinfra[examples]'"


def table_files(path: Path) -> list[Path]:
    """The OHLCV files at `path`: itself, or every known file directly in that folder, sorted by name.

    Raises:
        DataError: it does not exist, is of an unknown type, or holds no such file.
    """
    kinds = ", ".join(_READERS)
    if not path.exists():
        raise DataError(
            f"no market data at {path}", f"a {kinds} file or a folder of them", "check --data-path"
        )
    if path.is_dir():
        try:
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in _READERS and p.is_file())
        except OSError as error:
            raise DataError(f"cannot list {path}: {error.strerror}", "a folder you may read") from error
        if not found:
            raise DataError(f"folder {path} holds no market data", f"at least one {kinds} file")
        return found
    if path.suffix.lower() not in _READERS:
        raise DataError(f"market data file {path} ends in {path.suffix!r}", f"one of {kinds}")
    return [path]


def read_table(path: Path) -> dict[str, NDArray[Any]]:
    """Columns of one file by canonical lower-case name.

    Returns:
        `date` as datetime64[s] and open, high, low, close, volume, and `adj close` where present, as
        float64, all of equal length.

    Raises:
        DataError: unreadable, a column is missing or not numeric, or dates cannot be understood.
    """
    try:
        raw = _READERS[path.suffix.lower()](path)
    except DataError:
        raise
    # RuntimeError is h5py's for a damaged file, MemoryError what a damaged length in one leads to.
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(
            f"cannot read {path}: {_short(reason) or type(error).__name__}",
            f"a sound {path.suffix.lower()} file with {_EXPECTED}",
        ) from error
    return _canonical(raw, path)


def _short(text: str) -> str:
    """One line that fits a terminal, whatever was in the file."""
    line = "".join(character if character.isprintable() else "\ufffd" for character in text[:200])
    return line if len(text) <= 200 else f"{line}…"


def _canonical(raw: Mapping[str, Any], path: Path) -> dict[str, NDArray[Any]]:
    by_name: dict[str, Any] = {}
    for name, values in raw.items():
        by_name.setdefault(str(name).strip().strip("\ufeff").lower(), values)
    date_name = next((name for name in DATE_COLUMNS if name in by_name), None)
    missing = [name for name in COLUMNS if name not in by_name]
    if date_name is None:
        missing.insert(0, "date")
    if missing:
        found = _short(", ".join(map(str, raw)))
        raise DataError(
            f"{path} has no column {', '.join(missing)} (found: {found or 'none'})",
            _EXPECTED,
            "rename the columns",
        )
    adjusted = next((name for name in ADJUSTED_COLUMNS if name in by_name), None)
    used = (str(date_name), *COLUMNS, *([adjusted] if adjusted else []))
    lengths = {name: len(by_name[name]) for name in used}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{path} has columns of different lengths: {lengths}", "equally long columns")
    if not lengths["close"]:
        raise DataError(f"{path} has no rows", "one row per bar")
    table: dict[str, NDArray[Any]] = {"date": _dates(by_name[str(date_name)], path)}
    for name in COLUMNS:
        table[name] = _numbers(by_name[name], name, path)
    if adjusted is not None:
        table["adj close"] = _numbers(by_name[adjusted], adjusted, path)
    return table


def _numbers(values: Any, name: str, path: Path) -> NDArray[np.float64]:
    """A column as float64. Empty cells become NaN, which market_data reports with its row."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise DataError(f"{path}: {name} has shape {array.shape}", "one number per row")
    if array.dtype.kind in "fiu":
        return np.ascontiguousarray(array, dtype=np.float64)
    result = np.empty(len(array), dtype=np.float64)
    for row, cell in enumerate(array.tolist()):
        text = cell.decode("utf-8", "replace") if isinstance(cell, bytes) else cell
        if text is None or (isinstance(text, str) and not text.strip()):
            result[row] = np.nan
            continue
        try:
            result[row] = float(text)
        except (TypeError, ValueError):
            raise DataError(
                f"{path}: {name} of data row {row + 1} is {_short(repr(text))}",
                "a number with a decimal point",
            ) from None
    return result


def _dates(values: Any, path: Path) -> NDArray[Any]:
    """Dates as datetime64[s]: ISO 8601 text, datetime64, YYYYMMDD, or a Unix time in s, ms, µs or ns."""
    array = np.asarray(values)
    if array.dtype.kind == "M":
        return array.astype("datetime64[s]")
    cells = array.tolist()
    result = np.empty(len(cells), dtype="datetime64[s]")
    for row, cell in enumerate(cells):
        try:
            result[row] = _date(cell)
        except (TypeError, ValueError, OverflowError):
            raise DataError(
                f"{path}: date of data row {row + 1} is {_short(repr(cell))}",
                "ISO 8601 such as 2018-12-31 or 2018-12-31T16:00:00, YYYYMMDD, or a Unix time",
            ) from None
    return result


def _date(cell: Any) -> np.datetime64:
    text = cell.decode() if isinstance(cell, bytes) else cell
    if isinstance(text, str):
        # fromisoformat would take some numbers of 15 digits for a day in the year 9338.
        if not text.strip().lstrip("-").isdecimal():
            return _utc(datetime.fromisoformat(text.strip()))
        text = int(text)
    if isinstance(text, datetime):
        return _utc(text)
    if isinstance(text, date):
        return np.datetime64(text, "s")
    if isinstance(text, bool):
        raise ValueError("no date")
    number = int(text)
    if 18_000_000 <= number <= 29_991_231:
        return _utc(datetime.fromisoformat(str(number)))
    # Magnitude tells the unit: 1e11 s is the year 5138, 1e11 ms is 1973.
    for limit, per_second in ((10**11, 1), (10**14, 10**3), (10**17, 10**6), (10**20, 10**9)):
        if abs(number) < limit:
            return np.datetime64(number // per_second, "s")
    raise ValueError("beyond any unit")


def _utc(moment: datetime) -> np.datetime64:
    """Times with a zone as UTC, so that a change to winter time does not look like unsorted rows."""
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC).replace(tzinfo=None)
    return np.datetime64(moment, "s")


def _read_csv(path: Path) -> dict[str, list[str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        header = next(rows, None)
        if header is None:
            raise DataError(f"{path} is empty", _EXPECTED)
        columns: list[list[str]] = [[] for _ in header]
        for number, row in enumerate(rows, start=2):
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path} line {number} has {len(row)} cells", f"{len(header)} as in the header"
                )
            for column, cell in zip(columns, row, strict=True):
                column.append(cell)
    return dict(zip(header, columns, strict=True))


def _read_parquet(path: Path) -> dict[str, Any]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow", "the extra `examples`", _EXAMPLES) from error
    # ArrowException derives from ValueError or OSError in every case that reading raises.
    table = parquet.ParquetFile(path).read()
    names = table.column_names
    renamed = [name if name != "__index_level_0__" else "date" for name in names]
    return {name: column.to_numpy() for name, column in zip(renamed, table.columns, strict=True)}


def _read_hdf5(path: Path) -> dict[str, Any]:
    try:
        import h5py
    except ImportError as error:
        raise DataError(f"reading {path} needs h5py", "the extra `examples`", _EXAMPLES) from error
    with h5py.File(path, "r") as file:
        datasets = {name: item for name, item in file.items() if isinstance(item, h5py.Dataset)}
        compound = [item for item in datasets.values() if item.dtype.names]
        if not datasets or (compound and len(datasets) > 1):
            raise DataError(
                f"{path} holds {_short(', '.join(file)) or 'nothing'} at its root",
                "one dataset per column, or one compound dataset (pandas' own HDF5 layout is not read)",
            )
        for name, item in datasets.items():
            if item.ndim != 1:
                raise DataError(f"{path}: dataset {name} has shape {item.shape}", "one dimension")
        if compound:
            return {name: compound[0][name] for name in compound[0].dtype.names}
        return {name: item[()] for name, item in datasets.items()}


_READERS: dict[str, Callable[[Path], Mapping[str, Iterable[Any]]]] = {
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
}
