"""Numbers of the previews, as Grafana writes them."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from obsinfra.dashboards.reading import scale_of, worded

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0009996, "s", "1 ms"),
        (0.000999, "s", "999 µs"),
        (59.99, "s", "1 min"),
        (0.0, "s", "0 s"),
        (86_400.0, "s", "1 d"),
        (1023.9, "bytes", "1 KiB"),
        (1.5 * 2**30, "Bps", "1.5 GiB/s"),
        (0.475, "percentunit", "47.5%"),
        (math.nan, "s", "–"),
    ],
)
def test_a_value_is_written_in_the_unit_that_fits_it(value: float, unit: str, text: str) -> None:
    assert worded(value, unit) == text


def test_a_scale_is_that_of_the_unit_a_value_is_written_in() -> None:
    assert (scale_of(130.0, "s"), scale_of(3 * 2**30, "bytes"), scale_of(5e6, "short")) == (60.0, 2**30, 1.0)


def test_axes_have_round_numbers_of_their_unit() -> None:
    preview = pytest.importorskip("obsinfra.dashboards.preview", reason="matplotlib is not installed")
    for unit, size, high in (
        ("bytes", 2**30, 23.5),
        ("s", 3600.0, 25.0),
        ("s", 60.0, 59.0),
        ("s", 1.0, 90.0),
    ):
        ticks = [tick / size for tick in preview._RoundTicks(unit).tick_values(0, high * size)]
        assert 3 <= len(ticks) <= 7 and all(tick == round(tick) for tick in ticks), (unit, ticks)


def test_storage_per_run_day_is_what_the_benchmark_measured() -> None:
    """docs/dashboards.md rounds up what benchmarks/results/dashboards.txt says."""
    measured = re.search(
        r"storage per run-day, 5 s apart\s+([\d.]+) MB",
        (ROOT / "benchmarks" / "results" / "dashboards.txt").read_text(),
    )
    told = re.search(r"\*\*(\d+) MB per run-day\*\*", (ROOT / "docs" / "dashboards.md").read_text())
    assert measured and told
    assert math.ceil(float(measured[1])) == int(told[1])
