"""Market bars: loading, validation, causal features and the split by date. Used by trading workloads.

Nothing here looks ahead: every feature of bar t is computed from bars up to t alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from obsinfra.errors import DataError
from obsinfra.workloads.bundled_files import bundled_file
from obsinfra.workloads.market_files import PRICE_COLUMNS, read_table, table_files

FEATURES = (
    "return",
    "gap",
    "range",
    "close_location",
    "momentum",
    "volatility",
    "volume",
)
TRAILING = 60
"""Bars of the trailing windows that features are normalised by; earlier bars have no features."""
SHORT = 20
CLIP = 5.0
MIN_BARS = 310
"""Fewest bars of an instrument: 80 % of them hold the features, a window of 60 and an episode of 128."""


@dataclass(frozen=True, slots=True)
class Instrument:
    """Bars of one instrument, validated.

    Attributes:
        name: for messages and reports.
        dates: datetime64[s], strictly increasing, [n].
        open, high, low, close: positive prices, adjusted for splits and dividends where known, float64 [n].
        volume: not negative, float64 [n].
        source: file or data set it came from.
    """

    name: str
    dates: NDArray[Any]
    open: NDArray[np.float64]
    high: NDArray[np.float64]
    low: NDArray[np.float64]
    close: NDArray[np.float64]
    volume: NDArray[np.float64]
    source: str

    def __len__(self) -> int:
        return len(self.dates)


def load_instruments(data_path: str | None) -> list[Instrument]:
    """All instruments at `data_path`, or S&P 500 and NASDAQ daily bars 1999–2018 from the package `arch`.

    Args:
        data_path: a CSV, Parquet or HDF5 file with columns date, open, high, low, close, volume, or a folder
            of such files, one per instrument.

    Raises:
        DataError: anything that keeps the data from being used; the message names file, row and fix.
    """
    if data_path is None:
        return _bundled()
    return [
        validated(path.stem, read_table(path), str(path))
        for path in table_files(Path(data_path).expanduser())
    ]


def _bundled() -> list[Instrument]:
    files = {
        name: bundled_file(
            "arch",
            f"data/{name}/{name}.csv.gz",
            what="the default market data is",
            otherwise=", or --data-path FILE with date, open, high, low, close, volume",
        )
        for name in ("sp500", "nasdaq")
    }
    import pandas

    instruments = []
    for name, path in files.items():
        frame = pandas.read_csv(path, parse_dates=["Date"])
        dates = frame.pop("Date").to_numpy().astype("datetime64[s]")
        table = {str(column).lower(): frame[column].to_numpy(dtype=np.float64) for column in frame.columns}
        instruments.append(validated(name, table | {"date": dates}, f"arch.data.{name}"))
    return instruments


def validated(name: str, table: dict[str, NDArray[Any]], source: str) -> Instrument:
    """Check the columns of one instrument and adjust its prices.

    Raises:
        DataError: NaN or infinite cells, unsorted or repeated dates, prices that are not positive, negative
            volume, high below low, or fewer than `MIN_BARS` bars.
    """
    dates = table["date"]

    def refuse(bad: NDArray[np.bool_], what: str, expected: str, fix: str) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            raise DataError(
                f"{source}: {what} in data row {row + 1} ({np.datetime_as_string(dates[row], unit='D')}), "
                f"{int(bad.sum())} such rows",
                expected,
                fix,
            )

    if len(dates) == 0:
        raise DataError(f"{source} has no rows", "one row per bar")
    if np.isnat(dates).any():
        row = int(np.argmax(np.isnat(dates)))
        raise DataError(f"{source}: no date in data row {row + 1}", "a date in every row")
    for column in (*PRICE_COLUMNS, "volume", *(["adj close"] if "adj close" in table else [])):
        refuse(
            ~np.isfinite(table[column]),
            f"{column} is missing, NaN or infinite",
            "a finite number in every cell",
            "drop or fill these rows",
        )
        if column != "volume":
            refuse(table[column] <= 0, f"{column} is not positive", "prices above zero", "correct these rows")
    refuse(table["volume"] < 0, "volume is negative", "0 or more", "correct these rows")
    refuse(table["high"] < table["low"], "high is below low", "high ≥ low", "correct these rows")
    backwards = np.concatenate([[False], dates[1:] <= dates[:-1]])
    refuse(
        backwards,
        "the date is not later than the one before",
        "dates strictly increasing, one instrument per file",
        "sort by date and drop duplicates",
    )
    if len(dates) < MIN_BARS:
        raise DataError(f"{source} has {len(dates)} bars", f"at least {MIN_BARS}", "give a longer history")
    scale = table["adj close"] / table["close"] if "adj close" in table else np.ones(len(dates))
    prices = {column: table[column] * scale for column in PRICE_COLUMNS}
    return Instrument(name=name, dates=dates, volume=table["volume"], source=source, **prices)


def causal_features(instrument: Instrument) -> NDArray[np.float32]:
    """Seven features per bar, each from this and earlier bars only.

    Returns:
        float32 [n, 7], clipped to ±5, in the order of `FEATURES`: log return, opening gap and 20-bar momentum
        in units of trailing volatility; high-low range over its trailing mean; close within the bar (−1 at
        the low, 1 at the high); short over long volatility, log; log volume as trailing z-score. The first
        `TRAILING` rows are zeros: there is not enough past to normalise by.
    """
    high, low, close = np.log(instrument.high), np.log(instrument.low), np.log(instrument.close)
    previous = np.concatenate([close[:1], close[:-1]])
    returns = close - previous
    spread = high - low
    volume = np.log1p(instrument.volume)
    tiny = 1e-8
    sigma = np.maximum(_trailing_rms(returns, TRAILING), tiny)
    sigma_short = np.maximum(_trailing_rms(returns, SHORT), tiny)
    volume_mean = _trailing_mean(volume, TRAILING)
    volume_rms = _trailing_rms(volume - volume_mean, TRAILING)
    middle = (high + low) / 2
    lagged = np.concatenate([np.full(SHORT, close[0]), close])[: len(close)]
    columns = (
        returns / sigma,
        (np.log(instrument.open) - previous) / sigma,
        spread / np.maximum(_trailing_mean(spread, TRAILING), tiny) - 1,
        np.where(spread > tiny, 2 * (close - middle) / np.maximum(spread, tiny), 0.0),
        (close - lagged) / (sigma * np.sqrt(SHORT)),
        np.log(sigma_short / sigma),
        (volume - volume_mean) / np.maximum(volume_rms, 1e-3),
    )
    features = np.stack([np.clip(column, -CLIP, CLIP) for column in columns], axis=1)
    features[:TRAILING] = 0.0
    return features.astype(np.float32)


def split_date(instruments: Sequence[Instrument], training_fraction: float = 0.8) -> np.datetime64:
    """First date of the validation period: the earlier `training_fraction` of all distinct dates trains.

    One date for all instruments, so that no instrument's training bars are another's validation future.
    """
    dates = np.unique(np.concatenate([instrument.dates for instrument in instruments]))
    found: np.datetime64 = dates[min(int(len(dates) * training_fraction), len(dates) - 1)]
    return found


def _trailing_mean(values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Mean of the last `length` values, of all there are at the start.

    By differences of one running sum: entry t of it is a function of entries up to t, bit for bit, so a
    change in the future cannot reach the past even through rounding. The first value is taken out to keep
    the sum small.
    """
    if len(values) == 0:
        return values
    total = np.concatenate([[0.0], np.cumsum(values - values[0])])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - length, 0)
    mean: NDArray[np.float64] = (total[ends] - total[starts]) / (ends - starts) + values[0]
    return mean


def _trailing_rms(values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Root mean square of the last `length` values."""
    rms: NDArray[np.float64] = np.sqrt(np.maximum(_trailing_mean(values * values, length), 0.0))
    return rms
