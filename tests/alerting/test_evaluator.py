"""What the in-process evaluator promises: Prometheus's semantics, once per firing, no event lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from obsinfra.alerting.evaluator import AlertEvaluator, AlertStatus
from obsinfra.catalog import metrics
from obsinfra.catalog.alerts import ALERTS, BY_NAME, Alert

HELD = replace(BY_NAME["HighMemory"], for_seconds=15.0)
AT_ONCE = BY_NAME["GradientExplosion"]
COUNTED = BY_NAME["NonFiniteLoss"]


class Scene:
    """An evaluator whose clock and readings the test sets."""

    def __init__(self, *alerts: Alert) -> None:
        self.now = 1_000_000.0
        self.readings: list[tuple[str, Mapping[str, str], float]] = []
        self.fired: list[AlertStatus] = []
        self.evaluator = AlertEvaluator(
            alerts, lambda: self.readings, clock=lambda: self.now, on_firing=self.fired.append
        )

    def after(self, seconds: float, *values: float | None, metric: metrics.Metric) -> list[AlertStatus]:
        """Let `seconds` pass, show one series per value (None: absent), evaluate."""
        self.now += seconds
        self.readings = [
            (metric.sample_name, {"rank": str(rank)}, value)
            for rank, value in enumerate(values)
            if value is not None
        ]
        return self.evaluator.evaluate()


def states(statuses: list[AlertStatus]) -> list[str]:
    return [status.state for status in statuses]


def test_fires_after_for_seconds_and_resolves_at_the_first_evaluation_below() -> None:
    scene = Scene(HELD)
    assert scene.after(0, 0.85, metric=HELD.metric) == []  # at the threshold is not beyond it
    assert states(scene.after(5, 0.9, metric=HELD.metric)) == ["pending"]
    crossed_at = scene.now
    assert states(scene.after(14.9, 0.91, metric=HELD.metric)) == ["pending"]
    [status] = scene.after(0.1, 0.92, metric=HELD.metric)
    assert (status.state, status.value, status.since) == ("firing", 0.92, crossed_at)
    assert status.fired_at == crossed_at + 15.0
    [still] = scene.after(100, 0.93, metric=HELD.metric)
    assert (still.since, still.fired_at) == (crossed_at, crossed_at + 15.0)
    assert scene.after(1, 0.8, metric=HELD.metric) == []


def test_what_fires_goes_on_until_its_clearing_threshold() -> None:
    """And what does not fire yet, or no more, is judged by the threshold alone."""
    hot = replace(BY_NAME["HighGPUTemperature"], for_seconds=10.0)
    scene = Scene(hot)
    assert scene.after(0, 84.0, metric=hot.metric) == []
    assert states(scene.after(1, 86.0, metric=hot.metric)) == ["pending"]
    assert scene.after(5, 84.0, metric=hot.metric) == []
    scene.after(1, 86.0, metric=hot.metric)
    assert states(scene.after(10, 86.0, metric=hot.metric)) == ["firing"]
    assert states(scene.after(1, 84.0, metric=hot.metric)) == ["firing"]
    [still] = scene.after(600, 75.5, metric=hot.metric)
    assert (still.state, still.value) == ("firing", 75.5) and len(scene.fired) == 1
    assert scene.after(1, 75.0, metric=hot.metric) == []
    assert scene.after(1, 84.0, metric=hot.metric) == []


def test_one_dip_starts_the_wait_anew() -> None:
    scene = Scene(HELD)
    scene.after(0, 0.9, metric=HELD.metric)
    scene.after(10, 0.5, metric=HELD.metric)
    assert states(scene.after(10, 0.9, metric=HELD.metric)) == ["pending"]
    assert states(scene.after(14, 0.9, metric=HELD.metric)) == ["pending"]
    assert states(scene.after(1, 0.9, metric=HELD.metric)) == ["firing"]


def test_without_a_wait_it_fires_at_the_first_evaluation() -> None:
    scene = Scene(AT_ONCE)
    assert states(scene.after(0, 101.0, metric=AT_ONCE.metric)) == ["firing"]
    assert [status.value for status in scene.fired] == [101.0]


def test_an_absent_metric_does_not_fire_and_resolves_what_fired() -> None:
    scene = Scene(*ALERTS)
    assert scene.after(0, None, metric=AT_ONCE.metric) == []
    scene.after(1, 200.0, metric=AT_ONCE.metric)
    assert scene.after(1, None, metric=AT_ONCE.metric) == []


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_no_number_is_not_beyond_a_threshold(value: float) -> None:
    assert Scene(AT_ONCE).after(0, value, metric=AT_ONCE.metric) == []


def test_an_infinite_norm_is_beyond_every_threshold() -> None:
    assert states(Scene(AT_ONCE).after(0, float("inf"), metric=AT_ONCE.metric)) == ["firing"]


def test_series_are_judged_each_on_its_own() -> None:
    scene = Scene(HELD)
    scene.after(0, 0.9, 0.1, metric=HELD.metric)
    scene.after(10, 0.9, 0.9, metric=HELD.metric)
    both = scene.after(5, 0.9, 0.9, metric=HELD.metric)
    assert {status.labels["rank"]: status.state for status in both} == {"0": "firing", "1": "pending"}


def test_on_firing_is_called_once_per_firing_and_again_after_a_resolve() -> None:
    scene = Scene(AT_ONCE)
    for value in (101.0, 150.0, 102.0, 3.0, 101.0, 101.0):
        scene.after(1, value, metric=AT_ONCE.metric)
    assert [status.value for status in scene.fired] == [101.0, 101.0]


def test_a_callback_that_raises_loses_no_announcement() -> None:
    heard: list[str] = []

    def raising_once(status: AlertStatus) -> None:
        heard.append(status.labels["rank"])
        if len(heard) == 1:
            raise RuntimeError("first listener failed")

    readings = [(AT_ONCE.metric.sample_name, {"rank": rank}, 500.0) for rank in ("0", "1")]
    evaluator = AlertEvaluator([AT_ONCE], lambda: readings, clock=lambda: 0.0, on_firing=raising_once)
    with pytest.raises(RuntimeError):
        evaluator.evaluate()
    assert states(evaluator.evaluate()) == ["firing", "firing"]
    assert heard == ["0", "1"]


def test_a_counter_that_jumps_from_zero_fires_at_once_and_resolves_after_its_window() -> None:
    scene = Scene(COUNTED)
    for _ in range(5):
        assert scene.after(10, 0, metric=COUNTED.metric) == []
    [status] = scene.after(1, 1, metric=COUNTED.metric)
    assert (status.state, status.value) == ("firing", 1.0)
    for _ in range(5):
        assert states(scene.after(10, 1, metric=COUNTED.metric)) == ["firing"]
    assert scene.after(11, 1, metric=COUNTED.metric) == []
    assert len(scene.fired) == 1


def test_a_counter_first_seen_above_zero_counts_in_full() -> None:
    """The event came before the first evaluation: counters begin at zero with their process."""
    scene = Scene(COUNTED)
    [status] = scene.after(0, 2, metric=COUNTED.metric)
    assert (status.state, status.value) == ("firing", 2.0)


def test_a_counter_that_restarts_counts_from_zero_again() -> None:
    scene = Scene(COUNTED)
    scene.after(0, 5, metric=COUNTED.metric)
    assert scene.after(61, 5, metric=COUNTED.metric) == []
    assert scene.after(10, 0, metric=COUNTED.metric) == []
    [status] = scene.after(10, 2, metric=COUNTED.metric)
    assert status.value == 2.0


def test_a_counter_that_was_gone_for_a_window_is_new_when_it_returns() -> None:
    scene = Scene(COUNTED)
    scene.after(0, 3, metric=COUNTED.metric)
    for _ in range(8):
        assert scene.after(10, None, metric=COUNTED.metric) == []
    [status] = scene.after(10, 3, metric=COUNTED.metric)
    assert status.value == 3.0


def test_an_event_whose_process_ends_at_once_is_held_for_its_window() -> None:
    scene = Scene(COUNTED)
    scene.after(0, 0, metric=COUNTED.metric)
    scene.after(1, 1, metric=COUNTED.metric)
    assert states(scene.after(50, None, metric=COUNTED.metric)) == ["firing"]
    assert scene.after(11, None, metric=COUNTED.metric) == []
    assert len(scene.fired) == 1


def test_an_event_during_a_stall_longer_than_the_window_is_not_missed() -> None:
    scene = Scene(COUNTED)
    scene.after(0, 0, metric=COUNTED.metric)
    scene.after(1, 0, metric=COUNTED.metric)
    [status] = scene.after(300, 1, metric=COUNTED.metric)
    assert (status.state, status.value) == ("firing", 1.0)


def test_history_does_not_grow_with_time() -> None:
    scene = Scene(COUNTED)
    for second in range(2_000):
        scene.after(1, second // 100, metric=COUNTED.metric)
    [judge] = scene.evaluator._judges
    [history] = judge.histories.values()
    assert len(history.points) <= COUNTED.condition.window_seconds + 2
    for _ in range(100):
        scene.after(1, None, metric=COUNTED.metric)
    assert judge.histories == {}


def test_the_summary_is_filled_in_for_people() -> None:
    hot = BY_NAME["HighGPUTemperature"]
    readings = [(hot.metric.sample_name, {"device": "3"}, 99.0)]
    [status] = AlertEvaluator([hot], lambda: readings, clock=lambda: 0.0).evaluate()
    assert status.summary == "GPU 3 hotter than 85 °C"
