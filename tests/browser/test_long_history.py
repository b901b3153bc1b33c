"""The live page of a run with a long history: its work and its traffic per update are bounded."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from waiting import wait_for

from obsinfra.monitoring.history import COLUMNS, MAX_POINTS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

if TYPE_CHECKING:
    from conftest import Opened
    from long_run import LongRun
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
expect = playwright.expect
Open = Callable[..., "Opened"]

UPDATES = 8
BYTES_PER_VALUE = 24
"""A double as JSON writes it, and its comma."""

OBSERVE = """
window.updates = [];
window.answers = [];
const ask = window.fetch;
window.fetch = async (...request) => {
  const answer = await ask(...request);
  const text = await answer.clone().text();
  const { reset, series } = JSON.parse(text);
  answers.push([text.length, reset, series.time.length]);
  return answer;
};
new PerformanceObserver((list) => {
  for (const { duration } of list.getEntriesByName("update")) updates.push(duration);
}).observe({ type: "measure" });
const lineTo = Path2D.prototype.lineTo;
let count = 0;
Path2D.prototype.lineTo = function (...at) { count += 1; return lineTo.apply(this, at); };
window.linesDrawn = () => { const before = count; count = 0; return before; };
"""


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LongRun]:
    from long_run import LongRun

    running = LongRun(tmp_path_factory.mktemp("long"))
    yield running
    running.stop()


def points(page: Page) -> int:
    label = page.locator("#chart-loss .plot").get_attribute("aria-label") or ""
    found = re.search(r"(\d+) points", label)
    assert found, label
    return int(found[1])


def test_an_update_after_ten_thousand_steps_is_bounded_work(open_page: Open, long_run: LongRun) -> None:
    page = open_page(long_run.url, before=lambda page: page.add_init_script(OBSERVE)).page
    assert long_run.steps >= 10_000
    wait_for(lambda: page.evaluate("updates.length >= 1"), "the first update")
    nodes = page.evaluate("document.querySelectorAll('*').length")
    drawn = points(page)
    charts = page.locator(".chart").count()
    lines = page.locator(".chart-legend li").count()
    page.evaluate("linesDrawn()")
    wait_for(lambda: page.evaluate("updates.length") >= UPDATES, f"{UPDATES} updates", 120)

    # What there is to draw, and what is there, do not grow with the run.
    assert 0 < drawn <= MAX_POINTS and 0 < points(page) <= MAX_POINTS
    assert page.evaluate("document.querySelectorAll('*').length") <= nodes + 20
    # uPlot draws at most four points for each pixel's column of a line.
    width = page.locator("#chart-loss canvas").first.evaluate("one => one.width")
    segments = page.evaluate("linesDrawn()")
    assert 0 < segments <= UPDATES * lines * 4 * width

    # An answer has what is new, or after a thinning of the history everything that is kept.
    answers: list[tuple[int, bool, int]] = page.evaluate("answers")
    values = len(COLUMNS) * BYTES_PER_VALUE
    assert answers[0][1] and any(not reset for _, reset, _ in answers)
    rest = max(size - count * values for size, _, count in answers)
    assert all(count <= MAX_POINTS for _, _, count in answers)
    assert rest <= 20_000
    assert sum(count for _, reset, count in answers if not reset) < MAX_POINTS * UPDATES / 4

    took = page.evaluate("updates")
    print(
        f"{long_run.steps} steps, {points(page)} points in {charts} charts: an update is "
        f"{statistics.median(took):.1f} ms of work at the median, {max(took):.1f} at most; "
        f"{statistics.median(size for size, reset, _ in answers if not reset) / 1024:.1f} KiB, "
        f"{max(size for size, _, _ in answers) / 1024:.0f} with everything"
    )
