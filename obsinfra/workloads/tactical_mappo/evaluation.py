"""Plays a policy through given bars and reports what it earned. Used by validation and by the benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from obsinfra.workloads.tactical_mappo.environment import (
    ACTIONS,
    AGENTS,
    HOLD,
    Accounts,
    MarketReplay,
    Span,
    open_accounts,
)

BARS_PER_YEAR = 252
"""For the annualised Sharpe ratio; the default data are daily bars."""

Policy = Callable[[Accounts], Tensor]
"""Accounts in, joint actions int64 [E, 3] out."""


class Performance(NamedTuple):
    """What a policy earned, averaged over spans.

    `reward` per bar; `total_return` and `max_drawdown` as ratios of the capital at the start; `sharpe` per
    year without a risk-free rate; `exposure` mean absolute; `turnover` exposure traded per bar.
    """

    reward: float
    total_return: float
    max_drawdown: float
    sharpe: float
    exposure: float
    turnover: float


@torch.no_grad()
def play(replay: MarketReplay, spans: Sequence[Span], policy: Policy) -> Performance:
    """One account through each span from its first to its last bar, all side by side.

    Costs are paid, nothing is reset, a ruined account stays in the market with what it has left.
    """
    device = replay.market.next_return.device
    lengths = torch.tensor([len(span) for span in spans], device=device)
    accounts = open_accounts(
        torch.tensor([span.first for span in spans], device=device),
        torch.tensor([span.last for span in spans], device=device),
    )
    equity = [accounts.equity]
    rewards, nets, exposures, traded, live = [], [], [], [], []
    for t in range(int(lengths.max())):
        step = replay.step(accounts, policy(accounts))
        alive = t < lengths
        rewards.append(step.reward * alive)
        nets.append(step.net * alive)
        exposures.append(step.after.exposure.abs() * alive)
        traded.append(step.traded * alive)
        live.append(alive)
        equity.append(torch.where(alive, step.after.equity, equity[-1]))
        accounts = step.after
    bars = lengths.sum()
    curve, net, mask = torch.stack(equity).double(), torch.stack(nets).double(), torch.stack(live)
    drawdown = (1 - curve / curve.cummax(0).values).amax(0)
    mean = net.sum(0) / lengths
    deviation = (((net - mean) * mask).square().sum(0) / lengths).sqrt()
    # An account that never trades has no deviation and earns nothing: its ratio is 0, not 0 / 0.
    sharpe = torch.where(deviation > 0, mean / deviation.clamp_min(1e-12), 0.0) * math.sqrt(BARS_PER_YEAR)
    return Performance(
        reward=float(torch.stack(rewards).double().sum() / bars),
        total_return=float((curve[-1] - 1).mean()),
        max_drawdown=float(drawdown.mean()),
        sharpe=float(sharpe.mean()),
        exposure=float(torch.stack(exposures).sum() / bars),
        turnover=float(torch.stack(traded).sum() / bars),
    )


def pieces(spans: Sequence[Span], bars: int) -> list[Span]:
    """The spans cut into parts of at most `bars`, so that a long period is played side by side."""
    return [
        Span(span.instrument, first, min(first + bars - 1, span.last))
        for span in spans
        for first in range(span.first, span.last + 1, bars)
    ]


def greedy(model: nn.Module, replay: MarketReplay) -> Policy:
    """The most likely action of each agent."""

    def act(accounts: Accounts) -> Tensor:
        logits: Tensor = model(replay.market.window(accounts.bar), accounts.own_state(), accounts.actions)[0]
        return logits.argmax(-1)

    return act


def hold(accounts: Accounts) -> Tensor:
    """Buy at once and hold."""
    return torch.tensor(HOLD, device=accounts.bar.device).expand(len(accounts.bar), len(AGENTS))


def uniformly_random(seed: int) -> Policy:
    """Every action of every agent equally likely, from an own generator."""
    generator = torch.Generator().manual_seed(seed)

    def act(accounts: Accounts) -> Tensor:
        shape = (len(accounts.bar), len(AGENTS))
        return torch.randint(ACTIONS, shape, generator=generator).to(accounts.bar.device)

    return act
