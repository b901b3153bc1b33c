"""Every query of every panel, asked of real Prometheuses that watched real runs.

One stack, one exploding, killed and resumed run and one of two ranks serve all of these tests.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from observed_runs import RANKS, SCRAPE_SECONDS, SINGLE, Observed, observed_runs
from PIL import Image
from stack_tools import needs_stack
from stack_versions import NEWER
from terminal import Terminal

from obsinfra.catalog.metrics import (
    RECORDED_PER_RANK,
    RECORDED_PER_RUN,
    SERIES_PER_ACTION,
    SERIES_PER_DEVICE,
    SERIES_PER_RANK,
)
from obsinfra.dashboards.asking import Asked, Prometheus, Range, choose, filled, panels_of, put_questions
from obsinfra.dashboards.preview import draw_board
from obsinfra.dashboards.reading import table_of

pytestmark = [pytest.mark.stack, pytest.mark.slow, needs_stack]

BOARDS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parents[2] / "grafana/dashboards").glob("*.json"))
}
MAX_SAMPLES = 50_000
"""That any query may look at, on runs of this length: what a query costs wherever it runs."""

each_board = pytest.mark.parametrize("board", BOARDS)
each_prometheus = pytest.mark.parametrize("version", ["installed", NEWER.name])

NEVER_HAPPENED = {
    SINGLE: {
        ("run", "Checkpoints committed and failed", "B"): "no checkpoint failed",
        ("run", "Checkpoints committed and failed", "C"): "no writer died",
        ("run", "Remote copy", "A"): "no remote is configured",
        ("alerts", "Escalated and held back", "A"): "the policy had no reason to",
        ("alerts", "Handing alerts on", "C"): "nobody is notified by anything that could fail",
    },
    RANKS: {
        ("fleet", "Oldest checkpoint against promise", "A"): "it makes no checkpoints",
        ("gpu-host", "Memory errors", "B"): "no XID error",
    },
}
"""Queries that rightly answer nothing about a run, and why; those about absent hardware come on top."""

HARDWARE = {
    "obsinfra_gpu_memory_total_bytes": re.compile("obsinfra_gpu_|obsinfra:gpus"),
    "obsinfra_cuda_allocator_bytes": re.compile("obsinfra_cuda_"),
    "obsinfra_cgroup_memory_limit_bytes": re.compile("obsinfra_cgroup_"),
} | {
    sign: re.compile(sign)
    for sign in (
        "obsinfra_mfu_ratio",
        "obsinfra_hfu_ratio",
        "obsinfra_compile_recompiles_total",
        "obsinfra_compile_graph_breaks_total",
        "obsinfra_compile_fallbacks_total",
        "obsinfra_oom_recoveries_total",
        "obsinfra_micro_batch_rows",
        "obsinfra_memory_exhaustion_seconds",
        "obsinfra_data_records_skipped_total",
    )
}
"""A metric that is there where the hardware, or what it watches, is → queries that are about it."""


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    with observed_runs(tmp_path_factory.mktemp("observed"), NEWER) as seen:
        yield seen


def asked(observed: Observed, version: str, board: str, **wanted: str) -> list[Asked]:
    """All queries of a board and what this Prometheus answers."""
    if version not in observed.urls:
        pytest.skip("no newer Prometheus; see tests/stack_versions.py")
    prometheus = Prometheus(observed.urls[version])
    document = BOARDS[board]
    chosen = choose(document, prometheus, observed.over, wanted)
    try:
        return list(put_questions(document, prometheus, observed.over, chosen))
    finally:
        prometheus.close()


def named(legend: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels[match[1]], legend)


def empty(found: list[Asked], board: str) -> set[tuple[str, str, str]]:
    return {(board, one.panel["title"], one.target["refId"]) for one in found if not one.answer.series}


def expected_empty(observed: Observed, version: str, board: str, run: str, found: list[Asked]) -> set[Any]:
    prometheus = Prometheus(observed.urls[version])
    lacking = [
        about
        for sign, about in HARDWARE.items()
        if not prometheus.instant(f'last_over_time({sign}{{run="{run}"}}[1h])', observed.over.end).series
    ]
    hardware = {
        (board, one.panel["title"], one.target["refId"])
        for one in found
        if any(about.search(one.answer.query) for about in lacking)
    }
    return hardware | {place for place in NEVER_HAPPENED[run] if place[0] == board}


def about_alerts(found: list[Asked], board: str, run: str) -> set[tuple[str, str, str]]:
    """Queries that answer something only while an alert happens to fire."""
    return {
        (board, one.panel["title"], one.target["refId"])
        for one in found
        if "ALERTS{" in one.answer.query and (one.target.get("instant") or run == RANKS)
    }


@each_prometheus
@each_board
def test_every_query_answers_about_a_run_to_which_it_all_happened(
    observed: Observed, version: str, board: str
) -> None:
    found = asked(observed, version, board, run=SINGLE)
    never = expected_empty(observed, version, board, SINGLE, found)
    assert empty(found, board) - about_alerts(found, board, SINGLE) == never


@each_prometheus
@pytest.mark.parametrize("board", ["fleet", "gpu-host", "ranks"])
def test_every_query_answers_about_a_run_of_two_ranks_with_gpus(
    observed: Observed, version: str, board: str
) -> None:
    found = asked(observed, version, board, run=RANKS)
    never = expected_empty(observed, version, board, RANKS, found)
    assert empty(found, board) - about_alerts(found, board, RANKS) == never
    ranks = {
        series.labels["rank"] for one in found for series in one.answer.series if "rank" in series.labels
    }
    assert board == "fleet" or ranks == {"0", "1"}


@each_prometheus
@each_board
def test_no_query_is_expensive(observed: Observed, version: str, board: str) -> None:
    """By Prometheus's own count of the samples it looked at, which no busy machine changes."""
    found = asked(observed, version, board, run=SINGLE)
    costly = {one.answer.query: one.answer.samples for one in found if one.answer.samples > MAX_SAMPLES}
    assert costly == {}
    assert all(not math.isnan(one.answer.seconds) for one in found)


