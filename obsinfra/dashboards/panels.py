"""The kinds of panel the boards are made of, each with a unit, a description and what an alert says of it.

Called by the boards. Built on grafana-foundation-sdk's types; knows neither runs nor PromQL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    heatmap,
    stat,
    statetimeline,
    table,
    timeseries,
    xychart,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery as QueryBuilder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.xychart import MatcherConfig, SeriesMapping, XYSeriesConfig, XYShowMode
from grafana_foundation_sdk.models.xychart import Options as XYOptions
from grafana_foundation_sdk.models.xychart import XychartXYSeriesConfigX as XAxis
from grafana_foundation_sdk.models.xychart import XychartXYSeriesConfigY as YAxis

from obsinfra.alerting.prometheus_rules import RUNBOOKS
from obsinfra.alerting.wording import threshold_text, until_text
from obsinfra.catalog.alerts import Alert
from obsinfra.dashboards.queries import Query

PROMETHEUS = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
SEVERITY_COLOURS = {"info": "blue", "warning": "orange", "critical": "red"}
NO_GPU = "no GPU"
"""What panels about devices say where there is none."""

Link = dashboard.DashboardLink
FORMATS = {
    "series": PromQueryFormat.TIME_SERIES,
    "table": PromQueryFormat.TABLE,
    "buckets": PromQueryFormat.HEATMAP,
}


CUSTOM: dict[str, type] = {"heatmap": heat.FieldConfig, "table": shapes.TableFieldOptions}
"""Kinds of panel whose own field options the builders leave out, and Grafana expects."""


def lines(
    title: str,
    queries: Sequence[Query],
    *,
    unit: str,
    about: str,
    width: int = 12,
    height: int = 8,
    alerts: Sequence[Alert] = (),
    mentions: Sequence[Alert] = (),
    stacked: bool = False,
    logarithmic: bool = False,
    floor: float | None = None,
    ceiling: float | None = None,
    bars: bool = False,
    empty: str | None = None,
    links: Sequence[Link] = (),
) -> dashboard.Panel:
    """Lines over time; an alert's threshold is a dashed line.

    Args:
        unit: Grafana's name of the unit: `s`, `bytes`, `percentunit`, …
        about: how to read the panel; the alerts' thresholds and runbooks are added.
        alerts: rows of the table that judge what is drawn, in its unit.
        mentions: rows that judge something near it, named in the description alone.
        stacked: one upon the other, where they are parts of a whole.
        floor, ceiling: ends of the axis.
        empty: shown instead of "No data".
    """
    panel = (
        timeseries.Panel()
        .unit(unit)
        .line_width(1)
        .show_points(shapes.VisibilityMode.NEVER)
        .fill_opacity(60 if stacked or bars else 8)
        .tooltip(
            common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI).sort(shapes.SortOrder.DESCENDING)
        )
        .legend(
            common.VizLegendOptions()
            .display_mode(shapes.LegendDisplayMode.LIST)
            .placement(shapes.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )
    if bars:
        panel.draw_style(shapes.GraphDrawStyle.BARS)
    if stacked:
        panel.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL).group("A"))
    if logarithmic:
        panel.scale_distribution(common.ScaleDistributionConfig().type(shapes.ScaleDistribution.LOG).log(10))
    if floor is not None:
        panel.min(floor)
    if ceiling is not None:
        panel.max(ceiling)
    if alerts:
        panel.thresholds_style(
            common.GraphThresholdsStyleConfig().mode(shapes.GraphThresholdsStyleMode.DASHED)
        )
    return _finish(panel.build(), title, queries, about, width, height, alerts, mentions, empty, links)


def number(
    title: str,
    queries: Sequence[Query],
    *,
    unit: str,
    about: str,
    width: int = 3,
    height: int = 4,
    alerts: Sequence[Alert] = (),
    mentions: Sequence[Alert] = (),
    names: Mapping[str, str] | None = None,
    mappings: Sequence[dashboard.ValueMap] = (),
    decimals: int | None = None,
    empty: str | None = None,
    graph: bool = True,
    links: Sequence[Link] = (),
) -> dashboard.Panel:
    """One big number, the last of the time range; coloured by an alert's threshold.

    Args:
        names: show the series' name instead of its value, as for a state; name → colour.
        mappings: what values mean, as `up` for 1.
        graph: draw its course behind it.
    """
    panel = (
        stat.Panel()
        .unit(unit)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .graph_mode(shapes.BigValueGraphMode.AREA if graph else shapes.BigValueGraphMode.NONE)
        .color_mode(shapes.BigValueColorMode.VALUE)
    )
    if names:
        panel.text_mode(shapes.BigValueTextMode.NAME)
        for name, colour in names.items():
            fixed = dashboard.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour})
            panel.override_by_name(name, [fixed])
    if mappings:
        panel.mappings(list(mappings))
    if decimals is not None:
        panel.decimals(decimals)
    return _finish(panel.build(), title, queries, about, width, height, alerts, mentions, empty, links)


def bars(
    title: str,
    queries: Sequence[Query],
    *,
    unit: str,
    about: str,
    width: int = 8,
    height: int = 8,
    alerts: Sequence[Alert] = (),
    mentions: Sequence[Alert] = (),
    floor: float | None = 0,
    ceiling: float | None = None,
    empty: str | None = None,
    links: Sequence[Link] = (),
) -> dashboard.Panel:
    """One horizontal bar per series of an instant query."""
    panel = (
        bargauge.Panel()
        .unit(unit)
        .orientation(shapes.VizOrientation.HORIZONTAL)
        .display_mode(shapes.BarGaugeDisplayMode.BASIC)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    )
    if floor is not None:
        panel.min(floor)
    if ceiling is not None:
        panel.max(ceiling)
    return _finish(panel.build(), title, queries, about, width, height, alerts, mentions, empty, links)


def rows(
    title: str,
    queries: Sequence[Query],
    *,
    about: str,
    columns: Mapping[str, str],
    width: int = 24,
    height: int = 8,
    units: Mapping[str, str] | None = None,
    thresholds: Mapping[str, Alert] | None = None,
    links: Mapping[str, Link] | None = None,
    mappings: Mapping[str, Sequence[dashboard.ValueMap]] | None = None,
    sort: tuple[str, bool] | None = None,
    mentions: Sequence[Alert] = (),
    empty: str | None = None,
) -> dashboard.Panel:
    """A table of the present: one row per label set, one column per label and query.

    Args:
        queries: asked for the present, as tables.
        columns: column as it arrives → its heading, in order; all others are hidden. A query's value arrives
            as `Value #<refId>`, or as `Value` where there is one query; labels by their name.
        units, thresholds, links, mappings: by heading.
        sort: heading, and whether descending.
    """
    panel = table.Panel().show_header(True)
    if sort is not None:
        panel.sort_by([common.TableSortByFieldState().display_name(sort[0]).desc(sort[1])])
    for heading in columns.values():
        properties: list[dashboard.DynamicConfigValue] = []
        if units and heading in units:
            properties.append(dashboard.DynamicConfigValue("unit", units[heading]))
        if thresholds and heading in thresholds:
            properties += [
                dashboard.DynamicConfigValue("thresholds", _thresholds([thresholds[heading]])),
                dashboard.DynamicConfigValue("color", {"mode": "thresholds"}),
                dashboard.DynamicConfigValue("custom.cellOptions", {"type": "color-text"}),
            ]
        if mappings and heading in mappings:
            properties += [
                dashboard.DynamicConfigValue("mappings", list(mappings[heading])),
                dashboard.DynamicConfigValue("custom.cellOptions", {"type": "color-text"}),
            ]
        if links and heading in links:
            link = links[heading]
            properties.append(dashboard.DynamicConfigValue("links", [{"title": link.title, "url": link.url}]))
        if properties:
            panel.override_by_name(heading, properties)
    if len(queries) > 1:
        panel.with_transformation(dashboard.DataTransformerConfig(id_val="merge", options={}))
    panel.with_transformation(
        dashboard.DataTransformerConfig(
            id_val="organize",
            options={
                "indexByName": {name: place for place, name in enumerate(columns)},
                "renameByName": dict(columns),
                "includeByName": dict.fromkeys(columns, True),
            },
        )
    )
    said = [*(thresholds or {}).values(), *mentions]
    queries = [replace(query, instant=True, shape="table") for query in queries]
    return _finish(panel.build(), title, queries, about, width, height, (), said, empty, ())


def map_over_time(
    title: str,
    queries: Sequence[Query],
    *,
    unit: str,
    about: str,
    width: int = 12,
    height: int = 8,
    cell_unit: str = "short",
    bucketed: bool = False,
    alerts: Sequence[Alert] = (),
    mentions: Sequence[Alert] = (),
    empty: str | None = None,
    links: Sequence[Link] = (),
) -> dashboard.Panel:
    """A heat map: buckets of a histogram over time, or one row per series coloured by its value.

    Args:
        unit: of the vertical axis.
        cell_unit: of what colours a cell.
        bucketed: whether the rows are buckets of a histogram.
    """
    panel = (
        heatmap.Panel()
        .calculate(False)
        .unit(unit)
        .y_axis(heatmap.YAxisConfig().unit(unit).axis_placement(shapes.AxisPlacement.LEFT))
        .cell_values(heatmap.CellValues().unit(cell_unit))
        .color(
            heatmap.HeatmapColorOptions()
            .mode(heat.HeatmapColorMode.SCHEME)
            .scheme("Turbo" if bucketed else "RdYlGn")
            .reverse(not bucketed)
            .exponent(0.5)
            .fill("dark-orange")
            .steps(64)
        )
        .rows_frame(
            heatmap.RowsHeatmapOptions().layout(
                shapes.HeatmapCellLayout.LE if bucketed else shapes.HeatmapCellLayout.UNKNOWN
            )
        )
        .show_legend()
    )
    return _finish(panel.build(), title, queries, about, width, height, alerts, mentions, empty, links)


def states_over_time(
    title: str,
    queries: Sequence[Query],
    *,
    about: str,
    mappings: Sequence[dashboard.ValueMap],
    width: int = 24,
    height: int = 8,
    alerts: Sequence[Alert] = (),
    mentions: Sequence[Alert] = (),
    empty: str | None = None,
    links: Sequence[Link] = (),
) -> dashboard.Panel:
    """One band per series, coloured by what its value means."""
    panel = (
        statetimeline.Panel()
        .unit("short")
        .mappings(list(mappings))
        .merge_values(True)
        .show_value(shapes.VisibilityMode.NEVER)
        .row_height(0.8)
        .fill_opacity(80)
        .legend(
            common.VizLegendOptions()
            .display_mode(shapes.LegendDisplayMode.LIST)
            .placement(shapes.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )
    return _finish(panel.build(), title, queries, about, width, height, alerts, mentions, empty, links)


def overlay(
    title: str,
    x: Query,
    y: Query,
    *,
    by: str,
    unit: str,
    about: str,
    width: int = 12,
    height: int = 9,
    x_unit: str = "short",
    logarithmic: bool = False,
    alerts: Sequence[Alert] = (),
    mentions: Sequence[Alert] = (),
    links: Sequence[Link] = (),
) -> dashboard.Panel:
    """One query over the other, a curve for each value of the label `by`, so that curves can be compared.

    Both answers become one table, joined by time and label, which is parted by the label into a frame per
    curve; the time column goes, so that the first number of each frame is the horizontal axis.
    """
    panel = (
        xychart.Panel()
        .mapping(SeriesMapping.AUTO)
        .show(XYShowMode.LINES)
        .line_width(2)
        .unit(unit)
        .legend(
            common.VizLegendOptions()
            .display_mode(shapes.LegendDisplayMode.LIST)
            .placement(shapes.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.SINGLE))
        .override_by_name(x.name, [dashboard.DynamicConfigValue("unit", x_unit)])
    )
    if logarithmic:
        panel.scale_distribution(common.ScaleDistributionConfig().type(shapes.ScaleDistribution.LOG).log(10))
    for name, options in (
        ("merge", {}),
        (
            "organize",
            {
                "excludeByName": {"Time": True},
                "indexByName": {"Time": 0, by: 1, "Value #A": 2, "Value #B": 3},
                "renameByName": {"Value #A": x.name, "Value #B": y.name},
            },
        ),
        ("partitionByValues", {"fields": [by], "keepFields": False, "naming": {"asLabels": True}}),
    ):
        panel.with_transformation(dashboard.DataTransformerConfig(id_val=name, options=options))
    built = panel.build()
    assert isinstance(built.options, XYOptions)
    built.options.series = [
        XYSeriesConfig(x=XAxis(MatcherConfig("byName", x.name)), y=YAxis(MatcherConfig("byName", y.name)))
    ]
    return _finish(built, title, [x, y], about, width, height, alerts, mentions, None, links)


def named(alerts: Mapping[str, Alert], *names: str) -> list[Alert]:
    """These rows of the table, less those that are switched off."""
    return [alerts[name] for name in names if name in alerts]


def value_names(names: Mapping[str, tuple[str, str]]) -> dashboard.ValueMap:
    """Values as text → what to show and in which colour."""
    return dashboard.ValueMap(
        options={
            value: dashboard.ValueMappingResult(text=text, color=colour, index=place)
            for place, (value, (text, colour)) in enumerate(names.items())
        }
    )


def link(title: str, url: str) -> Link:
    """A link from a value to another page. `url` may hold `${__field.labels.run}` and the like."""
    return Link(title=title, type_val=dashboard.DashboardLinkType.LINK, url=url)


def description(about: str, alerts: Sequence[Alert]) -> str:
    """How to read a panel, then each alert that judges it with its threshold and its runbook."""
    said = [about]
    said += [
        f"[{alert.name}]({RUNBOOKS}/{alert.name}): {alert.severity} when {alert.comparator} "
        f"{threshold_text(alert)}"
        + (f" for {alert.for_seconds:g} s" if alert.for_seconds else "")
        + until_text(alert)
        for alert in alerts
    ]
    return "\n\n".join(said)


def _thresholds(alerts: Sequence[Alert]) -> dashboard.ThresholdsConfig:
    """Colours of a value: green, then the alert's colour beyond its threshold."""
    above = sorted((alert for alert in alerts if alert.comparator == ">"), key=lambda alert: alert.limit)
    below = sorted((alert for alert in alerts if alert.comparator == "<"), key=lambda alert: alert.limit)
    steps = [dashboard.Threshold(None, SEVERITY_COLOURS[below[0].severity] if below else "green")]
    for number_, alert in enumerate(below):
        following = below[number_ + 1] if number_ + 1 < len(below) else None
        steps.append(
            dashboard.Threshold(alert.limit, SEVERITY_COLOURS[following.severity] if following else "green")
        )
    steps += [dashboard.Threshold(alert.limit, SEVERITY_COLOURS[alert.severity]) for alert in above]
    return dashboard.ThresholdsConfig(steps=steps)


