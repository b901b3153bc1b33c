"""The page of all runs beyond loopback: over TLS with a certificate of one's own, and with very many runs."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from certificates import self_signed
from waiting import wait_for

from obsinfra.run.folder import RunFolder, RunInfo
from obsinfra.run.process import ProcessId

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

if TYPE_CHECKING:
    from conftest import Opened

pytestmark = pytest.mark.browser
expect = playwright.expect
Open = Callable[..., "Opened"]

RUNS, LIVE = 1_000, 30
SHOWN, ASKED, SLOW_ASKED = 200, 24, 5  # what docs/sidecar.md says of the page


@dataclass
class Far:
    """A sidecar on every address of the machine, beside a folder of `RUNS` runs of which `LIVE` live."""

    url: str
    token: str
    folders: list[RunFolder]


def make_runs(output_dir: Path) -> list[RunFolder]:
    """Folders as trainers leave them; those that live are of this process, which is a process that lives."""
    me = {"0": asdict(ProcessId.current())}
    folders = []
    for number in range(RUNS):
        live = number < LIVE
        folder = RunFolder(output_dir / f"run-{number:04}")
        folder.root.mkdir()
        info = RunInfo(
            id=folder.id,
            model="digits",
            state="running" if live else "finished",
            host=socket.gethostname(),
            started=f"2026-01-01T{number // 60:02}:{number % 60:02}:00+00:00",
            processes=me if live else {},
            metrics_urls={"0": "http://127.0.0.1:9464/metrics"} if live else {},
        )
        folder.run_json.write_text(json.dumps(asdict(info)))
        if live:
            folder.write_progress(number, 0)
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    output_dir = tmp_path_factory.mktemp("far")
    folders = make_runs(output_dir)
    cert, key = self_signed(output_dir)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token_file, log = output_dir / ".stack" / "token", output_dir / ".log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "obsinfra.control.sidecar", f"--output-dir={output_dir}", "--host=0.0.0.0",
             f"--port={port}", f"--tls-cert={cert}", f"--tls-key={key}", f"--token-file={token_file}",
             f"--state-dir={output_dir / '.stack' / 'sidecar'}"],
            stdout=out, stderr=out,
        )  # fmt: skip
    url = f"https://127.0.0.1:{port}"
    context = ssl.create_default_context(cafile=cert)
    try:
        with httpx.Client(base_url=url, verify=context, timeout=20, trust_env=False) as client:

            def answers() -> bool:
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(httpx.HTTPError):
                    return client.get("/healthz").status_code == 200
                return False

            wait_for(answers, "the sidecar answers")
            assert client.get("/v1/runs").status_code == 401
        yield Far(url, token_file.read_text().strip(), folders)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_a_thousand_runs_over_tls_are_listed_in_bounded_work(far: Far, open_page: Open) -> None:
    asked: list[str] = []

    def before(page: Any) -> None:
        page.on("request", lambda request: asked.append(request.url) if "/v1/" in request.url else None)

    url = far.url.replace("127.0.0.1", "far.localhost")  # as from another machine
    opened = open_page(url, before=before, ignore_https_errors=True)
    page = opened.page
    assert asked == []
    page.get_by_label("Token", exact=True).fill(far.token)
    page.keyboard.press("Enter")
    expect(page.locator("#runs tbody tr")).to_have_count(SHOWN)
    expect(page.locator("#runs-note")).to_have_text(f"the newest {SHOWN} of {RUNS}")
    expect(page.locator("#facts")).to_contain_text(f"{LIVE} live")
    assert page.evaluate("isSecureContext")

    # Live ones first, whatever came after them; then the newest.
    names = page.locator("#runs tbody tr").evaluate_all("rows => rows.map((row) => row.dataset.key)")
    live = [folder.id for folder in far.folders[:LIVE]]
    ended = [folder.id for folder in far.folders[LIVE:]]
    assert names == [*reversed(live), *reversed(ended[-(SHOWN - LIVE) :])]

    # What one turn of the page asks for does not grow with the number of runs.
    first = [one.removeprefix(url) for one in asked][: 3 + ASKED + SLOW_ASKED]
    assert len([one for one in first if one in ("/v1/runs", "/v1/alerts", "/v1/journal")]) == 3
    assert len([one for one in first if one.endswith("/slow_steps")]) == SLOW_ASKED
    assert len([one for one in first if one.count("/") == 3]) == ASKED

    # A trainer's page on loopback is named, not linked: here that address would be another machine's.
    row = page.locator(f'#runs tr[data-key="{live[0]}"]')
    expect(row).to_contain_text(f"its page opens on {socket.gethostname()} alone, at 127.0.0.1:9464")
    assert page.locator("#runs a[href]").count() == 0

    # A turn in which nothing happened leaves the tables as they are; one in which a run got on, one cell.
    page.evaluate(
        """() => { window.changes = 0; new MutationObserver((all) => { changes += all.length; })
          .observe(document.querySelector("#main"), { childList: true, characterData: true,
                                                      attributes: true, subtree: true }); }"""
    )
    newest = far.folders[LIVE - 1]
    newest.write_progress(4_711, 0)
    expect(page.locator(f'#runs tr[data-key="{newest.id}"] td').nth(3)).to_have_text("4711")
    assert page.evaluate("window.changes") <= 4
    assert page.evaluate("document.querySelectorAll('*').length") < 40 * SHOWN
    assert opened.console == []
