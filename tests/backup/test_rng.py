"""The random state of a step: what `seed_all` gives, at a price that every step can pay."""

from __future__ import annotations

import random
import traceback

import numpy as np
import pytest
import torch

from obsinfra.backup.rng import capture_rng_state, restore_rng_state, seed_all, seed_step


@pytest.fixture(autouse=True)
def _as_before():  # type: ignore[no-untyped-def]
    before = capture_rng_state()
    yield
    restore_rng_state(before)


def thrown() -> tuple[list[float], float, list[float]]:
    return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**63 - 1])
def test_a_step_is_seeded_as_a_run_is(seed: int) -> None:
    seed_all(seed)
    expected = thrown()
    torch.randn(5), random.gauss(0, 1), np.random.randn()  # also what they keep for the next call
    seed_step(seed)
    assert thrown() == expected


def test_a_step_is_seeded_without_a_look_at_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes 0.3 ms to note it, for devices that are not used."""
    looked: list[int] = []
    monkeypatch.setattr(traceback, "format_stack", lambda *_: looked.append(1) or [])
    seed_step(3)
    assert not looked
