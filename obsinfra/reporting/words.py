"""How a report writes numbers, sizes, durations and moments; the same as the live page (`page/format.js`)."""

from __future__ import annotations

import math
from datetime import UTC, datetime

NONE = "–"


def number(value: float | None, digits: int = 4) -> str:
    """About four significant digits; powers of ten outside 0.001 … 10,000,000."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e7):
        mantissa, _, power = f"{value:.{min(digits - 1, 2)}e}".partition("e")
        return f"{mantissa}e{int(power)}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:.{places}f}"


def short(value: float) -> str:
    """For axes: no trailing zeros."""
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e5):
        mantissa, _, power = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def integer(value: float | None) -> str:
    """Whole, in groups of three."""
    return NONE if value is None else f"{value:,.0f}"


def percent(ratio: float | None, digits: int = 1) -> str:
    """A ratio as per cent."""
    return NONE if ratio is None else f"{ratio * 100:.{digits}f} %"


def size(value: float | None) -> str:
    """Bytes."""
    if value is None:
        return NONE
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return (
                f"{value:.0f} {unit}"
                if unit == "B"
                else f"{value:.3g} {unit}"
                if value < 1000
                else f"{value:.0f} {unit}"
            )
        value /= 1024
    raise AssertionError("the last unit takes everything")


def duration(seconds: float | None) -> str:
    """Seconds as µs, ms, s, then `4 m 05 s`, `2 h 10 m`, `3 d 4 h`."""
    if seconds is None:
        return NONE
    length = abs(seconds)
    if length == 0:
        return "0 s"
    if length < 9.995e-4:
        return f"{seconds * 1e6:.3g} µs"
    if length < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if length < 59.5:
        return f"{seconds:.3g} s"
    total = round(seconds)
    if total < 3600:
        return f"{total // 60} m {total % 60:02d} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60:02d} m"
    return f"{total // 86400} d {total % 86400 // 3600} h"


def moment(at: float | None) -> str:
    """Epoch seconds as `2026-11-24 14:05:09`, UTC: a report is read elsewhere."""
    return NONE if at is None else f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}"


def value_of(setting: object) -> str:
    """A setting as one would write it."""
    if isinstance(setting, bool):
        return "true" if setting else "false"
    if isinstance(setting, list):
        return ", ".join(value_of(item) for item in setting) or NONE
    if isinstance(setting, dict):
        return ", ".join(f"{key}={value_of(item)}" for key, item in setting.items()) or NONE
    return NONE if setting is None or setting == "" else str(setting)
