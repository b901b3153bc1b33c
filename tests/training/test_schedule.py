"""Warm-up, cosine, plateau and the best value so far, each with a state that goes on where it was."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from obsinfra.training.best import BestTracker
from obsinfra.training.schedule import COSINE_FLOOR, Schedule


def schedule(kind: str, peak: float = 2.0, **options: object) -> Schedule:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    given = {"warmup_steps": 0, "total_steps": 100, **options}
    return Schedule(optimizer, kind, **given)  # type: ignore[arg-type]


def rates(of: Schedule, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(of.learning_rate)
        of.step()
    return found


def test_warm_up_rises_in_equal_steps_to_the_peak() -> None:
    assert rates(schedule("constant", warmup_steps=4), 7) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]


def test_cosine_falls_from_the_peak_after_warm_up_to_its_floor_and_stays() -> None:
    found = rates(schedule("cosine", warmup_steps=10), 121)
    assert found[9] == found[10] == 2.0
    assert found[55] == pytest.approx(2.0 * (COSINE_FLOOR + (1 - COSINE_FLOOR) / 2))
    assert found[100] == found[120] == pytest.approx(2.0 * COSINE_FLOOR)
    assert all(a > b for a, b in pairwise(found[10:101]))


def test_a_run_shorter_than_its_warm_up_only_rises() -> None:
    found = rates(schedule("cosine", warmup_steps=50, total_steps=10), 10)
    assert found == sorted(found) and found[-1] == pytest.approx(0.4)


@pytest.mark.parametrize(("mode", "sign"), [("min", 1.0), ("max", -1.0)])
def test_plateau_halves_after_so_many_validations_without_a_better_one(mode: str, sign: float) -> None:
    one = schedule("plateau", mode=mode, plateau_patience=2)
    found = []
    for value in (5.0, 4.0, 4.0, 4.5, 4.1, 3.0, 3.5, 3.5, 3.5):
        one.validated(sign * value)
        found.append(one.learning_rate)
    assert found == [2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.5]


def test_validations_mean_nothing_to_the_other_kinds() -> None:
    one = schedule("constant")
    for _ in range(20):
        one.validated(1.0)
    assert one.learning_rate == 2.0


@pytest.mark.parametrize("kind", ["constant", "cosine", "plateau"])
def test_a_restored_schedule_goes_on_where_it_was(kind: str) -> None:
    def validate(of: Schedule) -> None:
        for value in (1.0, 2.0, 2.0, 2.0):
            of.validated(value)

    first, second = (schedule(kind, warmup_steps=3, plateau_patience=1) for _ in range(2))
    rates(first, 20)
    validate(first)
    second.load_state_dict(first.state_dict())
    assert second.learning_rate == first.learning_rate
    validate(first)
    validate(second)
    assert rates(second, 90) == rates(first, 90)


@pytest.mark.parametrize(
    ("mode", "values", "best"), [("min", [3.0, 1.0, 2.0], 1.0), ("max", [0.3, 0.9, 0.5], 0.9)]
)
def test_the_best_value_is_the_smallest_or_largest(mode: str, values: list[float], best: float) -> None:
    tracker = BestTracker(mode, patience=2)  # type: ignore[arg-type]
    assert [tracker.update(value) for value in values] == [True, True, False]
    assert tracker.best == best and not tracker.exhausted
    assert not tracker.update(best)  # as good is not better
    assert tracker.exhausted


def test_nan_is_never_the_best_not_even_as_the_first() -> None:
    tracker = BestTracker("max", patience=0)
    assert not tracker.update(math.nan)
    assert tracker.update(-1.0) and not tracker.update(math.nan)
    assert tracker.best == -1.0 and not tracker.exhausted


def test_a_restored_tracker_counts_on() -> None:
    tracker, again = BestTracker("min", patience=3), BestTracker("min", patience=3)
    for value in (1.0, 2.0, 2.0):
        tracker.update(value)
    again.load_state_dict(tracker.state_dict())
    assert (again.best, again.exhausted) == (1.0, False)
    again.update(1.5)
    assert again.exhausted
