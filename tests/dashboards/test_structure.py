"""The boards as files: as generated, sound, and such that a mistake in one would be found."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from terminal import Terminal

from obsinfra.catalog.alert_changes import alert_table
from obsinfra.dashboards.addresses import UIDS
from obsinfra.dashboards.asking import panels_of
from obsinfra.dashboards.structure import differences_after_sdk, problems
from obsinfra.dashboards.write import boards, dashboard_files
from obsinfra.monitoring.logging_config import configure_logging, get_logger, shutdown_logging

FILES = dashboard_files()
BOARDS = {path.stem: json.loads(text) for path, text in FILES.items() if path.suffix == ".json"}
RUN = BOARDS["run"]


def test_the_committed_files_are_what_the_generator_writes() -> None:
    committed = Path(__file__).parents[2] / "grafana"
    assert {path: (committed / path).read_text() for path in FILES} == FILES


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_is_sound_and_grafanas_own_types_take_it(name: str) -> None:
    assert problems(BOARDS[name]) == []
    assert differences_after_sdk(json.dumps(BOARDS[name])) == []


def test_uids_are_stable_and_nothing_belongs_to_one_grafana() -> None:
    assert {board["uid"] for board in BOARDS.values()} <= set(UIDS)
    assert all("id" not in board and "version" not in board for board in BOARDS.values())


def spoil(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    board = copy.deepcopy(RUN)
    change(board)
    return board


def first(board: dict[str, Any], title: str) -> dict[str, Any]:
    [panel] = [panel for panel in panels_of(board) if panel["title"] == title]
    return panel  # type: ignore[return-value]


MISTAKES: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("has a numeric id", lambda board: board.update(id=7)),
    ("is none of", lambda board: board.update(uid="abc123")),
    ("which nothing exports", lambda b: first(b, "Loss")["targets"][0].update(expr="obsinfra_los")),
    ("which is no variable", lambda b: first(b, "Loss")["targets"][0].update(expr="up{run=~'$rum'}")),
    ("does not ask the chosen", lambda b: first(b, "Loss")["targets"][0]["datasource"].update(uid="x")),
    ("does not say how to read", lambda b: first(b, "Loss").update(description="Loss.")),
    ("has no unit", lambda b: first(b, "Loss")["fieldConfig"]["defaults"].pop("unit")),
    ("looks at the whole range again", lambda b: first(b, "Loss")["targets"][0].update(
        expr="avg_over_time(obsinfra_train_loss[$__range])")),
    ("asks nothing", lambda b: first(b, "Loss").update(targets=[])),
    ("overlap", lambda b: first(b, "Loss")["gridPos"].update(w=13)),
    ("leaves the grid", lambda b: first(b, "Gradient norm")["gridPos"].update(w=13)),
    ("two queries of one name", lambda b: first(b, "Loss")["targets"][0].update(refId="B")),
    ("which is no alert", lambda b: first(b, "Loss").update(
        description="Read the runbook http://127.0.0.1:9465/runbooks/NoSuchAlert first, whatever it takes.")),
    ("which is no board", lambda b: first(b, "Throughput").update(links=[{"url": "/d/obsinfra-nowhere"}])),
    ("two panels are called", lambda b: first(b, "Loss").update(title="Gradient norm")),
    ("two panels have one id", lambda b: first(b, "Loss").update(id=1)),
]  # fmt: skip


@pytest.mark.parametrize(("said", "change"), MISTAKES, ids=[said for said, _ in MISTAKES])
def test_a_mistake_is_found(said: str, change: Callable[[dict[str, Any]], object]) -> None:
    assert any(said in problem for problem in problems(spoil(change)))


def test_what_grafanas_types_do_not_know_is_found() -> None:
    board = spoil(lambda board: first(board, "Loss")["options"]["legend"].update(colour="pink"))
    assert any("colour is not known" in found for found in differences_after_sdk(json.dumps(board)))


def test_a_users_threshold_is_the_line_that_is_drawn() -> None:
    changed = json.loads(dashboard_files(alert_table({"gradient_norm": 7.5}))[Path("dashboards/run.json")])
    norm = first(changed, "Gradient norm")
    assert norm["fieldConfig"]["defaults"]["thresholds"]["steps"][-1] == {"color": "red", "value": 7.5}
    assert "> 7.5" in norm["description"]


def test_an_alert_that_is_switched_off_leaves_no_line_and_no_gap() -> None:
    off = alert_table({}, {"gradient_norm": {"enabled": False}, "trainer_gone": {"enabled": False}})
    files = dashboard_files(off)
    assert files.keys() == FILES.keys()
    norm = first(json.loads(files[Path("dashboards/run.json")]), "Gradient norm")
    assert len(norm["fieldConfig"]["defaults"]["thresholds"]["steps"]) == 1
    assert len(boards(off)) == len(boards())


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal("dashboards", capsys, monkeypatch)


def test_written_is_up_to_date_until_a_setting_changes(terminal: Terminal, tmp_path: Path) -> None:
    assert terminal("check").code == 1
    assert terminal("write").code == 0
    assert terminal("check").code == 0
    (tmp_path / "obsinfra.toml").write_text("[thresholds]\ngradient_norm = 7.5\n")
    stale = terminal("check")
    assert (stale.code, "grafana/dashboards/run.json is out of date" in stale.out) == (1, True)
    assert "'obsinfra dashboards write'" in stale.out


def test_the_datasources_lead_to_each_other() -> None:
    """Metric to trace, trace to log and metric, log to trace: by uids that exist, in Grafana's notation."""
    document = yaml.safe_load(FILES[Path("provisioning/datasources/obsinfra.yml")])
    sources = {source["uid"]: source for source in document["datasources"]}
    assert {source["type"] for source in sources.values()} == {"prometheus", "jaeger", "loki"}
    metrics, traces, logs = (
        next(source for source in sources.values() if source["type"] == kind)["jsonData"]
        for kind in ("prometheus", "jaeger", "loki")
    )
    [exemplar] = metrics["exemplarTraceIdDestinations"]
    [line] = logs["derivedFields"]
    named = [exemplar["datasourceUid"], line["datasourceUid"]]
    assert [sources[uid]["type"] for uid in named] == ["jaeger", "jaeger"]
    assert sources[traces["tracesToLogsV2"]["datasourceUid"]]["type"] == "loki"
    assert sources[traces["tracesToMetrics"]["datasourceUid"]]["type"] == "prometheus"
    # $$ is how these files write a dollar; a single one would be a variable of the environment.
    assert "$${__trace.traceId}" in traces["tracesToLogsV2"]["query"]
    assert line["url"] == "$${__value.raw}"
    assert all("{$$__tags}" in query["query"] for query in traces["tracesToMetrics"]["queries"])
    [prometheus] = [source for source in sources.values() if source.get("isDefault")]
    assert prometheus["uid"] == RUN["templating"]["list"][0]["current"]["value"]


def test_a_log_line_and_an_exemplar_name_the_trace_as_the_links_expect(tmp_path: Path) -> None:
    """The pattern that leads from a log to its trace, on a line that the real logging wrote."""
    configure_logging(tmp_path, run="some-run", model="digits", terminal=False)
    trace_id = "57dfda3ebacaff5872a16e2bfe75925a"
    get_logger("training").info("validation", trace_id=trace_id)
    shutdown_logging()
    [line] = (tmp_path / "training.jsonl").read_text().splitlines()
    document = yaml.safe_load(FILES[Path("provisioning/datasources/obsinfra.yml")])
    [logs] = [source for source in document["datasources"] if source["type"] == "loki"]
    found = re.search(logs["jsonData"]["derivedFields"][0]["matcherRegex"].replace("$$", "$"), line)
    assert found is not None and found[1] == trace_id


def test_the_boards_lie_where_grafana_looks() -> None:
    document = yaml.safe_load(FILES[Path("provisioning/dashboards/obsinfra.yml")])
    [provider] = document["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    assert not provider["allowUiUpdates"]
