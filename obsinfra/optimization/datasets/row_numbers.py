"""Which rows of a data set somebody asks for: whole numbers, or an error that names what was given instead.

Used by the data sets of rows by index.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from obsinfra.errors import DataError
from obsinfra.optimization.arguments import shown


def row_number(index: Any) -> int:
    """One of them; a tensor or NumPy's number will do, a truth value will not.

    Raises:
        DataError: it is no whole number.
    """
    try:
        if isinstance(index, (bool, np.bool_)):
            raise TypeError
        return operator.index(index)
    except TypeError:
        raise _refused(f"a row by index {shown(index)}") from None


def row_numbers(indices: Any) -> NDArray[np.int64]:
    """Several, in the order asked for.

    Raises:
        DataError: one of them is no whole number, or it is no list of them.
    """
    try:
        found = np.asarray(indices)
    except (TypeError, ValueError, RuntimeError):
        raise _refused(f"rows by indices {shown(indices)}") from None
    if found.ndim != 1 or (found.dtype.kind not in "iu" and found.size):
        raise _refused(f"rows by indices {shown(indices)}")
    return found.astype(np.int64, copy=False)


def places(index: Any) -> int | slice | NDArray[np.int64]:
    """What an array of rows is indexed by: a row's number, a slice, or several numbers.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(index, slice):
        return index
    if isinstance(index, (list, tuple)) or getattr(index, "ndim", False):
        return row_numbers(index)
    return row_number(index)


def _refused(wrong: str) -> DataError:
    return DataError(
        wrong, "whole numbers from 0, as the data set counts its rows", "for a column: dataset[row][name]"
    )
