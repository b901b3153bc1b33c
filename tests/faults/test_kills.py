"""SIGKILL of trainer, writer or both at random instants: nothing more is lost than was promised."""

from __future__ import annotations

from pathlib import Path

import pytest
from killing_spree import Spree, Victim


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["trainer", "writer", "both"])
def test_a_killed_run_resumes_as_if_nothing_had_been(tmp_path: Path, victim: Victim) -> None:
    spree = Spree(tmp_path, seed=1)
    for _ in range(4):
        spree.kill(victim)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_200_kills_lose_nothing_that_was_promised(tmp_path: Path) -> None:
    spree = Spree(tmp_path, seed=2)
    victims: tuple[Victim, ...] = ("trainer", "writer", "trainer", "both")
    for number in range(200):
        spree.kill(victims[number % 4])
    assert spree.kills == {"trainer": 100, "writer": 50, "both": 50}
