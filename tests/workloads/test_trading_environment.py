"""The vectorised market replay does what a scalar account in plain Python does, bar by bar, on real bars."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from market_tables import bundled

from obsinfra.workloads.tactical_mappo.environment import (
    HOLD,
    Accounts,
    Market,
    MarketReplay,
    Rules,
    Span,
    build_market,
    open_accounts,
    replaced,
)
from obsinfra.workloads.tactical_mappo.evaluation import hold, pieces, play, uniformly_random

BARS = 5031
"""Of each of the two instruments."""


@cache
def market() -> Market:
    return build_market(bundled(), Rules())


@cache
def closes() -> list[float]:
    """Of the market's bars, straight from the instruments."""
    return [float(close) for instrument in bundled() for close in instrument.close]


@dataclass
class ScalarAccount:
    """One account, by the rules as they are written down."""

    rules: Rules
    bar: int
    last: int
    age: int = 0
    exposure: float = 0.0
    equity: float = 1.0
    peak: float = 1.0

    def trade(self, tactical: int, risk: int, execution: int) -> tuple[float, float, float, bool, bool]:
        """Reward, net return, exposure traded, terminated, truncated."""
        rules = self.rules
        wanted = (tactical - 2) / 2 * (risk / 4)
        change = execution / 4 * (wanted - self.exposure)
        self.exposure += change
        gross = self.exposure * (closes()[self.bar + 1] / closes()[self.bar] - 1)
        net = gross - rules.spread * abs(change) - rules.impact * change * change
        reward = 100 * net - rules.risk_aversion * (100 * net) ** 2
        self.equity *= max(1 + net, 1e-6)
        self.peak = max(self.peak, self.equity)
        self.age += 1
        terminated = self.equity < rules.ruin
        truncated = not terminated and (self.age >= rules.episode_bars or self.bar >= self.last)
        self.bar = min(self.bar + 1, self.last)
        return reward, net, abs(change), terminated, truncated


some_rules = st.builds(
    Rules,
    spread=st.sampled_from([0.0, 2e-4, 0.01, 0.05]),
    impact=st.sampled_from([0.0, 3e-4, 0.02]),
    risk_aversion=st.sampled_from([0.0, 0.01, 0.1]),
    ruin=st.sampled_from([0.5, 0.9, 0.97]),
    episode_bars=st.integers(2, 40),
)


