"""Data sets in files: every format gives back the real data, bounded in memory, past damage."""

from __future__ import annotations

import builtins
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tables import PRICES, digits, flip_bytes, sp500, write_csv, write_hdf5, write_parquet

from obsinfra.errors import DataError
from obsinfra.optimization.datasets import (
    CorruptRecord,
    MappedArrays,
    MappedBytes,
    ParquetRows,
    Skipped,
    csv_rows,
    hdf5_rows,
)
from obsinfra.optimization.datasets.block_cache import BlockCache
from obsinfra.optimization.reclaimable import reclaimables

MIXED = [1796, 0, 700, 3, 700, 1795, 129, 128]


def mapped_digits(folder: Path) -> MappedArrays:
    images, labels = digits()
    np.save(folder / "image.npy", images)
    np.save(folder / "label.npy", labels)
    return MappedArrays({"image": folder / "image.npy", "label": folder / "label.npy"})


@pytest.mark.parametrize("form", ["mapped", "hdf5", "hdf5 pickled"])
def test_rows_by_index_are_those_of_the_file(tmp_path: Path, form: str) -> None:
    data: Any = mapped_digits(tmp_path) if form == "mapped" else hdf5_rows(write_hdf5(tmp_path / "d.h5"))
    if form.endswith("pickled"):  # as a spawned worker gets it
        data = pickle.loads(pickle.dumps(data))
    images, labels = digits()
    assert len(data) == 1797
    batch = data.take(MIXED)
    assert torch.equal(batch["image"], torch.from_numpy(images[MIXED]))
    assert torch.equal(batch["label"], torch.from_numpy(labels[MIXED]))
    assert torch.equal(data[700]["image"], torch.from_numpy(images[700]))
    with pytest.raises(IndexError):
        data.take([1797])


def test_csv_rows_are_those_of_the_file_with_types_as_asked(tmp_path: Path) -> None:
    kinds = {"date": str, "close": float, "volume": int}
    data = csv_rows(write_csv(tmp_path / "sp500.csv"), kinds)
    table = sp500()
    assert len(data) == 5031
    rows = [5030, 0, 256, 255, 2000]
    batch = data.take(rows)
    assert batch["date"] == table["date"][rows].tolist()
    assert torch.equal(batch["close"], torch.from_numpy(table["close"][rows]))
    assert torch.equal(batch["volume"], torch.from_numpy(table["volume"][rows]))
    assert data[7]["date"] == "1999-01-13"


def test_bytes_are_windows_of_real_source_text(tmp_path: Path) -> None:
    source = Path(argparse_source())
    text = source.read_bytes()
    data = MappedBytes(source, window=65, stride=64)
    assert len(data) == (len(text) - 65) // 64 + 1
    assert bytes(data[10].tolist()) == text[640:705]
    assert [bytes(row.tolist()) for row in data.take([3, 0])] == [text[192:257], text[:65]]
    assert data.release() >= 0
    assert bytes(data[10].tolist()) == text[640:705]


def argparse_source() -> str:
    import argparse

    return argparse.__file__


def streamed(data: ParquetRows, batch_size: int, **options: Any) -> tuple[list[Any], list[Skipped]]:
    batches: list[Any] = []
    skipped: list[Skipped] = []
    for item in data.batches(batch_size, **options):
        (skipped if isinstance(item, Skipped) else batches).append(item)
    return batches, skipped


