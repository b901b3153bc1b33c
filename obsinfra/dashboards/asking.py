"""A board's queries put to a Prometheus as Grafana would: variables filled in, range and step chosen.

Called by the preview, the benchmark and the tests. Reads the boards' JSON; needs neither Grafana nor its SDK.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from obsinfra.dashboards.datasources import SCRAPE_INTERVAL
from obsinfra.errors import UserError

Document = Mapping[str, Any]
POINTS = 480
"""Points a panel asks for, as one of half a screen's width does."""

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LABEL_VALUES = re.compile(r"label_values\((?P<series>.*),\s*(?P<label>\w+)\)$")
_VARIABLE = re.compile(r"\$\{(\w+)(?::[^}]*)?\}|\$(\w+)")


@dataclass(frozen=True, slots=True)
class Range:
    """A time range as Grafana turns it into queries.

    Attributes:
        start, end: epoch seconds.
        scrape_seconds: distance of samples, the finest step.
    """

    start: float
    end: float
    scrape_seconds: float = 5.0

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.start

    @property
    def step(self) -> float:
        """Seconds between two points of a panel."""
        return max(self.scrape_seconds, math.ceil(self.seconds / POINTS))

    def moments(self) -> list[float]:
        """Where a range query has points: multiples of the step, as Grafana asks, so that a refresh does not
        move the curve."""
        first = math.floor(self.start / self.step) * self.step
        return [first + number * self.step for number in range(int((self.end - first) / self.step) + 1)]

    def macros(self) -> dict[str, str]:
        """Grafana's own variables."""
        rate = max(self.step + self.scrape_seconds, 4 * self.scrape_seconds)
        return {
            "__interval": text(self.step),
            "__rate_interval": text(rate),
            "__range": text(max(1.0, self.seconds)),
        }


@dataclass(frozen=True, slots=True)
class Series:
    """One series of an answer: its labels and (epoch seconds, value)."""

    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]

    @property
    def last(self) -> float:
        """Its last value."""
        return self.points[-1][1]


@dataclass(frozen=True, slots=True)
class Answer:
    """What Prometheus said to a query.

    Attributes:
        seconds: that it spent evaluating, by its own statistics; NaN where it keeps none.
        samples: that it looked at.
    """

    query: str
    series: Sequence[Series]
    seconds: float
    samples: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A query of a panel as the board's JSON has it, with what came back."""

    panel: Document
    target: Document
    answer: Answer = field(compare=False)


class Prometheus:
    """The HTTP API of one Prometheus.

    Args:
        url: its address.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        # Not through a proxy of the environment: it is this machine's, or one the user named.
        self._client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def close(self) -> None:
        """Give its connections back."""
        self._client.close()

    def instant(self, query: str, at: float) -> Answer:
        """The query's value at a moment (epoch seconds)."""
        return self._answer(query, "/api/v1/query", {"query": query, "time": f"{at:.3f}"})

    def range(self, query: str, over: Range) -> Answer:
        """The query over a range."""
        parameters = {
            "query": query,
            "start": f"{over.moments()[0]:.3f}",
            "end": f"{over.end:.3f}",
            "step": f"{over.step:g}",
        }
        return self._answer(query, "/api/v1/query_range", parameters)

    def label_values(self, label: str, series: str, over: Range) -> list[str]:
        """Values of a label within the range."""
        where = {"match[]": series, "start": f"{over.start:.0f}", "end": f"{over.end:.0f}"}
        found: list[str] = self.ask(f"/api/v1/label/{label}/values", where)
        return found

    def exemplars(self, query: str, over: Range) -> list[dict[str, Any]]:
        """The exemplars on the series of a query: `labels`, `value`, `timestamp`."""
        said = self.ask(
            "/api/v1/query_exemplars",
            {"query": query, "start": f"{over.start:.3f}", "end": f"{over.end:.3f}"},
        )
        return [exemplar for series in said for exemplar in series["exemplars"]]

    def ask(self, path: str, parameters: Mapping[str, str] | None = None) -> Any:
        """`data` of the answer.

        Raises:
            UserError: no Prometheus answers there, or it refuses the query.
        """
        try:
            answer = self._client.get(path, params=dict(parameters or {}))
            document = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise UserError(
                f"no Prometheus answers at {self.url}: {error}",
                "the address of one",
                "start it with 'obsinfra up', or name another with --prometheus",
            ) from error
        if document.get("status") != "success":
            raise UserError(
                f"Prometheus refuses {(parameters or {}).get('query', path)}: {document.get('error')}",
                "a query it can answer",
            )
        return document["data"]

    def _answer(self, query: str, path: str, parameters: dict[str, str]) -> Answer:
        data = self.ask(path, parameters | {"stats": "all"})
        series = [
            Series(
                one["metric"],
                [(float(at), float(value)) for at, value in one.get("values") or [one["value"]]],
            )
            for one in _of_type(data)
        ]
        stats = data.get("stats", {})
        return Answer(
            query,
            series,
            float(stats.get("timings", {}).get("evalTotalTime", math.nan)),
            int(stats.get("samples", {}).get("totalQueryableSamples", 0)),
        )