@given(rules=some_rules, seed=st.integers(0, 2**32 - 1), accounts=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_accounts_do_what_a_scalar_account_does(rules: Rules, seed: int, accounts: int) -> None:
    draw = random.Random(seed)
    lasts = [draw.choice([BARS - 2, 2 * BARS - 2, 400, 6000]) for _ in range(accounts)]
    firsts = [draw.randrange(max(119, last - 45), last - 1) for last in lasts]
    scalars = [ScalarAccount(rules, *pair) for pair in zip(firsts, lasts, strict=True)]
    replay = MarketReplay(market(), rules)
    state = open_accounts(torch.tensor(firsts), torch.tensor(lasts))
    for _ in range(45):
        actions = [[draw.randrange(5) for _ in range(3)] for _ in range(accounts)]
        step = replay.step(state, torch.tensor(actions))
        for i, (scalar, action) in enumerate(zip(scalars, actions, strict=True)):
            reward, net, traded, terminated, truncated = scalar.trade(*action)
            assert step.reward[i].item() == pytest.approx(reward, rel=1e-4, abs=1e-5)
            assert step.net[i].item() == pytest.approx(net, rel=1e-4, abs=1e-7)
            assert step.traded[i].item() == pytest.approx(traded, rel=1e-4, abs=1e-6)
            after = step.after
            assert (after.bar[i].item(), after.age[i].item()) == (scalar.bar, scalar.age)
            assert after.last[i].item() == scalar.last and after.actions[i].tolist() == action
            own = [
                scalar.exposure,
                10 * math.log(scalar.equity),
                10 * (1 - scalar.equity / scalar.peak),
            ]
            assert after.own_state()[i].tolist() == pytest.approx(own, rel=1e-3, abs=1e-4)
            if abs(scalar.equity / rules.ruin - 1) > 1e-5:  # at the very edge, rounding decides
                assert step.terminated[i].item() == terminated
                assert step.truncated[i].item() == truncated
        state = step.after


def test_holding_pays_once() -> None:
    """The cost of buying, at the first bar; from then on exactly the market's return is earned."""
    replay = MarketReplay(market(), Rules())
    state = open_accounts(torch.tensor([1000]), torch.tensor([BARS - 2]))
    cost = 2e-4 + 3e-4
    for bar in range(1000, 1050):
        step = replay.step(state, torch.tensor([HOLD]))
        gross = market().next_return[bar].item()
        if bar == 1000:
            assert step.traded.item() == 1 and step.net.item() == pytest.approx(gross - cost, rel=1e-5)
        else:
            assert step.traded.item() == 0 and step.net.item() == gross
        state = step.after
    expected = closes()[1050] / closes()[1000] * (1 + closes()[1001] / closes()[1000] - 1 - cost)
    expected /= closes()[1001] / closes()[1000]
    assert state.equity.item() == pytest.approx(expected, rel=1e-5)


def test_doing_nothing_costs_nothing_and_earns_nothing() -> None:
    """Whether the tactical agent stays flat, the risk agent allows nothing, or the execution agent waits."""
    replay = MarketReplay(market(), Rules())
    state = open_accounts(torch.tensor([300, 300, 300]), torch.tensor([BARS - 2] * 3))
    for _ in range(20):
        step = replay.step(state, torch.tensor([[2, 4, 4], [4, 0, 4], [0, 4, 0]]))
        assert step.reward.tolist() == step.net.tolist() == step.traded.tolist() == [0.0] * 3
        state = step.after
    assert state.equity.tolist() == [1.0] * 3


def test_trading_in_two_halves_costs_less_than_at_once() -> None:
    """Impact grows with the square, so the execution agent has something to decide."""
    replay = MarketReplay(market(), Rules())
    costs = []
    for speeds in ((4, 4), (2, 4)):
        state, paid = open_accounts(torch.tensor([500]), torch.tensor([BARS - 2])), 0.0
        for speed in speeds:
            step = replay.step(state, torch.tensor([[4, 4, speed]]))
            gross = step.after.exposure * market().next_return[state.bar]
            paid += (gross - step.net).item()
            state = step.after
        assert state.exposure.item() == 1
        costs.append(paid)
    assert costs[0] == pytest.approx(2e-4 + 3e-4, abs=1e-7)
    assert costs[1] == pytest.approx(2e-4 + 2 * 0.25 * 3e-4, abs=1e-7)


def test_ruin_ends_an_episode_for_good_and_its_length_only_cuts_it_off() -> None:
    """Turning the whole position over at every bar, at 5 % a time, ruins within a few bars."""
    rules = replace(Rules(), spread=0.05, episode_bars=30)
    replay = MarketReplay(market(), rules)
    state = open_accounts(torch.tensor([1000, 1000]), torch.tensor([BARS - 2] * 2))
    terminated = truncated = False
    for t in range(30):
        step = replay.step(state, torch.tensor([[4 * (t % 2), 4, 4], [2, 0, 0]]))
        assert not (step.terminated & step.truncated).any() and not step.terminated[1]
        terminated = terminated or bool(step.terminated[0])
        truncated = bool(step.truncated[1])
        assert truncated == (t == 29)
        state = step.after
    assert terminated and truncated


def test_episodes_begin_flat_at_training_bars_and_fit_in_before_the_split() -> None:
    rules = Rules()
    replay = MarketReplay(market(), rules)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    uniform[0], uniform[1] = 0.0, 1 - 2**-24
    state = replay.reset(uniform)
    spans = market().training
    starts = {bar for span in spans for bar in range(span.first, span.last - rules.episode_bars + 2)}
    assert set(state.bar.tolist()) <= starts
    assert len(set(state.bar.tolist())) > 0.9 * len(starts)
    assert (state.bar[0].item(), state.bar[1].item()) == (min(starts), max(starts))
    assert (state.bar + rules.episode_bars - 1 <= state.last).all()
    assert set(state.last.tolist()) == {span.last for span in spans}
    assert (state.exposure == 0).all() and (state.equity == 1).all() and (state.peak == 1).all()
    assert (state.age == 0).all() and (state.actions == torch.tensor([2, 0, 0])).all()


def test_only_accounts_that_ended_are_replaced() -> None:
    old = open_accounts(torch.tensor([200, 300, 400]), torch.tensor([900] * 3))
    old = MarketReplay(market(), Rules()).step(old, torch.tensor([HOLD] * 3)).after
    fresh = open_accounts(torch.tensor([1200, 1300, 1400]), torch.tensor([1900] * 3))
    mixed = replaced(torch.tensor([False, True, False]), fresh, old)
    for name in Accounts._fields:
        values = getattr(mixed, name)
        assert torch.equal(values[1], getattr(fresh, name)[1]), name
        assert torch.equal(values[[0, 2]], getattr(old, name)[[0, 2]]), name


def scalar_play(span: Span, actions: list[list[int]], rules: Rules) -> dict[str, float]:
    account = ScalarAccount(rules, span.first, span.last)
    curve, nets, rewards, exposures, traded = [1.0], [], [], [], []
    for action in actions:
        reward, net, change, _, _ = account.trade(*action)
        rewards.append(reward)
        nets.append(net)
        exposures.append(abs(account.exposure))
        traded.append(change)
        curve.append(account.equity)
    mean = sum(nets) / len(nets)
    deviation = math.sqrt(sum((net - mean) ** 2 for net in nets) / len(nets))
    return {
        "reward": sum(rewards) / len(rewards),
        "total_return": curve[-1] - 1,
        "max_drawdown": max(1 - curve[i] / max(curve[: i + 1]) for i in range(len(curve))),
        "sharpe": mean / deviation * math.sqrt(252),
        "exposure": sum(exposures) / len(exposures),
        "turnover": sum(traded) / len(traded),
    }


def test_performance_is_that_of_scalar_accounts() -> None:
    """Spans of different lengths side by side: the longer one goes on alone. Rewards weigh by bars."""
    spans = [Span("sp500", 1000, 1299), Span("nasdaq", BARS + 2000, BARS + 2079)]
    rules = Rules()
    found = play(MarketReplay(market(), rules), spans, uniformly_random(5))
    policy, actions = uniformly_random(5), []
    for _ in range(300):
        actions.append(policy(open_accounts(torch.zeros(2).long(), torch.zeros(2).long())).tolist())
    parts = [
        scalar_play(span, [joint[i] for joint in actions[: len(span)]], rules) for i, span in enumerate(spans)
    ]
    for name in ("total_return", "max_drawdown", "sharpe"):
        assert getattr(found, name) == pytest.approx((parts[0][name] + parts[1][name]) / 2, rel=1e-3), name
    for name in ("reward", "exposure", "turnover"):
        expected = (300 * parts[0][name] + 80 * parts[1][name]) / 380
        assert getattr(found, name) == pytest.approx(expected, rel=1e-3), name


def test_buy_and_hold_earns_what_the_index_earned() -> None:
    (span, _) = market().validation
    found = play(MarketReplay(market(), Rules()), [span], hold)
    index = closes()[span.last + 1] / closes()[span.first]
    assert 1 + found.total_return == pytest.approx(index * (1 - 5e-4), rel=1e-3)
    assert found.exposure == pytest.approx(1) and found.turnover == pytest.approx(1 / len(span))


def test_a_policy_that_never_trades_has_no_sharpe_ratio_but_zero() -> None:
    def flat(accounts: Accounts) -> torch.Tensor:
        return torch.tensor([2, 0, 0]).expand(len(accounts.bar), 3)

    found = play(MarketReplay(market(), Rules()), market().validation, flat)
    assert found == (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@given(length=st.integers(1, 1000), bars=st.integers(1, 300))
def test_pieces_cover_a_span_without_gap_or_overlap(length: int, bars: int) -> None:
    parts = pieces([Span("x", 119, 118 + length)], bars)
    assert [bar for part in parts for bar in range(part.first, part.last + 1)] == list(
        range(119, 119 + length)
    )
    assert all(len(part) == bars for part in parts[:-1]) and 1 <= len(parts[-1]) <= bars
