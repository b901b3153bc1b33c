"""Rollouts: what was played is what the environment and the policy say, and a run resumes at any batch."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from market_tables import bundled, cut
from test_ppo_arithmetic import textbook_advantages
from torch import Tensor, nn

from obsinfra.errors import DataError
from obsinfra.workloads.protocol import Batches
from obsinfra.workloads.tactical_mappo import TacticalMappo
from obsinfra.workloads.tactical_mappo.environment import (
    ACTIONS,
    Accounts,
    MarketReplay,
    Rules,
    open_accounts,
)
from obsinfra.workloads.tactical_mappo.rollout import Rollouts, Schedule, Transitions

CPU = torch.device("cpu")
SMALL = Schedule(accounts=12, bars=20, passes=2)
BATCH = 64
"""240 transitions a pass: four batches, the last one smaller."""


@cache
def workload(schedule: Schedule = SMALL, rules: Rules | None = None) -> TacticalMappo:
    return TacticalMappo(list(bundled()), rules=rules, schedule=schedule)


def model(seed: int = 0) -> nn.Module:
    """A policy away from uniform, so that its choices matter."""
    torch.manual_seed(seed)
    built = workload().build_model()
    with torch.no_grad():
        for actor in built.actors:
            actor.out.weight.mul_(100)
    return built


def rollouts(
    of: nn.Module, seed: int = 1, batch_size: int = BATCH, like: TacticalMappo | None = None
) -> Batches:
    return (like or workload()).train_batches(of, batch_size=batch_size, seed=seed, num_workers=2, device=CPU)


def same(one: Transitions, other: Transitions) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def through_a_checkpoint(state: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file that nothing is unpickled from."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    restored: dict[str, Any] = torch.load(file, weights_only=True)
    return restored


def take(batches: Batches, count: int) -> list[Transitions]:
    """The next `count` batches, over the ends of epochs."""
    taken: list[Transitions] = []
    while len(taken) < count:
        for batch in batches:
            taken.append(batch)
            if len(taken) == count:
                break
    return taken


def test_an_epoch_deals_every_transition_once_per_pass() -> None:
    batches = rollouts(model())
    assert isinstance(batches, Batches) and batches.phase == "rollout" and len(batches) == 8
    epoch = list(batches)
    assert [len(batch.rewards) for batch in epoch] == [64, 64, 64, 48] * 2
    keys = [
        sorted(zip(*(torch.cat([getattr(batch, name) for batch in half]).tolist() for name in
                     ("old_values", "advantages", "rewards")), strict=True))
        for half in (epoch[:4], epoch[4:])
    ]  # fmt: skip
    assert keys[0] == keys[1] and len(set(keys[0])) == 240
    assert not same(epoch[0], epoch[4]), "both passes in the same order"


def test_shapes_and_types() -> None:
    (batch, *_) = rollouts(model())
    assert batch.windows.shape == (BATCH, 60, 7) and batch.account.shape == (BATCH, 3)
    for name in ("last_actions", "actions"):
        values = getattr(batch, name)
        assert values.shape == (BATCH, 3) and values.dtype == torch.int64
        assert values.min() >= 0 and values.max() < ACTIONS
    assert batch.old_log.shape == (BATCH, 3)
    for name in ("old_values", "advantages", "targets", "rewards"):
        assert getattr(batch, name).shape == (BATCH,)
    assert not any(values.requires_grad for values in batch)


def test_advantages_are_normalised_over_the_rollout() -> None:
    epoch = list(rollouts(model()))[:4]
    advantages = torch.cat([batch.advantages for batch in epoch])
    assert advantages.mean().abs() < 1e-5 and abs(advantages.std() - 1) < 1e-4


def test_before_the_first_update_the_policy_is_the_one_that_played() -> None:
    """So the stored inputs, actions and log-probabilities belong together: every ratio is 1."""
    played = model()
    for batch in rollouts(played):
        output = workload().training_step(played, batch)
        _, values = played(batch.windows, batch.account, batch.last_actions)
        torch.testing.assert_close(values, batch.old_values)
        assert abs(float(output.metrics["approximate_kl"])) < 1e-6
        assert float(output.metrics["clipped_ratio"]) == 0
        expected = -float(batch.advantages.mean())
        assert float(output.metrics["policy_loss"]) == pytest.approx(expected, abs=1e-5)
        assert output.samples == len(batch.rewards)


@pytest.mark.parametrize(
    "rules",
    [Rules(episode_bars=7), Rules(episode_bars=9, ruin=0.97, spread=0.02)],
    ids=["cut off", "ruined and cut off"],
)
def test_a_rollout_is_the_environment_replayed_with_textbook_advantages(rules: Rules) -> None:
    """Rewards, states and targets of every account, over several episodes each.

    The environment plays the stored actions again; where an episode ended, the next row must be a fresh
    account. Values of the states that steps led to, before any reset, come from the model anew.
    """
    schedule = Schedule(accounts=10, bars=40, passes=1)
    played, here = model(), workload(schedule, rules)
    batches = rollouts(played, like=here)
    next(iter(batches))
    rows: dict[str, Tensor] = {
        name: values.unflatten(0, (40, 10)) for name, values in batches.state_dict()["rollout"].items()
    }
    replay = MarketReplay(here.market, rules)
    spans = here.market.training

    def last_of(bars: Tensor) -> Tensor:
        return torch.tensor([next(s.last for s in spans if s.first <= b <= s.last) for b in bars.tolist()])

    first = rows["bar"][0].long()
    state = open_accounts(first, last_of(first))
    shape = (40, 10)
    next_values, terminated, ended = np.zeros(shape), np.zeros(shape, bool), np.zeros(shape, bool)
    with torch.no_grad():
        for t in range(40):
            assert torch.equal(rows["bar"][t].long(), state.bar)
            torch.testing.assert_close(rows["account"][t], state.own_state())
            assert torch.equal(rows["last_actions"][t].long(), state.actions)
            step = replay.step(state, rows["actions"][t].long())
            torch.testing.assert_close(rows["rewards"][t], step.reward)
            after = step.after
            _, values = played(here.market.window(after.bar), after.own_state(), after.actions)
            next_values[t], terminated[t] = values.numpy(), step.terminated.numpy()
            ended[t] = (step.terminated | step.truncated).numpy()
            if t < 39:
                following = rows["bar"][t + 1].long()
                fresh = open_accounts(following, last_of(following))
                over = torch.from_numpy(ended[t])
                state = Accounts(
                    *(
                        torch.where(over.view(-1, *[1] * (new.dim() - 1)), new, old)
                        for new, old in zip(fresh, after, strict=True)
                    )
                )
    assert ended.sum() >= 30
    assert terminated.any() == (rules.ruin == 0.97)
    advantages = textbook_advantages(
        rows["rewards"].double().numpy(), rows["old_values"].double().numpy(), next_values, terminated, ended,
        schedule.discount, schedule.smoothing,
    )  # fmt: skip
    np.testing.assert_allclose(rows["targets"], advantages + rows["old_values"].double().numpy(), atol=1e-3)
    normalised = (advantages - advantages.mean()) / advantages.std(ddof=1)
    np.testing.assert_allclose(rows["advantages"], normalised, atol=1e-3)


class FixedPolicy(nn.Module):
    """The same distribution per agent whatever happens."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, windows: Tensor, account: Tensor, last_actions: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits.expand(len(windows), 3, ACTIONS), torch.zeros(len(windows))