@pytest.mark.parametrize("batch_size", [64, 499, 1300])
def test_parquet_streams_every_row_once_in_full_batches(tmp_path: Path, batch_size: int) -> None:
    for part, (first, stop) in enumerate([(0, 1234), (1234, None)]):
        write_parquet(tmp_path / f"{part}.parquet", first=first, stop=stop)
    plain, _ = streamed(ParquetRows(tmp_path), batch_size)
    assert [len(batch["close"]) for batch in plain[:-1]] == [batch_size] * (5031 // batch_size)
    assert torch.equal(torch.cat([b["close"] for b in plain]), torch.from_numpy(sp500()["close"]))
    assert [date for batch in plain for date in batch["date"]] == sp500()["date"].tolist()

    data = ParquetRows(tmp_path, ["volume", "date"], shuffle=True, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        batches, _ = streamed(data, batch_size)
        orders.append([date for batch in batches for date in batch["date"]])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(sp500()["date"].tolist())
    dropped, _ = streamed(data, batch_size, drop_last=True)
    assert {len(batch["volume"]) for batch in dropped} == {batch_size}


@settings(max_examples=25, deadline=None)
@given(batch_size=st.integers(1, 700), taken=st.integers(0, 60), damaged=st.booleans())
def test_a_parquet_stream_goes_on_from_any_position(
    tmp_path_factory: pytest.TempPathFactory, batch_size: int, taken: int, damaged: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / f"stream-{damaged}.parquet"
    if not path.exists():
        write_parquet(path, rows_per_group=300, stop=2000)
        if damaged:
            damage_group(path, 2)
    data = ParquetRows(path, ["close", "volume"], shuffle=True, seed=1)
    whole = list(data.batches(batch_size))
    begun = data.batches(batch_size)
    head = [next(begun) for _ in range(min(taken, len(whole)))]
    resumed = data.batches(batch_size)
    resumed.load_state_dict(begun.state_dict())
    tail = list(resumed)
    assert len(head) + len(tail) == len(whole)
    for expected, got in zip(whole, [*head, *tail], strict=True):
        if isinstance(expected, Skipped):
            assert got == expected
        else:
            assert torch.equal(expected["close"], got["close"])


def damage_group(path: Path, group: int) -> None:
    import pyarrow.parquet as parquet

    column = parquet.ParquetFile(path).metadata.row_group(group).column(4)  # close
    first = column.dictionary_page_offset or column.data_page_offset
    flip_bytes(path, first + column.total_compressed_size // 2)


def test_a_damaged_row_group_is_left_out_and_told(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    damage_group(path, 3)
    batches, skipped = streamed(ParquetRows(path), 100)
    assert [(one.where, one.records) for one in skipped] == [("a.parquet row group 3", 500)]
    kept = np.delete(sp500()["close"], np.s_[1500:2000])
    assert torch.equal(torch.cat([batch["close"] for batch in batches]), torch.from_numpy(kept))


def test_a_file_cut_short_under_the_reader_and_one_without_a_footer(tmp_path: Path) -> None:
    sound, cut = write_parquet(tmp_path / "a.parquet"), write_parquet(tmp_path / "b.parquet")
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot open .*b\.parquet"):
        ParquetRows(cut)
    data = ParquetRows(tmp_path)
    batches, skipped = streamed(data, 500)
    assert [one.where for one in skipped] == ["b.parquet"]
    assert sum(len(batch["close"]) for batch in batches) == 5031
    sound.write_bytes(sound.read_bytes()[:1000])
    batches, skipped = streamed(data, 500)
    assert batches == []
    assert sum(one.records for one in skipped) == 1 + 5031


def test_parquet_rows_that_lack_a_value_are_left_out_but_a_missing_float_is_nan(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path = tmp_path / "gaps.parquet"
    parquet.write_table(
        arrow.table({"x": [1.0, None, 3.0, 4.0], "n": arrow.array([1, 2, None, 4], arrow.int32())}), path
    )
    batches, skipped = streamed(ParquetRows(path), 10)
    assert batches[0]["n"].tolist() == [1, 2, 4]
    assert batches[0]["x"].isnan().tolist() == [False, True, False]
    assert [one.records for one in skipped] == [1]


def test_a_damaged_chunk_takes_its_own_rows_only(tmp_path: Path) -> None:
    import h5py

    path = write_hdf5(tmp_path / "digits.h5")
    with h5py.File(path) as file:
        offset = file["image"].id.get_chunk_info(2).byte_offset
    flip_bytes(path, offset + 100)
    data = hdf5_rows(path)
    with pytest.raises(CorruptRecord, match=r"digits\.h5 row 300: chunk of rows 256 to 383"):
        data[300]
    assert data.take([255, 384])["label"].tolist() == digits()[1][[255, 384]].tolist()
    cut = tmp_path / "cut.h5"
    cut.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="cannot open"):
        hdf5_rows(cut)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('"1999-01-13",1219.5,1246.0,12x.0,1234.0,931000000', "low is '12x.0', expected a number"),
        ('"1999-01-13",1219.5,1246.0', "3 cells, 6 in the header"),
        ('"1999-01-13,1219.5,1246.0,1205.0,1234.0,931000000', "unexpected end of data"),
        ("\udcff\udcfe,1,2,3,4,5", "invalid start byte"),
    ],
)
def test_a_damaged_line_is_one_record_and_no_more(tmp_path: Path, line: str, reason: str) -> None:
    path = write_csv(tmp_path / "sp500.csv")
    lines = path.read_text().split("\n")
    lines[8] = line
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    data = csv_rows(path, dict.fromkeys(PRICES, float) | {"date": str})
    assert len(data) == 5031
    with pytest.raises(CorruptRecord, match=rf"sp500\.csv line 9: .*{reason}"):
        data[7]
    others = [row for row in range(5031) if row != 7]
    batch = data.take(others)
    assert batch["date"] == sp500()["date"][others].tolist()
    assert torch.equal(batch["close"], torch.from_numpy(sp500()["close"][others]))


def test_a_quoted_cell_may_have_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text('note,x\n"one\ntwo, ""three""",1\n\n plain,2\n')
    data = csv_rows(path, {"note": str, "x": int})
    assert [data[0]["note"], data[1]["note"]] == ['one\ntwo, "three"', " plain"]
    assert data.take([0, 1])["x"].tolist() == [1, 2]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 40)), max_size=80),
    st.integers(0, 100),
    st.integers(0, 79),
)
def test_a_cache_never_holds_more_than_its_budget_and_never_answers_wrongly(
    calls: list[tuple[int, int]], budget: int, shrink_at: int
) -> None:
    cache: BlockCache[tuple[int, int]] = BlockCache("test", budget, lambda block: block[1])
    sizes: dict[int, int] = {}
    for number, (key, size) in enumerate(calls):
        size = sizes.setdefault(key, size)
        if number == shrink_at:
            held = cache.use().bytes
            assert cache.reclaim() == held
            assert cache.use().bytes == 0
            budget //= 2
        assert cache.get(key, lambda key=key, size=size: (key, size)) == (key, size)
        use = cache.use()
        assert use.bytes <= budget == cache.max_bytes
        assert use.hits + use.misses == number + 1
    if calls and budget >= 40:
        before = cache.use().hits
        cache.get(calls[-1][0], lambda: pytest.fail("was just read"))
        assert cache.use().hits == before + 1


