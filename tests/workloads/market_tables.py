"""The bundled bars as tables, and written as the files users bring."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet
from arch.data import nasdaq, sp500

from obsinfra.workloads.market_data import Instrument, load_instruments

Table = dict[str, Any]
"""Column name to values, in the order of the file."""


@cache
def bundled() -> tuple[Instrument, ...]:
    return tuple(load_instruments(None))


def frame(name: str = "sp500") -> pd.DataFrame:
    """Bars as `arch` has them, the date as a column."""
    result: pd.DataFrame = {"sp500": sp500, "nasdaq": nasdaq}[name].load().reset_index()
    return result


def table(name: str = "sp500", bars: int | None = None) -> Table:
    """Bars as text cells, exact to the last bit; dates in ISO 8601."""
    bars_frame = frame(name).iloc[:bars]
    columns: Table = {"Date": [day.date().isoformat() for day in bars_frame["Date"]]}
    for column in bars_frame.columns[1:]:
        columns[column] = [repr(float(value)) for value in bars_frame[column]]
    return columns


def write_csv(path: Path, columns: Mapping[str, Any]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def write_parquet(path: Path, columns: Mapping[str, Any]) -> Path:
    """Numbers as float64, dates as text."""
    parquet.write_table(pa.table({name: _values(values) for name, values in columns.items()}), path)
    return path


def write_hdf5(path: Path, columns: Mapping[str, Any]) -> Path:
    """One dataset per column: numbers as float64, dates as text."""
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            file[name] = _values(values)
    return path


def _values(values: list[str]) -> Any:
    try:
        return np.array([float(value) if value else np.nan for value in values])
    except ValueError:
        return list(values)


WRITERS = {".csv": write_csv, ".parquet": write_parquet, ".h5": write_hdf5}


def cut(instrument: Instrument, first: int, last: int) -> Instrument:
    """Bars `first` … `last` − 1 alone."""
    columns = {
        name: getattr(instrument, name)[first:last]
        for name in ("dates", "open", "high", "low", "close", "volume")
    }
    return Instrument(name=instrument.name, source=instrument.source, **columns)


def with_another_future(instrument: Instrument, first: int, seed: int) -> Instrument:
    """The same bars up to `first` − 1, and a market gone mad from `first` on."""
    draw = np.random.default_rng(seed)
    count = len(instrument) - first
    factor = np.exp(np.cumsum(draw.normal(0, 0.3, count)))
    columns = {}
    for name in ("open", "high", "low", "close"):
        columns[name] = np.concatenate([getattr(instrument, name)[:first], instrument.close[first:] * factor])
    columns["high"][first:] *= 1 + draw.uniform(0, 1, count)
    columns["low"][first:] *= draw.uniform(0.1, 1, count)
    volume = np.concatenate([instrument.volume[:first], 10 ** draw.uniform(0, 12, count)])
    return Instrument(
        name=instrument.name, dates=instrument.dates, volume=volume, source=instrument.source, **columns
    )
