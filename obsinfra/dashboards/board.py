"""A board: its panels in rows, variables, marks and links, put together and written as Grafana's JSON.

Called by the boards' modules and by `dashboards.write`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard

from obsinfra.dashboards.annotations import STEP, Marks
from obsinfra.dashboards.panels import PROMETHEUS, Link
from obsinfra.dashboards.variables import Variable

WIDTH = 24
"""Columns of Grafana's grid."""

TAG = "obsinfra"
SCHEMA = 41
"""Of Grafana 11.6's dashboards; newer ones migrate it when they load it."""


@dataclass(frozen=True, slots=True)
class Row:
    """A heading and the panels below it, which fill the width from left to right and then go on below."""

    title: str
    panels: Sequence[dashboard.Panel]
    collapsed: bool = False


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard.

    Attributes:
        uid: stable, in its address: `/d/<uid>`.
        title: people's name of it.
        about: what it answers.
        span: time range shown at first, as `1h`.
    """

    uid: str
    title: str
    about: str
    variables: Sequence[Variable]
    marks: Sequence[Marks]
    rows: Sequence[Row]
    span: str = "1h"

    @property
    def file(self) -> str:
        """Its file in `grafana/dashboards`."""
        return f"{self.uid.removeprefix('obsinfra-')}.json"


def render(board: Board) -> str:
    """The board as JSON, the same text for the same board."""
    document = _as_json(_built(board))
    for annotation, mark in zip(document["annotations"]["list"], board.marks, strict=True):
        # Of the Prometheus datasource's own annotation queries, which the SDK's type does not know.
        annotation |= {
            "step": STEP,
            "titleFormat": mark.title,
            "textFormat": mark.text,
            "useValueForTime": False,
        }
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _as_json(value: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(value, cls=JSONEncoder))
    return document


def _built(board: Board) -> dashboard.Dashboard:
    return dashboard.Dashboard(
        uid=board.uid,
        title=f"obsinfra / {board.title}",
        description=board.about,
        tags=[TAG],
        timezone="browser",
        editable=True,
        graph_tooltip=dashboard.DashboardCursorSync.CROSSHAIR,
        time=dashboard.DashboardDashboardTime(from_val=f"now-{board.span}", to="now"),
        refresh="10s",
        schema_version=SCHEMA,
        panels=_placed(board.rows),
        templating=dashboard.DashboardDashboardTemplating(list_val=list(board.variables)),
        annotations=dashboard.AnnotationContainer(
            list_val=[
                dashboard.AnnotationQuery(
                    name=mark.name,
                    datasource=PROMETHEUS,
                    enable=True,
                    icon_color=mark.colour,
                    expr=mark.expression,
                )
                for mark in board.marks
            ]
        ),
        links=[
            Link(
                title="Boards",
                type_val=dashboard.DashboardLinkType.DASHBOARDS,
                tags=[TAG],
                as_dropdown=True,
                keep_time=True,
                include_vars=True,
            )
        ],
    )


def _placed(rows: Sequence[Row]) -> list[dashboard.Panel | dashboard.RowPanel]:
    """Every panel with its place, and a number that is its own within the board."""
    out: list[dashboard.Panel | dashboard.RowPanel] = []
    top, number = 0, 0
    for row in rows:
        number += 1
        heading = dashboard.RowPanel(
            title=row.title,
            id_val=number,
            collapsed=row.collapsed,
            grid_pos=dashboard.GridPos(h=1, w=WIDTH, x=0, y=top),
        )
        out.append(heading)
        top += 1
        left, tallest = 0, 0
        for panel in row.panels:
            assert panel.grid_pos is not None
            if left + panel.grid_pos.w > WIDTH:
                top, left, tallest = top + tallest, 0, 0
            number += 1
            panel.id_val = number
            panel.grid_pos.x, panel.grid_pos.y = left, top
            left += panel.grid_pos.w
            tallest = max(tallest, panel.grid_pos.h)
        top += tallest
        if row.collapsed:
            heading.panels = list(row.panels)
        else:
            out += row.panels
    return out