def test_the_memory_guard_finds_the_caches(tmp_path: Path) -> None:
    data = hdf5_rows(write_hdf5(tmp_path / "guarded.h5"), max_cache_bytes=1 << 20)
    data.take(list(range(512)))
    entry = next(one for one in reclaimables() if one.name == "cache of guarded.h5")
    assert entry.reclaim() == 512 * (8 * 8 * 4 + 8)
    assert data.cache_use().bytes == 0
    assert data.cache.max_bytes == 1 << 19
    assert data.take([5])["label"].tolist() == [digits()[1][5]]


def test_bad_files_say_what_is_wrong(tmp_path: Path) -> None:
    images, labels = digits()
    np.save(tmp_path / "image.npy", images)
    np.save(tmp_path / "short.npy", labels[:-1])
    np.save(tmp_path / "text.npy", np.array(["a", "b"]))
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "image.npy").read_bytes()[:5000])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "header.csv").write_text("a,b\n")
    write_csv(tmp_path / "sp500.csv")
    write_parquet(tmp_path / "p.parquet")
    write_hdf5(tmp_path / "d.h5")
    bad: list[tuple[Any, str]] = [
        (lambda: MappedArrays(tmp_path / "none.npy"), "cannot map .*none.npy: No such file"),
        (lambda: MappedArrays(tmp_path / "cut.npy"), "cannot map .*cut.npy"),
        (lambda: MappedArrays(tmp_path / "objects.npy"), "cannot map .*objects.npy"),
        (lambda: MappedArrays(tmp_path / "text.npy"), "has the type <U1"),
        (lambda: MappedArrays({"a": tmp_path / "image.npy", "b": tmp_path / "short.npy"}), "1797.*1796"),
        (lambda: MappedBytes(tmp_path / "empty", 4), "cannot map"),
        (lambda: MappedBytes(tmp_path / "header.csv", 40), "has 4 bytes.*window of 40"),
        (lambda: csv_rows(tmp_path / "header.csv"), "has no rows"),
        (lambda: csv_rows(tmp_path / "sp500.csv", ["Close"]), "no column Close .found: date, open"),
        (lambda: ParquetRows(tmp_path / "p.parquet", ["Close"]), "no column Close.*some of date, open"),
        (lambda: ParquetRows(tmp_path / "none"), "no Parquet data at .*none"),
        (lambda: hdf5_rows(tmp_path / "d.h5", ["pixels"]), "no data set 'pixels'.*image, label"),
        (lambda: hdf5_rows(tmp_path / "sp500.csv"), "cannot open .*sp500.csv"),
    ]
    for make, message in bad:
        with pytest.raises(DataError, match=message):
            make()


@pytest.mark.parametrize("index", ["close", "0", 1.5, None, True, b"0", ["a"]])
def test_a_row_by_something_else_than_its_number_is_refused_with_what_was_given(
    tmp_path: Path, index: Any
) -> None:
    write_csv(tmp_path / "sp500.csv")
    np.save(tmp_path / "labels.npy", digits()[1])
    rows = csv_rows(tmp_path / "sp500.csv", ["close"])
    for data in (rows, MappedArrays(tmp_path / "labels.npy"), MappedBytes(tmp_path / "sp500.csv", 8)):
        for ask, asked in ((data.__getitem__, index), (data.take, [index])):
            with pytest.raises(DataError) as error:
                ask(asked)
            told = str(error.value)
            assert repr(asked) in told and "expected whole numbers from 0" in told and "fix: " in told


def test_a_row_by_any_whole_number(tmp_path: Path) -> None:
    """NumPy's and torch's as well; of arrays also a slice and a list."""
    write_csv(tmp_path / "sp500.csv")
    np.save(tmp_path / "labels.npy", digits()[1])
    rows, labels = csv_rows(tmp_path / "sp500.csv", ["close"]), MappedArrays(tmp_path / "labels.npy")
    assert rows[np.int32(3)] == rows[torch.tensor(3)] == rows[3]
    assert labels[torch.tensor(3)] == labels[3] and labels[-1] == digits()[1][-1]
    assert labels[1:3].tolist() == labels[[1, 2]].tolist() == labels.take(torch.tensor([1, 2])).tolist()
    assert len(rows.take([])) == 0
    with pytest.raises(IndexError):
        rows[10**6]


@pytest.mark.parametrize(("package", "make"), [("h5py", hdf5_rows), ("pyarrow.parquet", ParquetRows)])
def test_a_missing_package_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, make: Any
) -> None:
    (tmp_path / "data.parquet").write_bytes(b"x")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'obsinfra\[data\]'"):
        make(tmp_path / "data.parquet")