@each_board
def test_legends_and_columns_name_labels_that_the_answers_have(observed: Observed, board: str) -> None:
    for one in asked(observed, "installed", board, run=RANKS):
        if "ALERTS{" in one.answer.query:
            continue  # alerts about the stack name no run, and Grafana leaves that part of the legend out
        labels = set(re.findall(r"\{\{(\w+)\}\}", one.target.get("legendFormat", "")))
        for series in one.answer.series:
            assert labels <= series.labels.keys(), (one.panel["title"], one.answer.query, series.labels)
        if one.panel["type"] in ("timeseries", "statetimeline"):
            names = [named(one.target["legendFormat"], series.labels) for series in one.answer.series]
            assert len(set(names)) == len(names), f"{one.panel['title']}: lines of one name: {names}"


@each_prometheus
@each_board
def test_marks_show_what_happened(observed: Observed, version: str, board: str) -> None:
    if version not in observed.urls:
        pytest.skip("no newer Prometheus; see tests/stack_versions.py")
    prometheus = Prometheus(observed.urls[version])
    document = BOARDS[board]
    chosen = choose(document, prometheus, observed.over, {"run": SINGLE})
    seen: dict[str, list[dict[str, Any]]] = {}
    for mark in document["annotations"]["list"]:
        answer = prometheus.range(filled(mark["expr"], {**chosen, **observed.over.macros()}), observed.over)
        seen[mark["name"]] = [dict(series.labels) for series in answer.series]
        for series in answer.series:
            assert all(value > 0 for _, value in series.points), mark["name"]
            needed = set(re.findall(r"\{\{(\w+)\}\}", mark["titleFormat"]))
            assert needed <= series.labels.keys(), (mark["name"], series.labels)
    assert "GradientExplosion" in {labels["alertname"] for labels in seen["Alerts"]}
    assert {"emergency", "regular"} <= {labels["kind"] for labels in seen["Checkpoints"]}
    commands = {(labels["action"], labels["outcome"]) for labels in seen["Commands"]}
    assert {("emergency_checkpoint", "done"), ("checkpoint", "done")} <= commands
    assert seen["Starts"]