def test_actions_are_drawn_with_the_probabilities_of_the_policy() -> None:
    """Within five standard deviations, for each action of each agent, and one of probability zero never."""
    logits = torch.tensor([[0.0, 1, 2, -1, 0.5], [3.0, 0, 0, 0, 0], [-torch.inf, 0, 1, -torch.inf, 0]])
    count = 256 * 40
    batches = rollouts(
        FixedPolicy(logits), batch_size=count, like=workload(Schedule(accounts=256, bars=40, passes=1))
    )
    (batch,) = batches
    probability = logits.softmax(-1)
    found = torch.stack([(batch.actions == action).float().mean(0) for action in range(ACTIONS)], dim=-1)
    assert ((found - probability).abs() <= 5 * (probability * (1 - probability) / count).sqrt()).all()
    # Agents draw independently of each other.
    joint = ((batch.actions[:, 0] == 2) & (batch.actions[:, 1] == 0)).float().mean()
    assert joint == pytest.approx(float(probability[0, 2] * probability[1, 0]), abs=0.02)


def test_accounts_go_on_where_the_last_rollout_left_them() -> None:
    batches = rollouts(model())
    take(batches, len(batches))
    left = batches.state_dict()["accounts"]["bar"]
    take(batches, 1)
    assert torch.equal(batches.state_dict()["rollout"]["bar"][: SMALL.accounts].long(), left)


