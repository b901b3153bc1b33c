"""Advantages, losses and entropies agree with slow textbook versions of themselves in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical

from obsinfra.workloads.tactical_mappo.ppo import (
    clipped_policy_loss,
    clipped_value_loss,
    entropies,
    generalised_advantages,
    log_probabilities,
)

seeds = st.integers(0, 2**32 - 1)
shares = st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])


def textbook_advantages(
    rewards: Any,
    values: Any,
    next_values: Any,
    terminated: Any,
    ended: Any,
    discount: float,
    smoothing: float,
) -> Any:
    """A_t = Σ_l (γλ)^l δ_{t+l} over the rest of the episode, one episode of one account at a time."""
    steps, accounts = rewards.shape
    advantages = np.zeros((steps, accounts), dtype=np.float64)
    for account in range(accounts):
        first = 0
        while first < steps:
            last = first
            while last < steps - 1 and not ended[last, account]:
                last += 1
            for t in range(first, last + 1):
                for later in range(t, last + 1):
                    follows = 0.0 if terminated[later, account] else next_values[later, account]
                    error = rewards[later, account] + discount * follows - values[later, account]
                    advantages[t, account] += (discount * smoothing) ** (later - t) * error
            first = last + 1
    return advantages


@given(
    seed=seeds, steps=st.integers(1, 30), accounts=st.integers(1, 5), discount=shares, smoothing=shares,
    often=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_advantages_are_the_textbook_sums(
    seed: int, steps: int, accounts: int, discount: float, smoothing: float, often: float
) -> None:
    draw = np.random.default_rng(seed)
    rewards, values, next_values = draw.normal(size=(3, steps, accounts))
    ended = draw.random((steps, accounts)) < often
    terminated = ended & (draw.random((steps, accounts)) < 0.5)
    found = generalised_advantages(
        *(torch.from_numpy(part) for part in (rewards, values, next_values, terminated, ended)),
        discount=discount,
        smoothing=smoothing,
    )
    expected = textbook_advantages(rewards, values, next_values, terminated, ended, discount, smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_an_episode_cut_off_is_bootstrapped_and_a_terminated_one_is_not() -> None:
    """And neither lets the next episode's rewards through."""
    rewards = torch.tensor([[1.0, 1.0], [100.0, 100.0]])
    values, next_values = torch.zeros(2, 2), torch.full((2, 2), 10.0)
    terminated = torch.tensor([[True, False], [False, False]])
    ended = torch.tensor([[True, True], [False, False]])
    found = generalised_advantages(
        rewards, values, next_values, terminated, ended, discount=0.5, smoothing=1.0
    )
    assert found.tolist() == [[1.0, 6.0], [105.0, 105.0]]


def test_without_smoothing_an_advantage_is_one_error_and_with_all_of_it_the_return() -> None:
    rewards = torch.tensor([[1.0], [2.0], [4.0]])
    values = torch.tensor([[0.5], [0.25], [0.125]])
    next_values = torch.tensor([[0.25], [0.125], [8.0]])
    nothing = torch.zeros(3, 1, dtype=torch.bool)
    one, all_of_it = (
        generalised_advantages(
            rewards, values, next_values, nothing, nothing, discount=0.5, smoothing=smoothing
        ).flatten().tolist()
        for smoothing in (0.0, 1.0)
    )  # fmt: skip
    assert one == [1 + 0.125 - 0.5, 2 + 0.0625 - 0.25, 4 + 4 - 0.125]
    assert all_of_it == [1 + 1 + 1 + 1 - 0.5, 2 + 2 + 2 - 0.25, 4 + 4 - 0.125]


def scalar_policy_loss(new: Any, old: Any, advantages: Any, clip: float) -> float:
    total = 0.0
    for sample, advantage in enumerate(advantages):
        for agent in range(len(new[sample])):
            ratio = math.exp(new[sample][agent] - old[sample][agent])
            limited = min(max(ratio, 1 - clip), 1 + clip)
            total -= min(ratio * advantage, limited * advantage)
    return total / (len(advantages) * len(new[0]))


def scalar_value_loss(values: Any, old: Any, targets: Any, clip: float) -> float:
    total = 0.0
    for value, before, target in zip(values, old, targets, strict=True):
        limited = min(max(value, before - clip), before + clip)
        total += 0.5 * max((value - target) ** 2, (limited - target) ** 2)
    return total / len(values)


@given(
    seed=seeds, samples=st.integers(1, 20), agents=st.integers(1, 4), clip=st.sampled_from([0.05, 0.2, 1.0])
)
@settings(max_examples=100, deadline=None)
def test_the_policy_loss_is_the_scalar_one(seed: int, samples: int, agents: int, clip: float) -> None:
    draw = np.random.default_rng(seed)
    old = -draw.exponential(size=(samples, agents))
    new = old + draw.normal(0, 0.3, (samples, agents))
    advantages = draw.normal(size=samples)
    found = clipped_policy_loss(*(torch.from_numpy(part) for part in (new, old, advantages)), clip)
    assert found.item() == pytest.approx(scalar_policy_loss(new, old, advantages, clip), rel=1e-9, abs=1e-12)


@given(seed=seeds, samples=st.integers(1, 40), clip=st.sampled_from([0.1, 0.5, 10.0]))
@settings(max_examples=100, deadline=None)
def test_the_value_loss_is_the_scalar_one(seed: int, samples: int, clip: float) -> None:
    draw = np.random.default_rng(seed)
    values, old, targets = draw.normal(size=(3, samples))
    found = clipped_value_loss(*(torch.from_numpy(part) for part in (values, old, targets)), clip)
    assert found.item() == pytest.approx(scalar_value_loss(values, old, targets, clip), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "advantage", "learns"),
    [(0.5, 1.0, False), (-0.5, -1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (0.05, 1.0, True)],
)
def test_a_ratio_past_the_clip_learns_only_on_its_way_back(
    change: float, advantage: float, learns: bool
) -> None:
    new = torch.tensor([[change]], requires_grad=True)
    clipped_policy_loss(new, torch.zeros(1, 1), torch.tensor([advantage]), 0.2).backward()
    assert new.grad is not None and bool(new.grad.item() != 0) == learns


def test_a_value_past_the_clip_stops_there_unless_it_must_come_back() -> None:
    """Old value 0, clip 0.5: at 0.7 towards target 1 the clipped error is the larger and has no gradient."""
    values = torch.tensor([0.7, 0.7], requires_grad=True)
    clipped_value_loss(values, torch.zeros(2), torch.tensor([1.0, -1.0]), 0.5).backward()
    assert values.grad is not None and values.grad[0] == 0 and values.grad[1] > 0


@given(seed=seeds, scale=st.sampled_from([0.0, 1.0, 10.0, 50.0]))
@settings(max_examples=50, deadline=None)
def test_entropies_and_log_probabilities_are_those_of_torch_distributions(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(7, 3, 5, generator=generator, dtype=torch.float64)
    actions = torch.randint(5, (7, 3), generator=generator)
    reference = Categorical(logits=logits)
    torch.testing.assert_close(entropies(logits), reference.entropy())
    torch.testing.assert_close(log_probabilities(logits, actions), reference.log_prob(actions))


def test_entropy_is_largest_for_the_uniform_policy_and_zero_for_a_certain_one() -> None:
    logits = torch.tensor([[0.0] * 5, [200.0, 0, 0, 0, 0]])
    assert entropies(logits).tolist() == pytest.approx([math.log(5), 0.0], abs=1e-6)
