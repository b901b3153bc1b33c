"""A report's file in a real browser: nothing of it is out of sight where names are long."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from obsinfra.observation import observe
from obsinfra.reporting.compose import compose
from obsinfra.reporting.gather import RunStory, gather
from obsinfra.reporting.html_form import to_html

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [pytest.mark.browser, pytest.mark.slow]

LONGEST = 100
"""Characters that a run's name may have."""


def story(folder: Path, run: str, **settings: object) -> RunStory:
    with observe(torch.nn.Linear(2, 1), output_dir=folder, run=run, metrics_port=0, **settings) as observed:
        for _ in observed.steps(range(3)):
            observed.record(loss=1.0)
    return gather(observed.folder, None)


@pytest.mark.parametrize("width", [390, 1280])
def test_two_long_names_beside_each_other_hide_no_column(
    tmp_path: Path, browser: Browser, width: int
) -> None:
    stories = [
        story(tmp_path, name.ljust(LONGEST, "x"), keep_checkpoints=keep)
        for name, keep in (("first-of-two-", 3), ("second_of_two_", 7))
    ]
    file = tmp_path / "report.html"
    file.write_text(to_html(compose(*stories)))
    context = browser.new_context(viewport={"width": width, "height": 900})
    try:
        page = context.new_page()
        page.goto(file.as_uri())
        widths = page.locator("main .scroll, header, html").evaluate_all(
            "places => places.map(place => [place.scrollWidth, place.clientWidth])"
        )
        assert len(widths) > 3 and all(needed <= there for needed, there in widths), widths
        cells = page.locator("#comparison table").first.locator("tbody tr").first.locator("td")
        lines = {round(box["y"]) for cell in cells.all() if (box := cell.bounding_box()) is not None}
        assert len(lines) == (cells.count() if width < 700 else 1), "a card on a phone, else a row"
    finally:
        context.close()
