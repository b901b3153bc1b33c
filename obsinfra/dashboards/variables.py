"""What a person chooses at the top of a board: where the data is, which run, which of its ranks and devices.

Called by the boards.
"""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard

from obsinfra.catalog import metrics
from obsinfra.dashboards.datasources import PROMETHEUS_NAME, PROMETHEUS_UID
from obsinfra.dashboards.panels import PROMETHEUS
from obsinfra.dashboards.queries import of

Variable = dashboard.VariableModel
EVERY = ".*"
"""What "All" stands for: also the series that lack the label."""


def datasource() -> Variable:
    """Which Prometheus."""
    return Variable(
        type_val=dashboard.VariableType.DATASOURCE,
        name="datasource",
        label="Prometheus",
        query="prometheus",
        current=dashboard.VariableOption(text=PROMETHEUS_NAME, value=PROMETHEUS_UID),
    )


def model() -> Variable:
    """Models trained in the time range."""
    return _labels("model", "Model", of(metrics.BUILD_INFO), many=True)


def run(*, of_model: bool = False) -> Variable:
    """One run, the last by name first: names end with the time of their start."""
    where = 'model=~"$model"' if of_model else ""
    return _labels("run", "Run", of(metrics.BUILD_INFO, where), newest_first=True)


def runs() -> Variable:
    """Any number of runs."""
    return _labels("run", "Runs", of(metrics.BUILD_INFO, 'model=~"$model"'), many=True, newest_first=True)


def rank() -> Variable:
    """Ranks of the run."""
    return _labels("rank", "Rank", of(metrics.BUILD_INFO, 'run=~"$run"'), many=True, numbers=True)


def host() -> Variable:
    """Hosts of the run."""
    return _labels("host", "Host", of(metrics.BUILD_INFO, 'run=~"$run"'), many=True)


def device() -> Variable:
    """GPUs of the run; none where it has none."""
    series = of(metrics.GPU_MEMORY_TOTAL_BYTES, 'run=~"$run", host=~"$host"')
    return _labels("device", "GPU", series, many=True, numbers=True)


def choice(name: str, label: str, options: dict[str, str], about: str) -> Variable:
    """One of some texts that are put into queries. `options`: text shown → text put in."""
    first = next(iter(options.items()))
    return Variable(
        type_val=dashboard.VariableType.CUSTOM,
        name=name,
        label=label,
        description=about,
        query=", ".join(f"{text} : {value}" for text, value in options.items()),
        options=[
            dashboard.VariableOption(selected=text == first[0], text=text, value=value)
            for text, value in options.items()
        ],
        current=dashboard.VariableOption(selected=True, text=first[0], value=first[1]),
        multi=False,
        include_all=False,
    )


def smoothing() -> Variable:
    """Over how long smoothed curves average."""
    spans = {"15 s": "15s", "1 min": "1m", "5 min": "5m", "15 min": "15m", "1 h": "1h"}
    return choice("smoothing", "Smoothing", spans, "How long the smoothed curves average over.")


def metric() -> Variable:
    """A validation metric that the runs have."""
    series = of(metrics.VALIDATION_METRIC, 'model=~"$model", run=~"$run"')
    return _labels("metric", "Validation metric", series)


def _labels(
    label: str,
    title: str,
    series: str,
    *,
    many: bool = False,
    newest_first: bool = False,
    numbers: bool = False,
) -> Variable:
    sort = dashboard.VariableSort.NATURAL_DESC if newest_first else dashboard.VariableSort.NATURAL_ASC
    every = dashboard.VariableOption(selected=True, text=["All"], value=["$__all"])
    return Variable(
        type_val=dashboard.VariableType.QUERY,
        name=label,
        label=title,
        query={"query": f"label_values({series}, {label})", "refId": label},
        datasource=PROMETHEUS,
        refresh=dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED,
        sort=dashboard.VariableSort.NUMERICAL_ASC if numbers else sort,
        multi=many,
        include_all=many,
        all_value=EVERY if many else None,
        current=every if many else None,
    )
