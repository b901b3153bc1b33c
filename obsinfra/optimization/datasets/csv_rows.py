"""Rows of a CSV file by index, without holding it in memory. Used through `csv_rows`.

One pass finds where each row starts (8 bytes a row are kept); rows are parsed in blocks when they are wanted.
"""

from __future__ import annotations

import csv
import io
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from obsinfra.errors import DataError
from obsinfra.optimization.arguments import file_path, shown
from obsinfra.optimization.datasets.row_blocks import Block, BlockedRows, Column

ROWS_PER_BLOCK = 256
MAX_ROW_BYTES = 1 << 16
"""A row that is longer has a quotation mark too many: it is taken to end with its first line."""


def csv_rows(
    path: str | Path,
    columns: Sequence[str] | Mapping[str, type] | None = None,
    *,
    delimiter: str = ",",
    max_cache_bytes: int = 64 << 20,
) -> BlockedRows:
    """The rows of a CSV file with a header, by index.

    Args:
        path: the file, UTF-8, cells quoted by `"` where needed; a quoted cell may have several lines.
        columns: names of the columns to read, numbers (float32); or each with its type: `float`, `int`
            (int64) or `str`. None: all, as numbers.
        delimiter: one character between cells.
        max_cache_bytes: most bytes of parsed rows kept by each process.

    Returns:
        A map-style data set of dicts. A row with too few or too many cells, or one that is no number, is a
        `CorruptRecord`.

    Raises:
        DataError: unreadable, no header, no rows, a column is missing, or a delimiter that is none.
    """
    if not isinstance(delimiter, str) or len(delimiter) != 1 or delimiter in '"\r\n':
        raise DataError(
            f"delimiter {shown(delimiter)}", "one character, no quotation mark or line end", "correct it"
        )
    if isinstance(columns, str) or not all(isinstance(name, str) for name in columns or ()):
        raise DataError(
            f"columns {shown(columns)}", "a list of names, or a dict of types by name", '["open"]'
        )
    types = columns if isinstance(columns, Mapping) else dict.fromkeys(columns, float) if columns else None
    return BlockedRows(
        _CsvReader(file_path("path", path, error=DataError), types, delimiter), max_cache_bytes
    )


class _CsvReader:
    rows_per_block = ROWS_PER_BLOCK

    def __init__(self, path: Path, types: Mapping[str, type] | None, delimiter: str) -> None:
        self.path, self.delimiter = path.resolve(), delimiter
        self.name = path.name
        try:
            with path.open("rb") as file:
                self._header = self._cells(file.readline().removeprefix(b"\xef\xbb\xbf").decode())
                self._starts, self._lines, self._end = _row_starts(file)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise DataError(f"cannot read {path}: {reason}", "a UTF-8 CSV file with a header") from error
        self.types = dict.fromkeys(self._header, float) if types is None else dict(types)
        missing = [name for name in self.types if name not in self._header]
        if missing or not self._header:
            likely = [mark for mark in ";\t|," if len(self._header) == 1 and mark in self._header[0]]
            raise DataError(
                f"{path} has no column {', '.join(missing) or 'at all'} "
                f"(found: {', '.join(self._header)[:200]})",
                "a header with the columns' names",
                f"delimiter={likely[0]!r}" if likely else "",
            )
        unknown = [f"{name}: {kind!r}" for name, kind in self.types.items() if kind not in (float, int, str)]
        if unknown:
            raise DataError(f"columns of an unknown type: {', '.join(unknown)}", "float, int or str")
        self.rows = len(self._starts)
        if not self.rows:
            raise DataError(f"{path} has no rows", "one or more below the header")
        self._places = {name: self._header.index(name) for name in self.types}

    def _cells(self, text: str) -> list[str]:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter, strict=True), [])

    def read(self, first: int, stop: int) -> Block:
        begin = self._starts[first]
        end = self._starts[stop] if stop < self.rows else self._end
        try:
            with self.path.open("rb") as file:
                file.seek(begin)
                raw = file.read(end - begin)
        except OSError as error:
            return Block(all_damaged=f"cannot be read: {error.strerror or error}")
        count = stop - first
        columns: dict[str, Column] = {
            name: [""] * count if kind is str else np.zeros(count, np.int64 if kind is int else np.float32)
            for name, kind in self.types.items()
        }
        damaged: dict[int, str] = {}
        bounds = [self._starts[row] - begin for row in range(first, stop)] + [end - begin]
        for row in range(count):
            try:
                self._parse(raw[bounds[row] : bounds[row + 1]], row, columns)
            except (ValueError, OverflowError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
                damaged[row] = str(error)[:200]
        return Block(columns, damaged)

    def _parse(self, line: bytes, row: int, columns: dict[str, Column]) -> None:
        cells = self._cells(line.decode())
        if len(cells) != len(self._header):
            raise ValueError(f"{len(cells)} cells, {len(self._header)} in the header")
        for name, place in self._places.items():
            kind = self.types[name]
            try:
                columns[name][row] = kind(cells[place])
            except (ValueError, OverflowError):
                wanted = "a whole number" if kind is int else "a number"
                raise ValueError(f"{name} is {cells[place][:50]!r}, expected {wanted}") from None

    def where(self, row: int) -> str:
        return f"{self.path.name} line {self._lines[row]}"


def _row_starts(file: io.BufferedReader) -> tuple[Sequence[int], Sequence[int], int]:
    """Offset and line number of every row from where `file` stands, and the offset of its end."""
    starts, lines = array("Q"), array("Q")
    position, line_number = file.tell(), 1
    while line := file.readline():
        line_number += 1
        start, number, after_first = position, line_number, file.tell()
        position = after_first
        if line.isspace():
            continue
        quotes = line.count(b'"')
        while quotes % 2:  # a quoted cell goes on in the next line
            more = file.readline()
            position += len(more)
            line_number += 1
            if not more or position - start > MAX_ROW_BYTES:
                file.seek(after_first)
                position, line_number = after_first, number
                break
            quotes += more.count(b'"')
        starts.append(start)
        lines.append(number)
    return starts, lines, position