def test_the_next_rollout_is_played_with_the_model_of_that_moment() -> None:
    played = model()
    one, other = rollouts(played), rollouts(played)
    first = take(one, len(one) + 1)
    second = take(other, len(other))
    with torch.no_grad():
        for parameter in played.parameters():
            parameter.mul_(0.5)
    second += take(other, 1)
    assert all(same(a, b) for a, b in zip(first[:-1], second[:-1], strict=True))
    assert not torch.equal(first[-1].old_log, second[-1].old_log)


@pytest.mark.parametrize("position", range(17))
def test_interrupted_anywhere_the_rest_is_bit_identical(position: int) -> None:
    """At every batch of two epochs; the new process draws its own global random numbers, in vain."""
    played = model()
    whole = take(rollouts(played), 24)
    interrupted = rollouts(played)
    taken = take(interrupted, position) if position else []
    state = through_a_checkpoint(interrupted.state_dict())
    torch.manual_seed(999)
    resumed = rollouts(played)
    resumed.load_state_dict(state)
    taken += take(resumed, 24 - position)
    assert all(same(a, b) for a, b in zip(taken, whole, strict=True))


def test_the_rest_of_an_epoch_is_the_rest_and_not_a_whole_one() -> None:
    played = model()
    interrupted = rollouts(played)
    take(interrupted, 3)
    resumed = rollouts(played)
    resumed.load_state_dict(interrupted.state_dict())
    assert [len(list(resumed)) for _ in range(2)] == [5, 8]


def test_a_saved_state_does_not_change_when_training_goes_on() -> None:
    batches = rollouts(model())
    take(batches, 2)
    state = batches.state_dict()
    before = through_a_checkpoint(state)
    take(batches, 9)
    after = through_a_checkpoint(state)
    for part in ("accounts", "rollout"):
        assert all(torch.equal(before[part][name], after[part][name]) for name in before[part])
    assert torch.equal(before["generator"], after["generator"])


def test_an_epoch_left_early_is_over() -> None:
    """A loop that breaks out and begins anew gets the next epoch, not the rest of this one."""
    played = model()
    batches = rollouts(played)
    next(iter(batches))
    assert len(list(batches)) == len(batches)
    assert batches.state_dict()["epoch"] == 2


def test_the_order_depends_on_the_seed_and_nothing_global() -> None:
    played = model()
    torch.manual_seed(1)
    one = take(rollouts(played), 10)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other = take(rollouts(played), 10)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(same(a, b) for a, b in zip(one, other, strict=True))
    assert not same(take(rollouts(played, seed=2), 1)[0], one[0])


def foreign_market(played: nn.Module) -> Batches:
    return rollouts(played, like=TacticalMappo([cut(bundled()[0], 0, 5000)], schedule=SMALL))


def foreign_schedule(played: nn.Module) -> Batches:
    return rollouts(played, like=workload(Schedule(accounts=12, bars=20, passes=3)))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (foreign_market, "fingerprint"),
        (foreign_schedule, "schedule"),
        (lambda played: rollouts(played, seed=5), "seed"),
        (lambda played: rollouts(played, batch_size=32), "batch_size"),
    ],
)
def test_a_state_of_another_run_is_refused(other: Any, named: str) -> None:
    played = model()
    with pytest.raises(DataError) as caught:
        rollouts(played).load_state_dict(other(played).state_dict())
    assert f"has {named}" in caught.value.wrong and "resume with the same" in caught.value.fix


def test_a_state_of_another_workload_is_refused() -> None:
    with pytest.raises(DataError, match="has fingerprint None"):
        rollouts(model()).load_state_dict({"kind": "sklearn digits", "epoch": 1, "position": 0})


def test_a_batch_is_never_larger_than_the_rollout() -> None:
    batches = rollouts(model(), batch_size=10**6)
    assert isinstance(batches, Rollouts) and len(batches) == SMALL.passes
    assert [len(batch.rewards) for batch in batches] == [240, 240]
