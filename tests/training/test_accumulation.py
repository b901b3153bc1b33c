"""Micro-batches: grouped for a step, and never half a group in a saved position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from obsinfra.observation.signals import InterruptedWait
from obsinfra.training.accumulation import MicroBatches


class Numbers:
    """0 … 9, resumable; raises at `interrupted`, as a wait for data that a signal ends."""

    phase = "rollout"
    num_workers = 2

    def __init__(self, interrupted: int | None = None) -> None:
        self.at, self.interrupted = 0, interrupted

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[int]:
        while self.at < 10:
            if self.at == self.interrupted:
                raise InterruptedWait
            self.at += 1
            yield self.at - 1

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize(
    ("count", "groups"),
    [
        (1, [[i] for i in range(10)]),
        (3, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]),
        (5, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]),
        (99, [list(range(10))]),
    ],
)
def test_groups_of_an_epoch(count: int, groups: list[list[int]]) -> None:
    batches = MicroBatches(Numbers(), count)
    assert len(batches) == len(groups)
    assert list(batches) == groups
    assert (batches.phase, batches.num_workers) == ("rollout", 2)


@pytest.mark.parametrize("count", [1, 3])
def test_between_two_groups_the_position_is_that_of_the_data(count: int) -> None:
    batches = MicroBatches(Numbers(), count)
    iterator = iter(batches)
    next(iterator)
    next(iterator)
    again = MicroBatches(Numbers(), count)
    again.load_state_dict(batches.state_dict())
    assert list(again) == list(iterator)


def test_a_wait_left_inside_a_group_does_not_lose_what_was_drawn_of_it() -> None:
    batches = MicroBatches(Numbers(interrupted=5), 3)
    iterator = iter(batches)
    assert next(iterator) == [0, 1, 2]
    with pytest.raises(InterruptedWait):
        next(iterator)
    again = MicroBatches(Numbers(), 3)
    again.load_state_dict(batches.state_dict())
    assert next(iter(again)) == [3, 4, 5]
