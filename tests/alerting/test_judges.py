"""Every alert that a trainer can judge alone, played what Prometheus is tested with: the same states."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from other_conditions import OTHER_CONDITIONS, Change, random_changes

from obsinfra.alerting.evaluator import AlertEvaluator
from obsinfra.alerting.judges import POINTS, CounterHistory, create_judge
from obsinfra.alerting.rule_tests import Scene, pace_of, scenes_of
from obsinfra.catalog import metrics
from obsinfra.catalog.alert_changes import alert_table
from obsinfra.catalog.alerts import ALERTS, BY_NAME, Alert
from obsinfra.catalog.conditions import OverTime

ALONE = [alert for alert in ALERTS if alert.in_process]
CHANGED = [
    alert for alert in alert_table({}, OTHER_CONDITIONS) if alert.key in OTHER_CONDITIONS and alert.in_process
]
PLAYED = [(alert, scene) for alert in (*ALONE, *CHANGED) for scene in scenes_of(alert)]

Reading = tuple[str, Mapping[str, str], float]


def read_at(scene: Scene, sample: int) -> list[Reading]:
    """What a trainer would show at that sample: without the labels that are the same for all it shows."""
    found = []
    for selector, values in scene.series.items():
        name, _, labels = selector.partition("{")
        value = values[sample] if sample < len(values) else None
        if value is not None:
            own = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            found.append(
                (name, {key: text for key, text in own.items() if key not in metrics.RUN_LABELS}, value)
            )
    return found


@pytest.mark.parametrize(("alert", "scene"), PLAYED, ids=[f"{a.name}-{s.what}" for a, s in PLAYED])
def test_the_evaluator_passes_prometheus_own_tests(alert: Alert, scene: Scene) -> None:
    play(alert, scene)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(change=random_changes())
def test_the_evaluator_passes_them_for_whatever_alert_the_settings_take(change: tuple[str, Change]) -> None:
    key, fields = change
    [alert] = [row for row in alert_table({}, {key: fields}) if row.key == key]
    if alert.in_process:
        for scene in scenes_of(alert):
            play(alert, scene)


def play(alert: Alert, scene: Scene) -> None:
    """Hold what the evaluator says at each sample against what the scene expects."""
    sample, said = 0, {}
    evaluator = AlertEvaluator(
        [alert], lambda: read_at(scene, sample), clock=lambda: 1e9 + sample * pace_of(alert)
    )
    for sample in range(max(scene.states) + 1):
        said[sample] = [status.state for status in evaluator.evaluate()]
    for at, wanted in sorted(scene.states.items()):
        if wanted == "quiet":
            assert "firing" not in said[at], f"at sample {at}"
        else:
            assert said[at] == ([] if wanted is None else [wanted]), f"at sample {at}"


def test_which_alerts_need_prometheus() -> None:
    """Those about other processes and about peers; everything a trainer measures itself it can judge."""
    needing = {alert.name for alert in ALERTS if not alert.in_process}
    assert needing == {
        "AlertmanagerConfigBroken", "AlertmanagerGone", "DeliveryFailing", "NotificationsFailing",
        "HostDown", "PrometheusConfigBroken", "PrometheusDroppingAlerts", "PrometheusRuleFailures",
        "PrometheusWithoutAlertmanager", "SidecarGone", "SidecarJournalFailing", "StragglerRank",
        "TrainerGone", "TrainerUnreachable", "Watchdog",
    }  # fmt: skip
    for name in needing:
        with pytest.raises(ValueError, match=f"{name} needs Prometheus"):
            create_judge(BY_NAME[name])


def test_trends_keep_a_bounded_history() -> None:
    """A reading every second for two days keeps no more points than a trend is drawn through."""
    judge = create_judge(BY_NAME["MemoryCreep"])
    for second in range(0, 2 * 86_400, 7):
        series = {"obsinfra_process_resident_memory_bytes": [((), {}, 1e9 + 1e6 * second)]}
        found = list(judge.judge(1e9 + second, series))
    [points] = judge._windows._points.values()  # type: ignore[attr-defined]
    assert len(points) <= POINTS + 2
    [(_, slope, crossed)] = found
    assert slope == pytest.approx(1e6) and crossed


@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(-5, 5) | st.just(math.nan)), max_size=80),
    st.sampled_from(["highest", "lowest"]),
)
def test_the_extreme_of_a_window_is_that_of_all_its_readings(
    readings: list[tuple[int, float]], which: Any
) -> None:
    """As long as they do not come closer than a window / POINTS, however many there are."""
    judge = create_judge(replace(BY_NAME["HighCPU"], condition=OverTime(metrics.HOST_CPU_RATIO, which, 60.0)))
    now, every = 0.0, []
    for seconds, value in readings:
        now += seconds
        every.append((now, value))
        within = [v for at, v in every if at > now - 60.0 and not math.isnan(v)]
        [(_, found, _)] = judge.judge(now, {"obsinfra_host_cpu_ratio": [((), {}, value)]})
        extreme = max if which == "highest" else min
        assert found == extreme(within) if within else math.isnan(found)


def test_the_extreme_of_a_long_window_is_kept_in_few_points() -> None:
    """A falling series read each second: each reading may be the highest once those before it are gone."""
    judge = create_judge(
        replace(BY_NAME["HighCPU"], condition=OverTime(metrics.HOST_CPU_RATIO, "highest", 86_400.0))
    )
    for second in range(100_000):
        [(_, found, _)] = judge.judge(second, {"obsinfra_host_cpu_ratio": [((), {}, -float(second))]})
        oldest = max(0, second - 86_400 + 1)
        assert -found - oldest <= 86_400 / POINTS
    [points] = judge._extremes.values()  # type: ignore[attr-defined]
    assert len(points) <= POINTS + 2


def test_a_series_that_went_away_is_forgotten() -> None:
    judge = create_judge(BY_NAME["MemoryCreep"])
    name = "obsinfra_process_resident_memory_bytes"
    for second in range(0, 3000, 10):
        list(judge.judge(second, {name: [((), {}, 1e9 + 1e6 * second)]}))
    assert [crossed for *_, crossed in judge.judge(3000, {name: [((), {}, 4e9)]})] == [True]
    assert list(judge.judge(3010, {})) == []
    assert [key for key, *_ in judge.judge(3400, {name: [((), {}, 4e9)]})] == [()]  # the window holds points
    assert list(judge.judge(6000, {})) == []
    assert list(judge.judge(6010, {name: [((), {}, 4e9)]})) == []  # as new: too young to judge


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_no_number_fires_nothing(value: float) -> None:
    """NaN and minus infinity are beyond no `>` threshold, in no kind of condition."""
    for alert in ALONE:
        if alert.comparator == "<":
            continue
        judge = create_judge(alert)
        for sample in range(0, 4000, 10):
            found = list(
                judge.judge(
                    float(sample),
                    {
                        metric.sample_name: [((), {}, value)]
                        for metric in vars(metrics).values()
                        if isinstance(metric, metrics.Metric)
                    },
                )
            )
            assert not any(crossed for *_, crossed in found), alert.name


def test_windows_of_the_users_hold_in_process_too() -> None:
    [share] = [a for a in alert_table({}, {"data_share": {"window_seconds": 20}}) if a.key == "data_share"]
    judge = create_judge(share)
    name = metrics.PHASE_SECONDS.sample_name
    for second in range(31):
        waiting = {"phase": "data"}, 0.9 * second
        working = {"phase": "forward"}, 0.1 * second
        rows = [(tuple(labels.items()), labels, value) for labels, value in (waiting, working)]
        found = list(judge.judge(float(second), {name: rows}))
        assert bool(found) == (second >= 20)
    [(_, ratio, crossed)] = found
    assert ratio == pytest.approx(0.9) and crossed


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from([None, 0.0, 1.0, 1.0, 1.0, 2.0, 5.0])), max_size=60
    ),
    st.integers(2, 20),
)
def test_a_counters_history_answers_as_if_it_kept_every_reading(
    readings: list[tuple[int, float | None]], window: int
) -> None:
    history = CounterHistory(float(window))
    every: list[tuple[float, float | None]] = []
    now = 0.0
    for seconds, value in readings:
        now += seconds
        every.append((now, value))
        within = [point for at, point in every if at >= now - window and point is not None]
        rises = [later - earlier if later >= earlier else later for earlier, later in pairwise(within)]
        if value is None:
            assert history.absent(now) == (sum(rises) if within else None)
            continue
        before = [point for at, point in every if at <= now - window][-1:]
        since = value if not before or before[0] is None or value < before[0] else value - before[0]
        assert history.add(now, value) == max(sum(rises), since)


def test_a_counter_that_stands_still_costs_no_memory() -> None:
    history = CounterHistory(3_600.0)
    for second in range(3_600):
        history.add(float(second), 7.0)
    assert len(history.points) == 2
