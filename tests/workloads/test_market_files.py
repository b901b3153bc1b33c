"""Bars from files are the bars that were written, and whatever else is in a file is one clear DataError."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from market_tables import WRITERS, Table, bundled, frame, table, write_csv

from obsinfra.errors import DataError
from obsinfra.workloads.market_data import MIN_BARS, Instrument, load_instruments
from obsinfra.workloads.tactical_mappo import create_workload

COLUMNS = ("dates", "open", "high", "low", "close", "volume")
BARS = 400


def assert_same_bars(found: Instrument, expected: Instrument) -> None:
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(found, column), getattr(expected, column), err_msg=column)
        assert getattr(found, column).dtype == getattr(expected, column).dtype, column


def refused(path: Path) -> DataError:
    """The one error that loading `path` gives: one printable line of moderate length that names the file."""
    with pytest.raises(DataError) as caught:
        load_instruments(str(path))
    message = str(caught.value)
    assert path.name in message and caught.value.expected
    assert message.isprintable() and len(message) < 1000
    return caught.value


@pytest.mark.parametrize("ending", WRITERS)
def test_the_bundled_bars_survive_every_format(tmp_path: Path, ending: str) -> None:
    """A folder with one file per instrument; prices are adjusted as the bundled ones are."""
    for name in ("sp500", "nasdaq"):
        WRITERS[ending](tmp_path / f"{name}{ending}", table(name))
    found = load_instruments(str(tmp_path))
    assert [instrument.name for instrument in found] == ["nasdaq", "sp500"]
    for instrument, expected in zip(found, reversed(bundled()), strict=True):
        assert_same_bars(instrument, expected)
        assert instrument.source == str(tmp_path / f"{instrument.name}{ending}")


def pandas_csv(path: Path, bars: pd.DataFrame) -> None:
    bars.set_index("Date").to_csv(path)


def pandas_parquet(path: Path, bars: pd.DataFrame) -> None:
    bars.set_index("Date").to_parquet(path)


def pandas_parquet_unnamed_index(path: Path, bars: pd.DataFrame) -> None:
    bars.set_index(pd.DatetimeIndex(bars["Date"], name=None)).drop(columns="Date").to_parquet(path)


def pandas_parquet_new_york(path: Path, bars: pd.DataFrame) -> None:
    bars.assign(Date=bars["Date"].dt.tz_localize("UTC").dt.tz_convert("America/New_York")).to_parquet(path)


def compound_hdf5(path: Path, bars: pd.DataFrame) -> None:
    seconds = bars.assign(Date=bars["Date"].astype("datetime64[s]").astype("int64"))
    with h5py.File(path, "w") as file:
        file["bars"] = seconds.to_records(index=False)


def upper_case_with_spaces(path: Path, bars: pd.DataFrame) -> None:
    bars[reversed(list(bars.columns))].rename(columns=lambda name: f" {name.upper()}").to_csv(
        path, index=False
    )


def excel_csv(path: Path, bars: pd.DataFrame) -> None:
    bars.to_csv(path, index=False, encoding="utf-8-sig", lineterminator="\r\n")


def further_columns(path: Path, bars: pd.DataFrame) -> None:
    bars.assign(symbol="SPX", dividends=0.0).to_csv(path, index=False)


@pytest.mark.parametrize(
    ("write", "ending"),
    [
        (pandas_csv, ".csv"),
        (pandas_parquet, ".parquet"),
        (pandas_parquet_unnamed_index, ".parquet"),
        (pandas_parquet_new_york, ".parquet"),
        (compound_hdf5, ".hdf5"),
        (upper_case_with_spaces, ".CSV"),
        (excel_csv, ".csv"),
        (further_columns, ".csv"),
    ],
)
def test_files_as_common_tools_write_them(
    tmp_path: Path, write: Callable[[Path, pd.DataFrame], None], ending: str
) -> None:
    path = tmp_path / f"sp500{ending}"
    write(path, frame())
    (found,) = load_instruments(str(path))
    assert_same_bars(found, bundled()[0])


@pytest.mark.parametrize(
    "spell",
    [
        lambda day: day.strftime("%Y%m%d"),
        lambda day: day.strftime("%Y-%m-%dT%H:%M:%S"),
        lambda day: day.strftime("%Y-%m-%dT00:00:00Z"),
        lambda day: day.strftime("%Y-%m-%dT02:00:00+02:00"),
        lambda day: str(int(day.timestamp())),
        lambda day: str(int(day.timestamp()) * 1000),
        lambda day: str(int(day.timestamp()) * 10**6),
        lambda day: str(int(day.timestamp()) * 10**9),
    ],
    ids=["YYYYMMDD", "iso", "utc", "offset", "seconds", "milliseconds", "microseconds", "nanoseconds"],
)
def test_dates_in_every_spelling(tmp_path: Path, spell: Callable[[pd.Timestamp], str]) -> None:
    columns = table(bars=BARS)
    columns["Date"] = [spell(day) for day in frame()["Date"][:BARS]]
    (found,) = load_instruments(str(write_csv(tmp_path / "bars.csv", columns)))
    np.testing.assert_array_equal(found.dates, bundled()[0].dates[:BARS])


def test_prices_are_adjusted_for_dividends(tmp_path: Path) -> None:
    """All four prices by the ratio of the adjusted close, so that the bar keeps its shape."""
    columns = table(bars=BARS)
    raw = {name: np.array(columns[name], dtype=float) for name in ("Open", "High", "Low", "Close")}
    columns["Adj Close"] = [str(value / 2) for value in raw["Close"]]
    (found,) = load_instruments(str(write_csv(tmp_path / "bars.csv", columns)))
    for name, values in raw.items():
        np.testing.assert_array_equal(getattr(found, name.lower()), values / 2)
    del columns["Adj Close"]
    (found,) = load_instruments(str(write_csv(tmp_path / "bars.csv", columns)))
    np.testing.assert_array_equal(found.close, raw["Close"])


def set_cell(column: str, row: int, value: str) -> Callable[[Table], None]:
    """Data row `row`, counted from 1."""

    def change(columns: Table) -> None:
        columns[column][row - 1] = value

    return change


def swap_dates(columns: Table) -> None:
    dates = columns["Date"]
    dates[199], dates[200] = dates[200], dates[199]


def swap_high_and_low(columns: Table) -> None:
    high, low = columns["High"], columns["Low"]
    high[49], low[49] = low[49], high[49]


def too_short(columns: Table) -> None:
    for values in columns.values():
        del values[MIN_BARS - 1 :]


def no_rows(columns: Table) -> None:
    for values in columns.values():
        values.clear()


def without(column: str) -> Callable[[Table], None]:
    def change(columns: Table) -> None:
        del columns[column]

    return change


DAMAGE: dict[str, tuple[Callable[[Table], None], str]] = {
    "no volume": (without("Volume"), "has no column volume"),
    "no date": (without("Date"), "has no column date"),
    "a NaN": (set_cell("Close", 7, "nan"), "close is missing, NaN or infinite in data row 7 (1999-01-12)"),
    "an empty cell": (set_cell("Volume", 7, ""), "volume is missing, NaN or infinite in data row 7"),
    "an infinite price": (set_cell("High", 7, "inf"), "high is missing, NaN or infinite in data row 7"),
    "no adjusted close": (
        set_cell("Adj Close", 7, "nan"),
        "adj close is missing, NaN or infinite in data row 7",
    ),
    "a zero price": (set_cell("Open", 9, "0.0"), "open is not positive in data row 9"),
    "a negative price": (set_cell("Low", 9, "-1.0"), "low is not positive in data row 9"),
    "negative volume": (set_cell("Volume", 9, "-1.0"), "volume is negative in data row 9"),
    "high below low": (swap_high_and_low, "high is below low in data row 50"),
    "unsorted dates": (swap_dates, "the date is not later than the one before in data row 201"),
    "a duplicate": (
        set_cell("Date", 2, "1999-01-04"),
        "the date is not later than the one before in data row 2",
    ),
    "too short": (too_short, f"has {MIN_BARS - 1} bars; expected at least {MIN_BARS}"),
    "no rows": (no_rows, "has no rows"),
}


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_malformed_bars_are_named_with_their_row(tmp_path: Path, damage: str, ending: str) -> None:
    change, said = DAMAGE[damage]
    columns = table(bars=BARS)
    change(columns)
    error = refused(WRITERS[ending](tmp_path / f"bars{ending}", columns))
    assert said in str(error)
    assert error.fix or damage == "no rows"


@pytest.mark.parametrize("cell", ["n/a", "1,234.5", "12.3.4", "x" * 100_000])
def test_a_cell_that_is_no_number_is_quoted(tmp_path: Path, cell: str) -> None:
    columns = table(bars=BARS)
    columns["High"][2] = cell
    assert f"high of data row 3 is '{cell[:50]}" in str(refused(write_csv(tmp_path / "bars.csv", columns)))


@pytest.mark.parametrize("cell", ["", "yesterday", "31.12.2018", "2018-13-01", "nan", "9" * 5000])
def test_a_date_that_is_none_is_quoted(tmp_path: Path, cell: str) -> None:
    columns = table(bars=BARS)
    columns["Date"][2] = cell
    error = refused(write_csv(tmp_path / "bars.csv", columns))
    assert f"date of data row 3 is '{cell[:50]}" in str(error) and "ISO 8601" in error.expected


def test_a_missing_date_in_a_parquet_column_of_timestamps_is_found(tmp_path: Path) -> None:
    bars = frame().iloc[:BARS].copy()
    bars.loc[4, "Date"] = pd.NaT
    bars.to_parquet(tmp_path / "bars.parquet")
    assert "no date in data row 5" in str(refused(tmp_path / "bars.parquet"))


def test_a_row_of_another_length_is_named_with_its_line(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "bars.csv", table(bars=BARS))
    path.write_text(path.read_text() + "2018-12-31,1,2\n")
    error = refused(path)
    assert f"line {BARS + 2} has 3 cells" in str(error) and "7" in error.expected


@pytest.mark.parametrize("ending", [*WRITERS, ".hdf5"])
@pytest.mark.parametrize("content", ["empty", "zeros", "noise", "text"])
def test_what_is_no_table_at_all_is_refused(tmp_path: Path, ending: str, content: str) -> None:
    """Megabytes of it, without a line end; the message stays one short line."""
    noise = random.Random(0).randbytes(4 * 2**20)
    path = tmp_path / f"bars{ending}"
    path.write_bytes(
        {"empty": b"", "zeros": bytes(4 * 2**20), "noise": noise, "text": b"a,b" * 10**6}[content]
    )
    refused(path)


def test_a_header_of_control_characters_does_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "bars.csv"
    path.write_bytes(b"\x1b[31mred\x1b[0m,\x07,\x00\n1,2,3\n")
    assert "has no column date, open" in str(refused(path))


@pytest.mark.parametrize("ending", WRITERS)
def test_whatever_happens_to_a_file_the_answer_is_bars_or_one_data_error(tmp_path: Path, ending: str) -> None:
    """Cut off or with bytes overwritten, at its start, its end or anywhere."""
    sound = WRITERS[ending](tmp_path / f"sound{ending}", table(bars=BARS)).read_bytes()
    path, draw, failures = tmp_path / f"bars{ending}", random.Random(7), 0
    for _ in range(150):
        damaged = bytearray(sound)
        first, last = draw.choice([(0, len(sound)), (0, 3000), (len(sound) - 1500, len(sound))])
        if draw.random() < 0.25:
            del damaged[draw.randrange(first, last) :]
        for _ in range(draw.randrange(20)):
            place = draw.randrange(first, last)
            if place < len(damaged):
                damaged[place] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            load_instruments(str(path))
        except DataError as error:
            failures += 1
            assert path.name in str(error) and str(error).isprintable() and len(str(error)) < 1000
    assert failures > 50


def hdf5(path: Path, **datasets: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
    return path


def test_other_layouts_of_hdf5_are_refused(tmp_path: Path) -> None:
    """No dataset, a group instead of one, columns of two dimensions, scalars, and pandas' own layout."""
    assert "nothing at its root" in str(refused(hdf5(tmp_path / "none.h5")))
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("bars")
    assert "holds bars at its root" in str(refused(tmp_path / "group.h5"))
    assert "shape (5, 2)" in str(refused(hdf5(tmp_path / "matrix.h5", close=np.ones((5, 2)))))
    assert "shape ()" in str(refused(hdf5(tmp_path / "scalar.h5", close=1.0)))
    record = np.zeros((), dtype=[("close", "f8")])
    assert "shape ()" in str(refused(hdf5(tmp_path / "record.h5", bars=record)))
    fields = [("date", "i8"), *((name, "f8", 2) for name in ("open", "high", "low", "close", "volume"))]
    assert "open has shape (5, 2)" in str(refused(hdf5(tmp_path / "wide.h5", bars=np.ones(5, dtype=fields))))
    uneven = {name: np.ones(5) for name in ("date", "open", "high", "low", "close")}
    assert "different lengths" in str(refused(hdf5(tmp_path / "uneven.h5", **uneven, volume=np.ones(4))))
    uneven |= {"volume": np.ones(5), "adj_close": np.ones(4)}
    assert "different lengths" in str(refused(hdf5(tmp_path / "adjusted.h5", **uneven)))


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    error = refused(tmp_path / "absent.csv")
    assert "no market data at" in error.wrong and "--data-path" in error.fix


