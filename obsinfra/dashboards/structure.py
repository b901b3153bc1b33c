"""What must hold of every board's JSON, whoever wrote it: found by reading it, without Grafana.

Called by `obsinfra dashboards check` and the tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from obsinfra.alerting.dashboard_recordings import DASHBOARD_RECORDINGS
from obsinfra.alerting.prometheus_rules import RUNBOOKS
from obsinfra.alerting.promql import recordings
from obsinfra.catalog import stack_metrics
from obsinfra.catalog.alerts import ALERTS, BY_NAME
from obsinfra.catalog.metrics import METRICS, Metric
from obsinfra.dashboards.addresses import UIDS
from obsinfra.dashboards.asking import Document, panels_of

WIDTH = 24
MACROS = {"__range", "__interval", "__rate_interval"}
UNKNOWN_TO_SDK = ("step", "titleFormat", "textFormat", "useValueForTime")
"""Fields of Prometheus's annotation queries that the SDK's type does not have."""

_METRIC = re.compile(r"\b(obsinfra[_:][\w:]+)")
_USED = re.compile(r"\$\{?(\w+)")
_BOARD = re.compile(r"/d/([\w-]+)")
_RUNBOOK = re.compile(re.escape(RUNBOOKS) + r"/(\w+)")


def problems(board: Document) -> list[str]:
    """Everything wrong with a board; empty is what is wanted."""
    title = board.get("title", "a board without title")
    return [f"{title}: {problem}" for problem in _problems(board)]


def differences_after_sdk(text: str) -> list[str]:
    """Places where a board changes when the SDK's types read and write it: what they do not know, or refuse.

    Args:
        text: the board as JSON.
    """
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    before = json.loads(text)
    for annotation in before["annotations"]["list"]:
        for name in UNKNOWN_TO_SDK:
            annotation.pop(name, None)
    after = json.loads(json.dumps(Dashboard.from_json(before), cls=JSONEncoder))
    return list(_different(before, after, ""))


def known_names() -> set[str]:
    """Every name of ours that a query may use: samples of the catalogue, and what is recorded."""
    names = {record.name for record in DASHBOARD_RECORDINGS}
    names |= {record.name for alert in ALERTS for record in recordings(alert.condition)}
    for metric in METRICS:
        names |= sample_names(metric)
    return names


def sample_names(metric: Metric) -> set[str]:
    """Names its samples have on the wire."""
    if metric.kind == "histogram":
        return {f"{metric.name}_{part}" for part in ("bucket", "sum", "count")}
    return {metric.sample_name}


def _problems(board: Document) -> Iterator[str]:
    if board.get("id") is not None:
        yield "has a numeric id, which belongs to one Grafana alone"
    if board.get("uid") not in UIDS:
        yield f"uid {board.get('uid')!r} is none of {', '.join(UIDS)}"
    variables = {variable["name"] for variable in board["templating"]["list"]}
    if "datasource" not in variables:
        yield "no variable for the datasource"
    panels = list(panels_of(board))
    numbers = [panel["id"] for panel in board["panels"]] + [
        panel["id"] for row in board["panels"] for panel in row.get("panels", ())
    ]
    if len(set(numbers)) != len(numbers):
        yield "two panels have one id"
    titles = [panel["title"] for panel in panels]
    for title in {title for title in titles if titles.count(title) > 1}:
        yield f"two panels are called {title!r}"
    yield from _overlaps(board["panels"])
    known = known_names()
    known |= {value.sample_name for value in vars(stack_metrics).values() if isinstance(value, Metric)}
    for panel in panels:
        for problem in _panel_problems(panel, known, variables):
            yield f"panel {panel['title']!r} {problem}"
    for annotation in board["annotations"]["list"]:
        yield from _query_problems(f"mark {annotation['name']!r}", annotation, known, variables)
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            asked = {"expr": variable["query"]["query"], "datasource": variable["datasource"]}
            yield from _query_problems(f"variable {variable['name']!r}", asked, known, variables)


def _panel_problems(panel: Document, known: set[str], variables: set[str]) -> Iterator[str]:
    about = panel.get("description", "")
    if len(about) < 40:
        yield "does not say how to read it"
    for alert in _RUNBOOK.findall(about):
        if alert not in BY_NAME:
            yield f"names the runbook of {alert}, which is no alert"
    targets = panel.get("targets", [])
    if not targets:
        yield "asks nothing"
    refs = [target["refId"] for target in targets]
    if len(set(refs)) != len(refs):
        yield "has two queries of one name"
    defaults = panel["fieldConfig"]["defaults"]
    if panel["type"] != "table" and not defaults.get("unit"):
        yield "has no unit"
    for target in targets:
        yield from _query_problems("", target, known, variables)
        if not target.get("instant") and "[$__range" in target["expr"]:
            yield "looks at the whole range again for each of its points"
    for board in _BOARD.findall(json.dumps(panel)):
        if board not in UIDS:
            yield f"links to {board}, which is no board"


def _query_problems(where: str, asked: Document, known: set[str], variables: set[str]) -> Iterator[str]:
    expression = asked["expr"]
    said = f"{where} " if where else ""
    if asked.get("datasource", {}).get("uid") != "${datasource}":
        yield f"{said}does not ask the chosen datasource"
    for name in _METRIC.findall(expression):
        if name not in known:
            yield f"{said}asks for {name}, which nothing exports"
    for name in _USED.findall(expression):
        if name not in variables | MACROS:
            yield f"{said}uses ${name}, which is no variable"


def _overlaps(panels: list[dict[str, Any]]) -> Iterator[str]:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        if place["x"] + place["w"] > WIDTH:
            yield f"panel {panel.get('title')!r} leaves the grid"
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                if (x, y) in taken:
                    yield f"panels {taken[x, y]!r} and {panel.get('title')!r} overlap"
                    return
                taken[x, y] = panel.get("title", "")


def _different(before: Any, after: Any, where: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            if key not in after:
                yield f"{where}.{key} is not known"
            elif key in before:
                yield from _different(before[key], after[key], f"{where}.{key}")
            elif after[key] is not None:
                yield f"{where}.{key} is missing"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for place, pair in enumerate(zip(before, after, strict=True)):
            yield from _different(*pair, f"{where}[{place}]")
    elif before != after:
        yield f"{where} is {before!r}, and {after!r} to the SDK"
