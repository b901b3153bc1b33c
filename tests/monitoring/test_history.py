"""The page's history stays bounded, thins instead of forgetting, and tells readers what changed."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsinfra.monitoring.history import COLUMNS, MAX_POINTS, History


def steps_of(answer: dict[str, Any]) -> list[float]:
    return list(answer["series"]["step"])


def test_points_come_back_in_order_with_gaps_for_what_is_missing() -> None:
    history = History()
    history.add({"time": 1.0, "step": 0.0, "loss": 2.0})
    history.add({"time": 2.0, "step": 1.0, "loss": math.nan, "grad_norm": math.inf, "gpu_ratio": None})
    series = history.since(0)["series"]
    assert set(series) == set(COLUMNS)
    assert series["loss"] == [2.0, None]
    assert series["grad_norm"] == series["gpu_ratio"] == [None, None]
    assert {len(column) for column in series.values()} == {2}


def test_asking_for_what_is_next_gives_only_what_came_since() -> None:
    history = History()
    for step in range(5):
        history.add({"step": step})
    first = history.since(0)
    assert (steps_of(first), first["next"], first["reset"]) == ([0, 1, 2, 3, 4], 5, True)
    nothing = history.since(5)
    assert (steps_of(nothing), nothing["next"], nothing["reset"]) == ([], 5, False)
    history.add({"step": 5})
    more = history.since(5)
    assert (steps_of(more), more["next"], more["reset"]) == ([5], 6, False)


@pytest.mark.parametrize("seq", [0, -3, 1_000])
def test_a_number_from_another_life_resets(seq: int) -> None:
    """A page left open over a restart asks for a number this process never gave."""
    history = History()
    history.add({"step": 0})
    history.add({"step": 1})
    answer = history.since(seq)
    assert (steps_of(answer), answer["reset"]) == ([0, 1], True)


def test_readers_are_told_to_start_over_once_older_points_were_thinned() -> None:
    history = History(max_points=10)
    for step in range(10):
        history.add({"step": step})
    assert history.since(7)["reset"] is False
    history.add({"step": 10})
    answer = history.since(7)
    assert (steps_of(answer), answer["next"], answer["reset"]) == ([0, 2, 4, 6, 8, 9, 10], 11, True)
    assert history.since(11)["reset"] is False


@given(count=st.integers(0, 400), maximum=st.integers(2, 25))
def test_history_is_bounded_and_spans_from_the_first_point_to_the_last(count: int, maximum: int) -> None:
    history = History(max_points=maximum)
    for step in range(count):
        history.add({"step": step})
    steps = steps_of(history.since(0))
    assert len(steps) <= maximum
    assert steps == sorted(set(steps))
    if count:
        assert (steps[0], steps[-1]) == (0, count - 1)
        gaps = [after - before for before, after in pairwise(steps)]
        # Half of the room is spread evenly over the run, up to the factor 2 of rounding.
        assert max(gaps, default=1) <= max(1, 2 * count / (maximum // 2))


@given(
    count=st.integers(1, 120),
    maximum=st.sampled_from([4, 10, 16]),
    polls=st.lists(st.integers(0, 119), max_size=20),
)
def test_a_reader_that_follows_the_protocol_has_what_a_new_reader_gets(
    count: int, maximum: int, polls: list[int]
) -> None:
    history = History(max_points=maximum)
    held: list[float] = []
    seq = 0

    def poll() -> None:
        nonlocal seq, held
        answer = history.since(seq)
        held = steps_of(answer) if answer["reset"] else held + steps_of(answer)
        seq = answer["next"]

    for step in range(count):
        history.add({"step": step})
        if step in polls:
            poll()
    poll()
    assert held == steps_of(history.since(0))


def test_validation_results_have_gaps_where_a_metric_was_absent() -> None:
    history = History()
    history.add_validation(10, {"loss": 1.0})
    history.add_validation(20, {"loss": math.nan, "accuracy": 0.5})
    history.add_validation(30, {"accuracy": 0.75})
    assert history.since(0)["validation_series"] == {
        "step": [10, 20, 30],
        "metrics": {"loss": [1.0, None, None], "accuracy": [None, 0.5, 0.75]},
    }


def test_validation_results_are_sent_again_only_when_one_came() -> None:
    history = History()
    held, seq = None, 0
    for step in range(40):
        history.add({"step": step})
        if step % 10 == 0:
            history.add_validation(step, {"loss": float(step)})
        answer = history.since(seq)
        seq, sent = answer["next"], answer["validation_series"]
        # Once more with the next point: a validation may come after an answer and before it.
        assert (sent is not None) == (step % 10 in (0, 1)), step
        held = sent if sent is not None else held
    assert held == history.since(0)["validation_series"]
    history.add_validation(99, {"loss": 99.0})
    assert history.since(seq)["validation_series"]["step"][-1] == 99


def test_validation_results_are_bounded_too() -> None:
    history = History(max_points=8)
    for step in range(100):
        history.add_validation(step, {"loss": float(step)})
    found = history.since(0)["validation_series"]
    assert len(found["step"]) <= 8
    assert found["step"] == found["metrics"]["loss"]
    assert (found["step"][0], found["step"][-1]) == (0, 99)


def test_what_was_handed_out_does_not_change_afterwards() -> None:
    history = History()
    history.add({"step": 0})
    history.add_validation(0, {"loss": 1.0})
    answer = history.since(0)
    history.add({"step": 1})
    history.add_validation(1, {"loss": 2.0})
    assert steps_of(answer) == [0]
    assert answer["validation_series"] == {"step": [0], "metrics": {"loss": [1.0]}}


def test_a_day_is_within_the_bound_and_its_first_hour_still_there() -> None:
    history = History()
    for step in range(86_400):
        history.add({"step": step})
    steps = steps_of(history.since(0))
    assert MAX_POINTS / 2 <= len(steps) <= MAX_POINTS
    assert steps[-MAX_POINTS // 4 :] == list(range(86_400 - MAX_POINTS // 4, 86_400))
    assert sum(step < 3_600 for step in steps) >= 3_600 / 128  # of the first hour, a point every two minutes
