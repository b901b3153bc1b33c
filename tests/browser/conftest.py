"""Fixtures of the page's tests: a real headless Chromium, a recorded real training, a trainer's address."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from digits_run import Player, Record
    from monitored_digits import MonitoredDigits
    from playwright.sync_api import Browser, Page

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
)


@dataclass
class Opened:
    """A page with everything it said and asked for.

    Attributes:
        console: warnings and errors of the console, refusals by the content security policy among them.
        requests: every address asked for.
    """

    page: Page
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, for one file: Playwright keeps an event loop running in this thread, beside which no test of
    another file could start its own.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = os.environ.get("OBSINFRA_TEST_CHROMIUM") or shutil.which("chromium")
    if executable is None:
        pytest.skip("no chromium found: install it or set OBSINFRA_TEST_CHROMIUM")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Opened]]:
    """`open_page(url, width=…, scheme=…, before=…)`; `before(page)` runs before the page is loaded,
    `more` goes to the browser's context."""
    contexts = []

    def open_it(
        url: str,
        *,
        width: int = 1440,
        height: int = 900,
        scheme: Any = "light",
        before: Callable[[Page], None] | None = None,
        **more: Any,
    ) -> Opened:
        viewport: Any = {"width": width, "height": height}
        context = browser.new_context(viewport=viewport, color_scheme=scheme, **more)
        contexts.append(context)
        page = context.new_page()
        opened = Opened(page)
        page.on("console", lambda m: opened.console.append(m.text) if m.type != "log" else None)
        page.on("pageerror", lambda error: opened.console.append(str(error)))
        page.on("request", lambda request: opened.requests.append(request.url))
        if before:
            before(page)
        page.goto(url)
        page.locator("#state:not([data-state=unknown])").wait_for()
        return opened

    yield open_it
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """One short training on scikit-learn's digits, measured by itself."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from digits_run import train_digits

    return train_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def player(record: Record) -> Iterator[Player]:
    """Serves the recorded training, stopped at step 400 until a test lets it go on."""
    from digits_run import Player

    served = Player(record, 400)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredDigits]:
    """A live training under the real monitor, with the page on the monitor's own server.

    It draws from torch's global generator, so it must have ended before tests that compare random sequences.
    """
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from monitored_digits import MonitoredDigits

    running = MonitoredDigits(tmp_path_factory.mktemp("monitored"))
    yield running
    running.stop()


@pytest.fixture(params=["recorded", "monitored"])
def trainer_url(request: pytest.FixtureRequest) -> str:
    """Address of a live page, for the tests that need no say in what the trainer does next."""
    if request.param == "recorded":
        player: Player = request.getfixturevalue("player")
        return player.url
    monitored: MonitoredDigits = request.getfixturevalue("monitored")
    return monitored.url
