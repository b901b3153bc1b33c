"""Checks of what a caller gives: a value of another kind, or out of its range, is an error that names it.

Every public function of this folder checks its arguments here, before it changes anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Number, Real
from pathlib import Path

from obsinfra.errors import ConfigError, UserError

LONGEST_SECONDS = 1e9
"""About thirty years: a wait beyond that is none, and Python's clocks overflow somewhere above."""


def shown(value: object) -> str:
    """A value as a message has it: itself if it is short, else what it is."""
    if value is None or isinstance(value, (Number, str, bytes, list, tuple, dict, type)):
        try:
            text = repr(value)
        except ValueError:  # more digits than Python prints
            text = ""
        if 0 < len(text) <= 80:
            return text
    return f"of type {type(value).__name__}"


def whole_number(
    name: str,
    value: object,
    *,
    least: int | None = None,
    most: int | None = None,
    error: type[UserError] = ConfigError,
) -> int:
    """A whole number, NumPy's included; no bool, and no float even where it is whole."""
    good = isinstance(value, Integral) and not isinstance(value, bool)
    if good and least is not None:
        good = value >= least  # type: ignore[operator]
    if good and most is not None:
        good = value <= most  # type: ignore[operator]
    if not good:
        low = "" if least is None else f" of at least {least}"
        raise error(
            f"{name} {shown(value)}",
            f"a whole number{low}" + ("" if most is None else f" up to {most}"),
            "correct it",
        )
    return int(value)  # type: ignore[call-overload, no-any-return]


def number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    error: type[UserError] = ConfigError,
) -> float:
    """A finite number within bounds."""
    good = isinstance(value, Real) and not isinstance(value, bool) and _finite(value)
    if good and least is not None:
        good = value >= least  # type: ignore[operator]
    if good and above is not None:
        good = value > above  # type: ignore[operator]
    if good and most is not None:
        good = value <= most  # type: ignore[operator]
    if not good:
        bounds = [
            *(() if least is None else (f"of at least {least:g}",)),
            *(() if above is None else (f"above {above:g}",)),
            *(() if most is None else (f"up to {most:g}",)),
        ]
        raise error(f"{name} {shown(value)}", " ".join(["a finite number", *bounds]), "correct it")
    return float(value)  # type: ignore[arg-type]


def _finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def flag(name: str, value: object, *, error: type[UserError] = ConfigError) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise error(f"{name} {shown(value)}", "True or False", "correct it")
    return value


def file_path(name: str, value: object, *, error: type[UserError] = ConfigError) -> Path:
    """A path, as text or as a path."""
    if not isinstance(value, (str, Path)):
        raise error(f"{name} {shown(value)}", "a path", "correct it")
    return Path(value)


def one_of(
    name: str, value: object, allowed: Sequence[object], *, error: type[UserError] = ConfigError
) -> None:
    """One of a few values; 1 is not True."""
    if not any(value is one or (isinstance(value, str) and value == one) for one in allowed):
        raise error(f"{name} {shown(value)}", f"one of {', '.join(map(repr, allowed))}", "correct it")


def function(name: str, value: object, example: str, *, error: type[UserError] = ConfigError) -> None:
    """Something that can be called; `example` shows such a one."""
    if not callable(value):
        raise error(f"{name} {shown(value)}", "a function", f"give one: {example}")
