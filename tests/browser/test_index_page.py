"""The sidecar's page of all runs, in a real browser, beside a real sidecar and a real trainer."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from waiting import wait_for

from obsinfra.run.folder import RunFolder, RunInfo

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

if TYPE_CHECKING:
    from conftest import Opened
    from playwright.sync_api import Locator, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]
expect = playwright.expect
Open = Callable[..., "Opened"]
HOSTILE = '<img src=x onerror="document.title=1">"\'</script><script>document.title=2</script>'


@dataclass
class Scene:
    """A sidecar that watches two runs: one that trains, and one that ended and has a hostile model name."""

    url: str
    token: str
    folder: RunFolder
    client: httpx.Client

    def get(self, path: str) -> Any:
        answer = self.client.get(f"/v1/{path}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def step(self) -> int:
        return int(self.get(f"runs/{self.folder.id}")["step"] or 0)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    output_dir = tmp_path_factory.mktemp("runs")
    dead = RunFolder(output_dir / "old-run")
    dead.create()
    dead.write_info(
        RunInfo(id="old-run", model=HOSTILE, state="failed", host=HOSTILE, reason=HOSTILE, processes={})
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token_file = output_dir / ".stack" / "token"
    beside = [f"--token-file={token_file}", f"--state-dir={output_dir / '.stack' / 'sidecar'}"]
    programs = [
        ["obsinfra.control.sidecar", f"--output-dir={output_dir}", f"--port={port}", *beside],
        [
            "obsinfra.cli.main", "train", "--model-name=digits", "--run=live-run", "--epochs=1000000",
            f"--output-dir={output_dir}", "--metrics-port=0",
        ],
    ]  # fmt: skip
    log = output_dir / "programs.log"
    running = []
    with log.open("ab") as out:
        for program in programs:
            running.append(
                subprocess.Popen([sys.executable, "-m", *program], stdout=out, stderr=out, env=os.environ)
            )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False)
    made = Scene(str(client.base_url), "", RunFolder(output_dir / "live-run"), client)

    def works() -> bool:
        assert all(one.poll() is None for one in running), log.read_text()
        try:
            made.token = token_file.read_text().strip()
            client.headers["authorization"] = f"Bearer {made.token}"
            # The first profiled and slow steps are past, so what is compared does not change meanwhile.
            return made.step() > 100
        except (OSError, httpx.HTTPError, AssertionError):
            return False

    try:
        wait_for(works, "the sidecar sees the trainer's steps", 120)
        alert = {
            "status": "firing",
            "labels": {
                "alertname": "HighMemory", "run": "live-run", "severity": "critical", "action": "dump_stacks",
            },
            "annotations": {"summary": HOSTILE},
            "startsAt": datetime.now(UTC).isoformat(),
            "endsAt": "0001-01-01T00:00:00Z",
            "generatorURL": "",
            "fingerprint": "0123456789abcdef",
        }  # fmt: skip
        notification = {
            "version": "4", "groupKey": "{}", "truncatedAlerts": 0, "status": "firing", "receiver": "sidecar",
            "groupLabels": {}, "commonLabels": {}, "commonAnnotations": {}, "externalURL": "",
            "alerts": [alert],
        }  # fmt: skip
        answer = client.post("/webhook", json=notification)
        assert answer.status_code == 200, answer.text
        yield made
    finally:
        client.close()
        for one in running:
            one.send_signal(signal.SIGTERM)
        for one in running:
            try:
                one.wait(30)
            except subprocess.TimeoutExpired:
                one.kill()
                one.wait()


def enter(page: Page, token: str) -> None:
    page.get_by_label("Token", exact=True).fill(token)
    page.keyboard.press("Enter")


@pytest.fixture
def opened(scene: Scene, open_page: Open) -> Opened:
    """The page, with the token typed in, and its tables filled."""
    opened = open_page(scene.url)
    enter(opened.page, scene.token)
    expect(opened.page.locator("#runs tbody tr")).to_have_count(2)
    return opened


def texts(rows: Locator) -> list[list[str]]:
    found: list[list[str]] = rows.evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    return found


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%d %H:%M:%S")


def test_rows_equal_what_the_api_says(scene: Scene, opened: Opened) -> None:
    page = opened.page
    before = scene.step()
    live, old = texts(page.locator("#runs tbody tr"))
    told = {run["id"]: run for run in scene.get("runs")}
    for row, run in ((live, told["live-run"]), (old, told["old-run"])):
        note = "" if run["live"] else "its page ended with it"
        assert row[0:3] == [run["state"], run["id"] + note, run["model"]]
        assert row[5:] == [
            run["started"][:19].replace("T", " "), run["host"], str(run["world_size"]), str(run["restarts"]),
        ]  # fmt: skip
        if not run["live"]:
            assert row[4].endswith(run["reason"])
    step = page.locator('#runs tr[data-key="live-run"] td').nth(3)
    wait_for(lambda: int(step.inner_text()) >= before, "the step goes on", 30)
    page_link = page.get_by_role("link", name="live-run")
    assert page_link.get_attribute("href") == told["live-run"]["metrics_urls"]["0"].removesuffix("metrics")

    alerts = scene.get("alerts")
    (told_firing,) = alerts["firing"]
    (firing,) = texts(page.locator("#firing tbody tr"))
    assert firing[:4] == ["critical", "HighMemory", "live-run", moment(told_firing["starts_at"])]
    assert firing[4].startswith(told_firing["next_step"] or "–")
    assert firing[5] == told_firing["summary"] == HOSTILE
    assert [row[1:] for row in texts(page.locator("#heard tbody tr"))] == [
        [one["alert"], one["run"], one["status"], one["decision"], one["action"] or "–"]
        for one in alerts["heard"]
    ]
    shown = [(row[1], row[6]) for row in texts(page.locator("#slow tbody tr"))]
    known = {(str(one["step"]), one["trace_id"]) for one in scene.get("runs/live-run/slow_steps?limit=1000")}
    assert shown and set(shown) <= known


def test_a_button_that_is_pressed_is_carried_out_by_the_trainer(scene: Scene, opened: Opened) -> None:
    page = opened.page
    button = page.get_by_role("button", name="Checkpoint: live-run")
    button.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#told")).to_have_text(
        re.compile("Checkpoint: live-run – done at step"), timeout=60_000
    )
    newest = scene.get("journal?limit=1")[0]
    assert (newest["action"], newest["outcome"], newest["source"]) == ("checkpoint", "done", "api: page")
    manifests = (scene.folder.checkpoints / "manifests").glob("*.json")
    assert newest["step"] in {int(manifest.name.partition("-")[0]) for manifest in manifests}
    row = texts(page.locator("#commands tbody tr"))[0]
    assert row[1:6] == ["live-run", "checkpoint", "done", str(newest["step"]), "api: page"]
    # Rows are kept while numbers change below them: whoever is at a button by keyboard stays there.
    step = page.locator('#runs tr[data-key="live-run"] td').nth(3)
    shown = step.inner_text()
    wait_for(lambda: step.inner_text() != shown, "a new step is shown", 30)
    expect(button).to_be_focused()
    assert page.locator('#runs tr[data-key="old-run"] button:visible').count() == 0


def test_names_are_text_and_nothing_else_is_asked_for(scene: Scene, opened: Opened) -> None:
    page = opened.page
    assert page.title() == "Runs · obsinfra"
    assert page.locator("main img, main script").count() == 0
    assert opened.requests and all(address.startswith(scene.url + "/") for address in opened.requests)
    assert not [address for address in opened.requests if scene.token in address]
    assert opened.console == []


def test_without_the_token_nothing_is_told(scene: Scene, open_page: Open) -> None:
    opened = open_page(scene.url)
    page = opened.page
    expect(page.get_by_label("Token", exact=True)).to_be_focused()
    assert not [address for address in opened.requests if "/v1/" in address]
    enter(page, "a-wrong-token-of-some-length")
    expect(page.get_by_role("alert")).to_have_text("The sidecar does not know this token.")
    expect(page.locator("main")).to_be_hidden()
    enter(page, scene.token)
    expect(page.locator("#runs tbody tr")).to_have_count(2)
    page.reload()
    expect(page.locator("#runs tbody tr")).to_have_count(2)
    assert page.context.cookies() == []  # nothing a browser would send of itself from another place
    page.get_by_role("button", name="Forget the token").click()
    expect(page.locator("main")).to_be_hidden()
    assert page.evaluate("JSON.stringify([sessionStorage, localStorage])") == json.dumps([{}, {}]).replace(
        " ", ""
    )


CUT = """() => [...document.querySelectorAll(".scroll")]
  .filter((one) => one.checkVisibility() && one.scrollWidth > one.clientWidth)
  .map((one) => one.ariaLabel)"""


@pytest.mark.parametrize("width", [390, 820, 1280, 1440])
def test_nothing_lies_beyond_the_edge(scene: Scene, open_page: Open, width: int) -> None:
    page = open_page(scene.url, width=width, height=844).page
    enter(page, scene.token)
    expect(page.locator("#slow tbody tr").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CUT) == []
    for name in ("Checkpoint", "Profile", "Dump stacks", "Pause", "Resume"):
        box = page.get_by_role("button", name=f"{name}: live-run").bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width, name


def test_the_pages_lead_to_each_other(scene: Scene, opened: Opened) -> None:
    page = opened.page
    old = page.locator('#runs tr[data-key="old-run"]')
    assert old.locator("a[href]").count() == 0
    expect(old).to_contain_text("its page ended with it")
    expect(page.locator("#runs-ended")).to_contain_text("obsinfra report RUN")
    # As Prometheus does: from then on the sidecar watches over the run, and says where its page is.
    assert scene.client.get("/sd").status_code == 200
    page.get_by_role("link", name="live-run").click()
    expect(page.locator("#run-id")).to_have_text("live-run")
    page.get_by_role("link", name="All runs").click(timeout=30_000)
    expect(page).to_have_url(scene.url + "/")
    expect(page.locator("#runs tbody tr")).to_have_count(2)  # the tab still has the token


def test_a_message_leads_to_the_slow_steps_of_its_run(scene: Scene, open_page: Open) -> None:
    """The tables hide until the token is there; then the browser goes to where the link leads."""
    opened = open_page(f"{scene.url}/?run=live-run#slow-steps")
    enter(opened.page, scene.token)
    expect(opened.page.locator("#slow-note")).to_have_text("of live-run, from their traces")
    expect(opened.page.get_by_role("heading", name="Last slow steps")).to_be_in_viewport()
    asked = [address for address in opened.requests if address.endswith("/slow_steps")]
    assert asked and all(address.endswith("/live-run/slow_steps") for address in asked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_readers_scheme(scene: Scene, open_page: Open, scheme: str) -> None:
    opened = open_page(scene.url, width=390, height=844, scheme=scheme)
    page = opened.page
    enter(page, scene.token)
    expect(page.locator("#runs tbody tr")).to_have_count(2)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(244, 245, 246)", "dark": "rgb(15, 18, 21)"}[scheme]