def test_the_run_board_says_what_the_run_did(observed: Observed) -> None:
    """Some numbers against what is known otherwise: the fault, its threshold, the restart."""
    found = asked(observed, "installed", "run", run=SINGLE)

    def answers(title: str, ref: str = "A") -> Any:
        [one] = [one for one in found if (one.panel["title"], one.target["refId"]) == (title, ref)]
        return one.answer.series

    [state] = answers("State")
    assert state.labels["state"] == "running"
    [peak] = answers("Gradient norm", "B")
    [line] = [panel for panel in panels_of(BOARDS["run"]) if panel["title"] == "Gradient norm"]
    threshold = line["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]["value"]
    assert max(value for _, value in peak.points) > threshold == 100
    [progress] = answers("Progress")
    assert 0 < progress.last < 1
    phases = {series.labels["phase"] for series in answers("Phases")}
    assert {"data", "forward", "backward", "optimizer", "validation"} <= phases
    moment = max(at for series in answers("Phases") for at, _ in series.points)
    whole = sum(value for series in answers("Phases") for at, value in series.points if at == moment)
    assert whole == pytest.approx(1)
    causes = {series.labels["cause"] for series in answers("Lost time by cause")}
    assert {"startup", "outside_step", "validation"} <= causes
    outcomes = {(row.labels["action"], row.labels["outcome"]) for row in answers("Commands in this time")}
    assert ("checkpoint", "done") in outcomes or ("emergency_checkpoint", "done") in outcomes


def test_the_slower_rank_is_the_straggler(observed: Observed) -> None:
    found = asked(observed, "installed", "ranks", run=RANKS)
    [first, *_] = [one for one in found if one.panel["title"] == "Ranks, slowest first"]
    ratio = {series.labels["rank"]: series.last for series in first.answer.series}
    assert ratio["1"] > ratio["0"]
    headings, cells = table_of(first.panel, [one for one in found if one.panel is first.panel])
    assert [row[headings.index("Rank")] for row in cells] == ["1", "0"]


@pytest.mark.parametrize("along", ["obsinfra_step", "obsinfra:wall_seconds:max"])
def test_curves_that_are_laid_over_each_other_have_both_coordinates(observed: Observed, along: str) -> None:
    """Grafana joins the two answers by time and run: both must have the same of them."""
    overlaid = [
        one for one in asked(observed, "installed", "compare", along=along) if one.panel["type"] == "xychart"
    ]
    for x, y in zip(overlaid[::2], overlaid[1::2], strict=True):
        places = {series.labels["run"]: {at for at, _ in series.points} for series in x.answer.series}
        assert places.keys() == {SINGLE, RANKS}
        for series in y.answer.series:
            assert series.labels.keys() == {"run"}
            assert {at for at, _ in series.points} & places[series.labels["run"]], y.panel["title"]


def test_a_run_keeps_within_its_budget_of_series(observed: Observed) -> None:
    prometheus = Prometheus(observed.urls["installed"])

    def count(query: str) -> int:
        answer = prometheus.instant(f"count({query})", observed.over.end)
        return int(answer.series[0].last) if answer.series else 0

    for run, rank in ((SINGLE, "0"), (RANKS, "0"), (RANKS, "1")):
        of_rank = f'run="{run}", rank="{rank}"'
        scraped = count(f'{{job="trainers", {of_rank}}}')
        devices = count(f"obsinfra_gpu_memory_total_bytes{{{of_rank}}}")
        actions = count(f"count by (action) (obsinfra_control_commands_total{{{of_rank}}})")
        allowed = SERIES_PER_RANK + devices * SERIES_PER_DEVICE + actions * SERIES_PER_ACTION
        assert 100 < scraped <= allowed, (run, rank)
    recorded = count(f'{{run="{RANKS}", __name__=~"obsinfra:.*"}}')
    assert 0 < recorded <= RECORDED_PER_RUN + 2 * RECORDED_PER_RANK


ABOVE_A_LEGEND = ("timeseries", "xychart", "state-timeline")
"""Kinds of panels that name what they draw below it."""


def coloured(picture: Image.Image, panel: Mapping[str, Any], rows: int) -> int:
    """Pixels of a panel that are neither ground, grid nor text, without its legend."""
    place = panel["gridPos"]
    top, bottom = place["y"] + 3.0, place["y"] + 2.0 + place["h"]
    if panel["type"] in ABOVE_A_LEGEND:
        bottom -= 1.4
    unit, column = picture.height / rows, picture.width / 24
    left, right = place["x"] * column, (place["x"] + place["w"]) * column
    part = picture.crop((round(left), round(top * unit), round(right), round(bottom * unit)))
    return sum(number for number, rgb in part.getcolors(1 << 24) or [] if max(rgb) - min(rgb) > 60)


def drawable(panel: Mapping[str, Any], found: list[Asked]) -> bool:
    """Whether an answer has a number that is drawn for sure: a curve at 0 lies on the edge of its axes."""
    least = 0.0 if panel["type"] in ("timeseries", "xychart") else -math.inf
    values = [value for one in found for series in one.answer.series for _, value in series.points]
    return any(math.isfinite(value) and value > least for value in values)


def test_previews_draw_what_was_answered(
    observed: Observed, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each panel that has an answer, and no other, has colours: however small, in a long range, that is."""
    terminal = Terminal("dashboards", capsys, monkeypatch)
    unmarked = tmp_path / "dashboards"  # a mark is coloured, too
    unmarked.mkdir()
    for name, board in BOARDS.items():
        (unmarked / f"{name}.json").write_text(json.dumps({**board, "annotations": {"list": []}}))
    seconds = math.ceil(observed.over.seconds)
    end = observed.over.end
    observed = replace(observed, over=Range(end - seconds, end, SCRAPE_SECONDS))
    drawn = terminal(
        "preview", f"--prometheus={observed.urls['installed']}", f"--out={tmp_path}", f"--until={end}",
        f"--range={seconds}s", f"--scrape-interval={SCRAPE_SECONDS:.0f}s", f"--var=run:run={SINGLE}",
        f"--folder={tmp_path}", f"--var=ranks:run={RANKS}",
    )  # fmt: skip
    assert drawn.code == 0, drawn.err
    chosen = {"run": SINGLE, "ranks": RANKS}
    for name, board in BOARDS.items():
        picture = tmp_path / f"dashboard-{name}.png"
        assert picture.stat().st_size < 300_000
        found = asked(observed, "installed", name, **({"run": chosen[name]} if name in chosen else {}))
        rows = 2 + max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
        with Image.open(picture) as image:
            pixels = image.convert("RGB")
        for panel in panels_of(board):
            answers = [one for one in found if one.panel["id"] == panel["id"]]
            number = coloured(pixels, panel, rows)
            if drawable(panel, answers):
                assert number > 0, (name, panel["title"])
            elif not any(one.answer.series for one in answers):
                assert number == 0, (name, panel["title"])


def test_a_preview_shows_a_threshold_that_the_answers_reach(observed: Observed, tmp_path: Path) -> None:
    """The gradients exploded: the red line at 100 is across the panel."""
    prometheus = Prometheus(observed.urls["installed"])
    target = tmp_path / "run.png"
    board = copy.deepcopy(BOARDS["run"])
    [panel] = [panel for panel in panels_of(board) if panel["title"] == "Gradient norm"]
    counts = []
    for style in ("dashed", "off"):
        panel["fieldConfig"]["defaults"]["custom"]["thresholdsStyle"]["mode"] = style
        draw_board({**board, "panels": [panel]}, prometheus, observed.over, {"run": SINGLE}, target)
        with Image.open(target) as image:
            pixels = image.convert("RGB").getcolors(1 << 24) or []
        counts.append(sum(number for number, (r, g, b) in pixels if r - g > 100 and r - b > 60))
    assert counts[0] > counts[1] + 100


def test_a_trace_hangs_on_the_step_time(observed: Observed) -> None:
    """The exemplars of the panel are ids of traces that the run's own trace file has."""
    prometheus = Prometheus(observed.urls["installed"])
    [panel] = [panel for panel in panels_of(BOARDS["run"]) if panel["title"] == "Step time"]
    [target] = [target for target in panel["targets"] if target.get("exemplar")]
    chosen = choose(BOARDS["run"], prometheus, observed.over, {"run": SINGLE})
    query = filled(target["expr"], {**chosen, **observed.over.macros()})
    ids = {exemplar["labels"]["trace_id"] for exemplar in prometheus.exemplars(query, observed.over)}
    spans = (observed.stack.output_dir / SINGLE / "traces" / "spans.jsonl").read_text().splitlines()
    assert ids and ids <= {json.loads(line)["trace_id"] for line in spans}
