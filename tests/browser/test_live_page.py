"""The live page, as a person meets it: what it shows, how it moves, and what it does when things go wrong."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

if TYPE_CHECKING:
    from conftest import Opened
    from digits_run import Player
    from playwright.sync_api import Page, Route

pytestmark = pytest.mark.browser
expect = playwright.expect
Open = Callable[..., "Opened"]

UNITS = {
    "": 1.0, "%": 0.01, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0,
    "B": 1.0, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
CHARTS = {
    "loss": "--c1", "validation-1": "--c2", "grad-norm": "--c2", "throughput": "--c3", "step-time": "--c4",
    "learning-rate": "--c5", "machine": "--c1",
}  # fmt: skip

COLORED_PIXELS = """([id, name]) => {
  const canvas = document.querySelector(`#chart-${id} canvas`);
  const wanted = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(wanted.slice(i, i + 2), 16));
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let i = 0; i < data.length; i += 4) {
    const near = Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b) < 24;
    if (near && data[i + 3] > 160) count += 1;
  }
  return count;
}"""
DRAWING = "(id) => document.querySelector(`#chart-${id} canvas`).toDataURL()"


def quantity(text: str) -> float:
    """A number as the page writes it, in base units: `1.9 ms` → 0.0019, `4 m 05 s` → 245."""
    parts = re.findall(r"(-?[\d.,]+(?:e-?\d+)?)\s*(%|[µa-zA-Z]*)", text.removesuffix(" ago"))
    assert parts, f"no number in {text!r}"
    return sum(float(value.replace(",", "")) * UNITS[unit] for value, unit in parts)


def read(page: Page, selector: str) -> float:
    return quantity(page.locator(selector).inner_text())


def points(page: Page, chart: str = "loss") -> int:
    """How many points a chart says it draws."""
    label = page.locator(f"#chart-{chart} .plot").get_attribute("aria-label") or ""
    found = re.search(r"(\d+) points", label)
    assert found, label
    return int(found[1])


def cells(page: Page, table: str) -> list[list[str]]:
    rows = page.locator(f"#{table} tbody tr")
    return [rows.nth(i).locator("td").all_inner_texts() for i in range(rows.count())]


def frozen(url: str, document: dict[str, Any] | None = None) -> tuple[dict[str, Any], Callable[[Page], None]]:
    """One answer of the trainer, and what makes a page receive exactly that one and then nothing new."""
    if document is None:
        with urllib.request.urlopen(f"{url}api/live?since=0") as answer:
            document = json.load(answer)
    assert document is not None
    body = json.dumps(document)

    def install(page: Page) -> None:
        def fulfil(route: Route) -> None:
            route.fulfill(body=body, content_type="application/json")

        page.route("**/api/live*", fulfil)

    document["reset"] = True
    body = json.dumps(document)
    return document, install


# ---- what it shows -----------------------------------------------------------------------------


def test_numbers_on_the_page_are_those_the_trainer_sent(open_page: Open, trainer_url: str) -> None:
    sent, before = frozen(trainer_url)
    page = open_page(trainer_url, before=before).page
    expect(page.locator("#state")).to_have_text(sent["run"]["state"])
    expect(page.locator("#model")).to_have_text(sent["run"]["model"])
    expect(page.locator("#run-id")).to_have_text(sent["run"]["id"])
    facts = page.locator("#facts").inner_text()
    for part in (sent["run"]["device"], sent["run"]["precision"], f"pid {sent['run']['pid']}"):
        assert part in facts
    latest = sent["latest"]
    for selector, value in {
        "#loss": latest["loss"],
        "#grad-norm": latest["grad_norm"],
        "#throughput": latest["samples_per_second"],
        "#step-time": latest["step_time_seconds"],
        "#learning-rate": latest["learning_rate"],
        "#goodput": sent["goodput"]["ratio"],
    }.items():
        # A percentage has one decimal, everything else at least three significant digits.
        tolerance = {"abs": 6e-4} if selector == "#goodput" else {"rel": 6e-3}
        assert read(page, selector) == pytest.approx(value, **tolerance), selector
    age = sent["now"] - sent["checkpoints"][0]["at"]
    assert read(page, "#checkpoint-age") == pytest.approx(age, abs=0.51)
    progress = page.locator("#progress-facts li").all_inner_texts()
    assert progress[0] == f"epoch {sent['progress']['epoch'] + 1:,} of {sent['progress']['epochs']:,}"
    total = sent["progress"]["epochs"] * sent["progress"]["steps_per_epoch"]
    assert progress[1] == f"step {sent['progress']['step']:,} of {total:,}"
    share = float(page.locator("#progress").get_attribute("aria-valuenow") or "nan")
    assert share == pytest.approx(100 * sent["progress"]["step"] / total, abs=0.06)
    note = page.locator("#loss-note").inner_text()
    for name, value in latest["validation"].items():
        shown = re.search(rf"{name} ([\d.,e-]+\d)", note)
        assert shown and float(shown[1]) == pytest.approx(value, rel=1e-3)


def test_phases_machine_and_tables_are_those_the_trainer_sent(open_page: Open, trainer_url: str) -> None:
    sent, before = frozen(trainer_url)
    page = open_page(trainer_url, before=before).page
    shown = {}
    for item in page.locator("#phase-legend li").all():
        name, seconds, _ = item.locator("span:not(.swatch)").all_inner_texts()
        shown[name] = quantity(seconds)
    spent = {name: seconds for name, seconds in sent["phases"].items() if seconds > 0}
    assert shown == pytest.approx(spent, rel=6e-3)
    widths = [
        box["width"]
        for part in page.locator("#phase-bar div").all()
        if (box := part.bounding_box()) is not None
    ]
    whole = page.locator("#phase-bar").bounding_box()
    assert whole is not None
    assert sum(widths) == pytest.approx(whole["width"], abs=2)
    longest = max(spent, key=lambda name: spent[name])
    assert max(widths) / whole["width"] == pytest.approx(spent[longest] / sum(spent.values()), abs=0.01)
    lost = [quantity(text) for text in page.locator("#lost .num").all_inner_texts()]
    assert lost == pytest.approx(list(sent["goodput"]["lost_seconds"].values()), rel=6e-3)
    cpu, memory, disk = page.locator("#host .num").all_inner_texts()
    assert quantity(cpu) == pytest.approx(sent["host"]["cpu_ratio"], abs=6e-4)
    assert quantity(memory) == pytest.approx(sent["host"]["memory_ratio"], abs=6e-4)
    assert quantity(disk.removesuffix(" free")) == pytest.approx(sent["host"]["disk_free_bytes"], rel=6e-3)
    checkpoints = cells(page, "checkpoints")
    assert len(checkpoints) == len(sent["checkpoints"]) > 0
    for row, one in zip(checkpoints, sent["checkpoints"], strict=True):
        assert row[0] == f"{one['step']:,}"
        assert row[1] == one["kind"]
        assert quantity(row[3]) == pytest.approx(one["bytes"], rel=6e-3)
        assert quantity(row[4]) == pytest.approx(one["seconds"], rel=6e-3)
    if not sent["gpus"]:
        expect(page.locator("#gpus-empty")).to_have_text(
            f"No GPU: this run computes on {sent['run']['device']}."
        )


def test_alerts_commands_and_gpus_are_listed_worst_first(open_page: Open, player: Player) -> None:
    now = player.document()["now"]
    alert = {
        "state": "firing",
        "value": 97.25,
        "threshold": 90.0,
        "unit": "%",
        "since": now - 5,
        "labels": {},
    }
    player.changes = {
        "alert_mode": "sidecar",
        "alerts": [
            alert | {"name": "HighCPU", "severity": "warning", "summary": "CPU above 90 %"},
            alert | {"name": "SlowStep", "severity": "critical", "state": "pending", "summary": "slow"},
            alert | {"name": "HighGPUMemory", "severity": "critical", "summary": "full",
             "labels": {"device": "0"}},
        ],
        "commands": [
            {"id": "1", "action": "emergency_checkpoint", "source": "sidecar", "state": "done", "at": now - 2,
             "step": 399, "reason": "HighGPUMemory"},
        ],
        "gpus": [
            {"device": "0", "name": "H100", "utilization_ratio": 0.5, "memory_used_bytes": 3 * 2**30,
             "memory_total_bytes": 4 * 2**30, "temperature_celsius": 61, "power_watts": 412.4},
            {"device": "1", "name": "H100", "utilization_ratio": None, "memory_used_bytes": None,
             "memory_total_bytes": None, "temperature_celsius": None, "power_watts": None},
        ],
    }  # fmt: skip
    page = open_page(player.url).page
    table = page.get_by_role("table", name="Alerts pending or firing now")
    expect(table).to_be_visible()
    assert [row[1] for row in cells(page, "alerts")] == ["HighGPUMemory (device 0)", "HighCPU", "SlowStep"]
    assert cells(page, "alerts")[1][3:5] == ["97.3 %", "90 %"]
    assert cells(page, "commands")[0][1:] == [
        "emergency_checkpoint",
        "done",
        "399",
        "sidecar",
        "HighGPUMemory",
    ]
    expect(page.locator(".gpu").nth(0)).to_contain_text("3.00 GiB of 4.00 GiB")
    expect(page.locator(".gpu").nth(0)).to_contain_text("61 °C · 412 W")
    expect(page.locator(".gpu").nth(1)).to_contain_text("– °C · – W")
    expect(page.locator("#gpus-empty")).to_be_hidden()
    expect(page.locator("#alert-mode")).to_contain_text("sidecar")


def test_unknown_values_are_dashes_and_nothing_breaks(open_page: Open, player: Player) -> None:
    sent = player.document()

    def blank(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: blank(one) for key, one in value.items()}
        return None

    for part in ("latest", "host", "goodput", "phases", "progress"):
        sent[part] = blank(sent[part])
    sent["latest"]["validation"] = sent["latest"]["train"] = {}
    sent |= {"uptime_seconds": None, "checkpoints": [], "validation_series": {"step": [], "metrics": {}}}
    sent["series"] = {name: [] for name in sent["series"]}
    sent["latest"]["loss"] = "NaN"
    _, before = frozen(player.url, sent)
    opened = open_page(player.url, before=before)
    expect(opened.page.locator("#loss")).to_have_text("NaN")
    for name in ("grad-norm", "throughput", "step-time", "learning-rate", "goodput"):
        expect(opened.page.locator(f"#{name}")).to_have_text("–")
    expect(opened.page.locator("#checkpoint-age")).to_have_text("none")
    expect(opened.page.locator("#connection")).to_be_empty()
    assert "null" not in opened.page.locator("body").inner_text()
    assert "NaN" not in opened.page.locator("#charts").inner_text()
    assert opened.console == []


# ---- the charts --------------------------------------------------------------------------------


def test_charts_have_lines_and_move_with_the_training(open_page: Open, player: Player) -> None:
    page = open_page(player.url).page
    expect(page.locator(".chart")).to_have_count(len(CHARTS))
    before = {}
    for chart, color in CHARTS.items():
        assert page.evaluate(COLORED_PIXELS, [chart, color]) > 40, chart
        before[chart] = page.evaluate(DRAWING, chart)
    assert points(page) == 400
    player.advance(200)
    expect(page.locator("#progress-facts")).to_contain_text("step 600")
    assert points(page) == 600
    for chart, drawing in before.items():
        assert page.evaluate(DRAWING, chart) != drawing, chart


def test_reset_replaces_what_was_drawn(open_page: Open, player: Player) -> None:
    page = open_page(player.url).page
    player.advance(100)
    expect(page.locator("#progress-facts")).to_contain_text("step 500")
    assert points(page) == 500
    player.halve()
    expect(page.locator("#chart-loss .plot")).to_have_attribute("aria-label", re.compile(" 250 points"))
    player.advance(100)
    expect(page.locator("#progress-facts")).to_contain_text("step 600")
    assert points(page) == 300


def test_another_process_at_the_same_address_begins_a_new_history(open_page: Open, player: Player) -> None:
    opened = open_page(player.url)
    player.changes = {"run": {"pid": 999_999, "id": "the-next-run"}}
    expect(opened.page.locator("#run-id")).to_have_text("the-next-run")
    assert points(opened.page) == 400
    assert sum(url.endswith("since=0") for url in opened.requests) == 2


def test_pointing_at_one_chart_reads_the_same_step_in_all(open_page: Open, trainer_url: str) -> None:
    sent, before = frozen(trainer_url)
    page = open_page(trainer_url, before=before).page
    area = page.locator("#chart-loss .u-over").bounding_box()
    assert area is not None
    # The chart shows at least a second; a quick machine's record fills only the beginning of it.
    filled = min(1.0, sent["series"]["time"][-1] - sent["series"]["time"][0])
    page.mouse.move(area["x"] + 0.7 * filled * area["width"], area["y"] + 30)
    expect(page.locator("#chart-loss .chart-where")).to_contain_text("step")
    wheres = set(page.locator(".chart-where").all_inner_texts())
    assert len(wheres) == 1
    step = int(quantity(wheres.pop().split(" · ")[0].removeprefix("step ")))
    row = sent["series"]["step"].index(step)
    assert row < len(sent["series"]["step"]) - 1
    for chart, column in {"loss": "loss", "grad-norm": "grad_norm", "learning-rate": "learning_rate"}.items():
        shown = page.locator(f"#chart-{chart} .reading").first.inner_text()
        value = sent["series"][column][row]
        if value is None:
            assert shown == "–", chart
        else:
            assert quantity(shown) == pytest.approx(value, rel=6e-3), chart
    assert sent["series"]["learning_rate"][row] is not None


def test_arrow_keys_read_single_points_aloud(open_page: Open, trainer_url: str) -> None:
    sent, before = frozen(trainer_url)
    page = open_page(trainer_url, before=before).page
    plot = page.locator("#chart-grad-norm .plot")
    plot.focus()
    plot.press("End")
    plot.press("ArrowLeft")
    step = sent["series"]["step"][-2]
    expect(page.locator("#reader")).to_contain_text(f"step {step:,} · ")
    norm = quantity(page.locator("#reader").inner_text().split("clipping ")[1])
    assert norm == pytest.approx(sent["series"]["grad_norm"][-2], rel=6e-4)
    plot.press("Escape")
    expect(page.locator("#chart-grad-norm .chart-where")).to_be_empty()


def test_dragging_zooms_all_charts_and_zooming_out_restores_them(open_page: Open, trainer_url: str) -> None:
    _, before = frozen(trainer_url)
    page = open_page(trainer_url, before=before).page
    drawings = {chart: page.evaluate(DRAWING, chart) for chart in ("loss", "machine")}
    area = page.locator("#chart-loss .u-over").bounding_box()
    assert area is not None
    page.mouse.move(area["x"] + 40, area["y"] + 40)
    page.mouse.down()
    page.mouse.move(area["x"] + 140, area["y"] + 40, steps=4)
    page.mouse.up()
    expect(page.locator("#zoom-out")).to_be_visible()
    for chart, drawing in drawings.items():
        assert page.evaluate(DRAWING, chart) != drawing, chart
    page.locator("#zoom-out").click()
    expect(page.locator("#zoom-out")).to_be_hidden()
    page.mouse.move(0, 0)
    for chart, drawing in drawings.items():
        assert page.evaluate(DRAWING, chart) == drawing, chart


def test_scale_can_be_logarithmic_or_linear(open_page: Open, trainer_url: str) -> None:
    _, before = frozen(trainer_url)
    page = open_page(trainer_url, before=before).page
    button = page.get_by_role("button", name="Gradient norm: logarithmic scale")
    expect(button).to_have_attribute("aria-pressed", "true")
    drawing = page.evaluate(DRAWING, "grad-norm")
    button.click()
    expect(button).to_have_attribute("aria-pressed", "false")
    assert page.evaluate(DRAWING, "grad-norm") != drawing
    assert page.evaluate(COLORED_PIXELS, ["grad-norm", "--c2"]) > 40


def test_gradient_norm_shows_its_alert_threshold(open_page: Open, player: Player) -> None:
    page = open_page(player.url).page
    expect(page.locator("#grad-norm-note")).to_have_text("alert above 100")
    with_line = page.evaluate(COLORED_PIXELS, ["grad-norm", "--bad"])
    assert with_line > 60
    assert page.evaluate(COLORED_PIXELS, ["learning-rate", "--bad"]) == 0


# ---- where it is read --------------------------------------------------------------------------


def test_it_leads_to_all_runs_where_that_page_can_be_opened(open_page: Open, player: Player) -> None:
    player.changes = {"all_runs_page": "http://127.0.0.1:9465"}
    host = player.document()["run"]["host"]
    link, note = "#all-runs", "#all-runs-note"
    page = open_page(player.url).page
    expect(page.locator(link)).to_have_attribute("href", "http://127.0.0.1:9465/")
    expect(page.locator(note)).to_be_empty()
    # Seen from another machine, a loopback address would be that machine's own.
    far = open_page(player.url.replace("127.0.0.1", "far.localhost")).page
    expect(far.locator(note)).to_have_text(f"the page of all runs opens on {host} alone, at 127.0.0.1:9465")
    expect(far.locator(link)).to_be_hidden()
    for changed in ("https://gpu-17.example/runs", None, "javascript:alert(1)", "no address"):
        player.changes = {"all_runs_page": changed}
        for one in (page, far):
            expect(one.locator(link)).to_be_visible(visible=changed == "https://gpu-17.example/runs")
            expect(one.locator(note)).to_be_empty()
    player.changes = {}


@pytest.mark.parametrize("width", [320, 390, 820, 1440])
def test_no_horizontal_scroll_even_with_long_names(open_page: Open, player: Player, width: int) -> None:
    long = "x" * 150
    now = player.document()["now"]
    player.changes = {
        "run": {"id": long, "model": long, "host": long},
        "latest": {"train": {long: 1.0}, "validation": {long: 2.0}},
        "alerts": [
            {"name": long, "severity": "critical", "state": "firing", "value": 1e9, "threshold": 1e8,
             "unit": "", "since": now, "summary": long, "labels": {long: long}}
        ],
        "validation_series": {"step": [93], "metrics": {long: [0.5]}},
    }  # fmt: skip
    page = open_page(player.url, width=width).page
    expect(page.locator("#model")).to_have_text(long)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width <= 1_000:  # rows are cards: nothing lies beyond the edge of a table either
        cut = "one => one.scrollWidth > one.clientWidth"
        tables = page.locator(".scroll:visible")
        expect(tables.first).to_be_visible()
        assert [table.get_attribute("aria-label") for table in tables.all() if table.evaluate(cut)] == []


def test_dark_and_light_follow_the_reader_and_stay_legible(open_page: Open, trainer_url: str) -> None:
    _, before = frozen(trainer_url)
    page = open_page(trainer_url, before=before, scheme="light").page
    contrast = """(selector) => {
      const light = (color) => {
        const [r, g, b] = color.match(/[\\d.]+/g).map((v) => v / 255)
          .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const node = document.querySelector(selector);
      let ground = node;
      while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
      const [a, b] = [light(getComputedStyle(node).color), light(getComputedStyle(ground).backgroundColor)];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }"""
    grounds, drawings = {}, {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for selector in (
            "#loss",
            "#grad-norm-note",
            "#state",
            "#facts li",
            "th",
            ".chart-legend .name",
            "footer a",
        ):
            assert page.evaluate(contrast, selector) >= 4.5, (scheme, selector)
        grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        drawings[scheme] = page.evaluate(DRAWING, "loss")
        assert page.evaluate(COLORED_PIXELS, ["loss", "--c1"]) > 40
    assert grounds["light"] != grounds["dark"]
    assert drawings["light"] != drawings["dark"]


def test_it_can_be_found_through_landmarks_headings_and_captions(open_page: Open, trainer_url: str) -> None:
    page = open_page(trainer_url).page
    for role in ("banner", "main", "contentinfo"):
        expect(page.get_by_role(role)).to_have_count(1)
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    for name in (
        "Key numbers",
        "Alerts",
        "History",
        "Where the time goes",
        "Machine",
        "Checkpoints",
        "Commands",
    ):
        expect(page.get_by_role("region", name=name, exact=True)).to_have_count(1)
    expect(page.get_by_role("table", name="The last checkpoints, newest first")).to_be_visible()
    expect(page.get_by_role("progressbar", name="Training progress")).to_be_visible()
    assert page.locator("table:not(:has(caption))").count() == 0
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the charts")).to_be_focused()


def test_an_alert_is_announced_once_and_its_end_too(open_page: Open, player: Player) -> None:
    page = open_page(player.url).page
    expect(page.locator("#announcer")).to_be_empty()
    page.evaluate(
        """() => { window.said = []; new MutationObserver(() => said.push(announcer.textContent))
          .observe(announcer, { childList: true, characterData: true, subtree: true }); }"""
    )
    alert = {
        "name": "GradientExplosion", "severity": "critical", "state": "firing", "threshold": 100.0,
        "unit": "", "since": player.document()["now"], "summary": "Gradient norm above 100", "labels": {},
    }  # fmt: skip
    for value in (101.0, 202.0, 303.0):
        player.changes = {"alerts": [alert | {"value": value}]}
        expect(page.locator("#alerts tbody td").nth(3)).to_have_text(f"{value:.0f}")
    player.changes = {}
    expect(page.locator("#alerts-empty")).to_be_visible()
    assert page.evaluate("window.said") == [
        "critical alert GradientExplosion: Gradient norm above 100",
        "No alert is firing any more.",
    ]


# ---- what must never happen --------------------------------------------------------------------


def test_hostile_names_stay_text(open_page: Open, player: Player) -> None:
    hostile = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>&lt;b&gt;'
    now = player.document()["now"]
    player.changes = {
        "run": {"id": hostile, "model": hostile, "host": hostile, "device": hostile, "precision": hostile,
                "state": hostile},
        "latest": {"train": {hostile: 1.0, "__proto__": 2.0}, "validation": {hostile: 3.0}},
        "phases": {hostile: 1.0},
        "goodput": {"lost_seconds": {hostile: 1.0}},
        "alerts": [
            {"name": hostile, "severity": hostile, "state": hostile, "value": 1, "threshold": 1,
             "unit": hostile, "since": now, "summary": hostile, "labels": {hostile: hostile}}
        ],
        "alert_mode": hostile,
        "checkpoints": [{"step": 1, "kind": hostile, "at": now, "bytes": 1, "seconds": 1}],
        "commands": [
            {"id": hostile, "action": hostile, "source": hostile, "state": hostile, "at": now, "step": 1,
             "reason": hostile}
        ],
        "gpus": [{"device": hostile, "name": hostile, "utilization_ratio": 1, "memory_used_bytes": 1,
                  "memory_total_bytes": 1, "temperature_celsius": 1, "power_watts": 1}],
        "validation_series": {"step": [93, 186], "metrics": {hostile: [0.5, 0.6], "__proto__": [1, 2]}},
    }  # fmt: skip
    opened = open_page(player.url)
    page = opened.page
    for selector in ("#model", "#run-id", "#state", ".gpu h4", "#further dt", "#lost .name"):
        expect(page.locator(selector).first).to_contain_text(hostile)
    for table in ("alerts", "checkpoints", "commands"):
        expect(page.locator(f"#{table} tbody")).to_contain_text(hostile)
    expect(page.get_by_role("heading", name=f"Validation: {hostile}")).to_be_visible()
    assert page.locator("body img, body script").count() == 0
    assert page.evaluate("window.pwned") is None
    assert hostile in page.title()
    assert opened.console == []


def test_no_request_leaves_the_trainer_and_nothing_inline_is_allowed(
    open_page: Open, trainer_url: str
) -> None:
    opened = open_page(trainer_url)
    foreign = [url for url in opened.requests if not url.startswith((trainer_url, "data:"))]
    assert foreign == []
    paths = {url.removeprefix(trainer_url).split("?")[0] for url in opened.requests if url.startswith("http")}
    assert {"", "page.css", "page.js", "vendor/uPlot.iife.min.js", "api/live"} <= paths
    assert opened.console == []
    opened.page.evaluate(
        """() => { const one = document.createElement("script"); one.textContent = "window.ran = 1";
          document.body.append(one); }"""
    )
    assert opened.page.evaluate("window.ran") is None
    assert any("Content Security Policy" in text for text in opened.console)


# ---- when the trainer goes ---------------------------------------------------------------------


def test_a_silent_trainer_is_shown_and_its_return_too(open_page: Open, player: Player) -> None:
    page = open_page(player.url).page
    loss = page.locator("#loss").inner_text()
    player.stop()
    expect(page.locator("#connection")).to_contain_text(
        re.compile(
            r"Trainer not answering since \d\d:\d\d:\d\d \(no connection\)\. Last known state: running"
        )
    )
    expect(page.locator("#loss")).to_have_text(loss)
    assert page.title().startswith("not answering")
    assert points(page) == 400
    player.advance(10)
    player.start()
    expect(page.locator("#connection")).to_be_empty()
    expect(page.locator("#progress-facts")).to_contain_text("step 410")
    assert points(page) == 410


def test_after_the_end_the_last_data_stays(open_page: Open, player: Player) -> None:
    page = open_page(player.url).page
    player.changes = {"run": {"state": "finished"}}
    expect(page.locator("#state")).to_have_text("finished")
    player.stop()
    expect(page.locator("#connection")).to_contain_text("The run has ended (finished)")
    expect(page.locator("#connection")).to_have_attribute("data-kind", "ended")
    expect(page.locator("#state")).to_have_text("finished")
    assert points(page) == 400


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"status": 500, "body": "boom"}, "it answered 500"),
        ({"status": 200, "body": '{"version": 2}'}, "speaks version 2"),
    ],
)
def test_an_answer_it_cannot_use_is_named(
    open_page: Open, player: Player, answer: dict[str, Any], says: str
) -> None:
    page = open_page(player.url).page
    page.route("**/api/live*", lambda route: route.fulfill(content_type="application/json", **answer))
    expect(page.locator("#connection")).to_contain_text(says)
    page.unroute("**/api/live*")
    expect(page.locator("#connection")).to_be_empty()


def test_columns_of_unequal_length_are_refused_not_drawn(open_page: Open, player: Player) -> None:
    page = open_page(player.url).page
    player.changes = {"series": {"loss": [1.0]}}
    expect(page.locator("#connection")).to_contain_text("cannot show it: column loss has 1 values")
    player.changes = {}
    expect(page.locator("#connection")).to_be_empty()
    assert points(page) == 400