def _finish(
    panel: dashboard.Panel,
    title: str,
    queries: Sequence[Query],
    about: str,
    width: int,
    height: int,
    alerts: Sequence[Alert],
    mentions: Sequence[Alert],
    empty: str | None,
    links: Sequence[Link],
) -> dashboard.Panel:
    panel.title = title
    panel.description = description(about, [*alerts, *mentions])
    panel.datasource = PROMETHEUS
    panel.grid_pos = dashboard.GridPos(h=height, w=width, x=0, y=0)
    panel.targets = [_target(query, chr(ord("A") + place)) for place, query in enumerate(queries)]
    if panel.field_config is None:
        panel.field_config = dashboard.FieldConfigSource()
    defaults = panel.field_config.defaults
    defaults.thresholds = _thresholds(alerts)
    if defaults.color is None:
        mode = (
            dashboard.FieldColorModeId.PALETTE_CLASSIC
            if panel.type_val in ("timeseries", "xychart")
            else dashboard.FieldColorModeId.THRESHOLDS
        )
        defaults.color = dashboard.FieldColor(mode=mode)
    if defaults.custom is None and panel.type_val in CUSTOM:
        defaults.custom = CUSTOM[panel.type_val]()
    if empty is not None:
        defaults.no_value = empty
    if links:
        defaults.links = list(links)
    return panel


def _target(query: Query, ref: str) -> Any:
    builder = QueryBuilder().expr(query.expression).ref_id(ref).format(FORMATS[query.shape])
    builder.datasource(PROMETHEUS)
    if query.instant:
        builder.instant()
    else:
        builder.range()
    if query.legend:
        builder.legend_format(query.legend)
    if query.exemplars:
        builder.exemplar(True)
    return builder.build()