def _of_type(data: Document) -> list[dict[str, Any]]:
    if data["resultType"] == "scalar":
        return [{"metric": {}, "value": data["result"]}]
    found: list[dict[str, Any]] = data["result"]
    return found


def panels_of(board: Document) -> Iterator[Document]:
    """Its panels, those of collapsed rows included; rows themselves left out."""
    for panel in board["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def choose(
    board: Document, prometheus: Prometheus, over: Range, wanted: Mapping[str, str] | None = None
) -> dict[str, str]:
    """A value for each variable, as Grafana has it when the board opens; `wanted` overrides it.

    A variable without values becomes the empty text, or what "All" stands for.
    """
    chosen: dict[str, str] = {}
    for variable in board["templating"]["list"]:
        name = variable["name"]
        if wanted and name in wanted:
            chosen[name] = wanted[name]
        elif variable["type"] == "query":
            if variable.get("includeAll"):
                chosen[name] = variable["allValue"]
                continue
            found = _LABEL_VALUES.match(filled(variable["query"]["query"], chosen))
            assert found is not None, variable["query"]
            values = prometheus.label_values(found["label"], found["series"], over)
            chosen[name] = _sorted(values, variable["sort"])[0] if values else ""
        else:
            chosen[name] = str(variable["current"]["value"])
    return chosen


def filled(expression: str, values: Mapping[str, str]) -> str:
    """The expression with variables and macros filled in.

    Raises:
        KeyError: one is not known.
    """
    return _VARIABLE.sub(lambda match: values[match[1] or match[2]], expression)


def put_questions(
    board: Document, prometheus: Prometheus, over: Range, chosen: Mapping[str, str]
) -> Iterator[Asked]:
    """Every query of every panel, asked."""
    for panel in panels_of(board):
        for target in panel.get("targets", ()):
            query = filled(target["expr"], {**chosen, **over.macros()})
            answer = (
                prometheus.instant(query, over.end)
                if target.get("instant")
                else prometheus.range(query, over)
            )
            yield Asked(panel, target, answer)


def text(seconds: float) -> str:
    """Seconds as a Prometheus duration."""
    return f"{round(seconds * 1000)}ms" if seconds != round(seconds) else f"{round(seconds)}s"


def seconds_of(duration: str) -> float:
    """`90s`, `15m`, `2h` → seconds.

    Raises:
        UserError: it is no duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", duration)
    if match is None:
        raise UserError(f"duration {duration!r}", "a number with ms, s, m, h or d, as 15m")
    return float(match[1]) * _UNITS[match[2]]


def default_range(board: Document, now: float) -> Range:
    """The range a board opens with."""
    span = seconds_of(str(board["time"]["from"]).removeprefix("now-"))
    return Range(now - span, now, seconds_of(SCRAPE_INTERVAL))


def _sorted(values: Sequence[str], sort: int) -> list[str]:
    """As Grafana's sort orders 3 (numbers), 7 and 8 (natural, up and down) do."""

    def natural(value: str) -> list[tuple[int, int, str]]:
        parts = re.split(r"(\d+)", value)
        return [(0, int(part), "") if part.isdigit() else (1, 0, part.lower()) for part in parts]

    return sorted(values, key=natural, reverse=sort in (4, 6, 8))