def test_a_folder_without_bars(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not bars")
    assert "holds no market data" in str(refused(tmp_path))


def test_a_file_of_unknown_type(tmp_path: Path) -> None:
    path = tmp_path / "bars.xlsx"
    path.write_bytes(b"PK")
    error = refused(path)
    assert "'.xlsx'" in error.wrong and ".parquet" in error.expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_one_may_not_read(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "bars.csv", table(bars=BARS))
    path.chmod(0)
    assert "Permission denied" in str(refused(path))


def test_a_folder_that_is_named_like_a_file_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "trap.csv").mkdir()
    write_csv(tmp_path / "bars.csv", table(bars=BARS))
    assert [instrument.name for instrument in load_instruments(str(tmp_path))] == ["bars"]


@pytest.mark.parametrize("ending", WRITERS)
def test_the_fewest_bars_that_are_accepted_suffice_to_train(tmp_path: Path, ending: str) -> None:
    path = WRITERS[ending](tmp_path / f"bars{ending}", table(bars=MIN_BARS))
    workload = create_workload(data_path=str(path), model_size=None, seed=0)
    assert workload.describe_data()["instruments"][0]["bars"] == MIN_BARS


def test_one_bad_file_in_a_folder_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "good.csv", table(bars=BARS))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"torn\.parquet"):
        load_instruments(str(tmp_path))
