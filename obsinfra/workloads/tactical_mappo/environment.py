"""Market replay as a vectorised environment in torch: many accounts trade historical bars side by side.

Used by the rollout and by evaluation; knows nothing of networks or PPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from obsinfra.errors import DataError
from obsinfra.workloads.market_data import FEATURES, TRAILING, Instrument, causal_features, split_date

AGENTS = ("tactical", "risk", "execution")
ACTIONS = 5
WINDOW = 60
N_FEATURES = len(FEATURES)
ACCOUNT = 3
"""Numbers of an account's own state: exposure, log equity, drawdown."""

DIRECTION = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Tactical agent: wanted exposure as a share of equity, short to long."""
SIZE = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Risk agent: what share of the wanted exposure may be taken. No leverage beyond 1."""
SPEED = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Execution agent: what share of the way to the allowed exposure is traded at this bar."""

HOLD = (4, 4, 4)
"""Joint action that buys at once and holds: the buy-and-hold policy."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What trading costs and how it is judged.

    Attributes:
        spread: cost per unit of exposure traded (2 basis points).
        impact: further cost per squared unit traded, which makes trading slowly worth something.
        risk_aversion: weight of the squared return in the reward, per percent.
        ruin: equity at which an episode ends for good; equity starts at 1.
        episode_bars: bars after which an episode is cut off.
    """

    spread: float = 2e-4
    impact: float = 3e-4
    risk_aversion: float = 0.01
    ruin: float = 0.5
    episode_bars: int = 128


@dataclass(frozen=True, slots=True)
class Span:
    """Bars `first` … `last` of the concatenated market, at each of which a decision can be taken."""

    instrument: str
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True, slots=True)
class Market:
    """All instruments one behind the other, as tensors on one device.

    Attributes:
        windows: view [bars − 59, 7, 60] of the features; `windows[t − 59]` ends at bar t. Costs no memory.
        next_return: simple return from the close of bar t to the close of bar t + 1, [bars].
        training, validation: where decisions may be taken; the return that a training decision earns
            ends before `split`.
        split: first date of validation.
    """

    windows: Tensor
    next_return: Tensor
    training: tuple[Span, ...]
    validation: tuple[Span, ...]
    split: np.datetime64

    def window(self, bars: Tensor) -> Tensor:
        """Feature windows that end at `bars` [...], gathered: [..., 60, 7]."""
        return self.windows[bars - (WINDOW - 1)].transpose(-1, -2)

    def to(self, device: torch.device) -> Market:
        """This market on `device`."""
        features = torch.cat([self.windows[0].T, self.windows[1:, :, -1]])
        return Market(
            windows=features.to(device).unfold(0, WINDOW, 1),
            next_return=self.next_return.to(device),
            training=self.training,
            validation=self.validation,
            split=self.split,
        )


def build_market(instruments: Sequence[Instrument], rules: Rules) -> Market:
    """Features, returns and spans of `instruments`, on the CPU.

    Raises:
        DataError: no instrument has enough bars before, or after, the date of the split.
    """
    split = split_date(instruments)
    features, returns, training, validation = [], [], [], []
    offset = 0
    for instrument in instruments:
        features.append(torch.from_numpy(causal_features(instrument)))
        change = instrument.close[1:] / instrument.close[:-1] - 1
        returns.append(torch.from_numpy(np.append(change, 0.0)).to(torch.float32))
        boundary = int(np.searchsorted(instrument.dates, split))
        earliest = TRAILING + WINDOW - 1
        first, last = earliest, boundary - 2
        if last - first + 1 >= rules.episode_bars:
            training.append(Span(instrument.name, offset + first, offset + last))
        first, last = max(boundary, earliest), len(instrument) - 2
        if last - first + 1 >= 20:
            validation.append(Span(instrument.name, offset + first, offset + last))
        offset += len(instrument)
    if not training or not validation:
        part = "training" if not training else "validation"
        begins = np.datetime_as_string(split, "D")
        raise DataError(
            f"no instrument has enough bars for {part} (validation begins {begins})",
            f"{TRAILING + WINDOW + rules.episode_bars} bars before and 20 from that date in one instrument",
            "give a longer history",
        )
    return Market(
        windows=torch.cat(features).unfold(0, WINDOW, 1),
        next_return=torch.cat(returns),
        training=tuple(training),
        validation=tuple(validation),
        split=split,
    )


class Accounts(NamedTuple):
    """State of `E` accounts; every tensor [E], actions [E, 3].

    `bar` is where the next decision falls; `last` the last decision bar of the account's span; `age` the
    decisions taken in this episode; `actions` the joint action taken last, as indices.
    """

    bar: Tensor
    last: Tensor
    age: Tensor
    exposure: Tensor
    equity: Tensor
    peak: Tensor
    actions: Tensor

    def own_state(self) -> Tensor:
        """What an account knows of itself, [E, 3]: exposure, log equity, drawdown, scaled to about one."""
        return torch.stack(
            [self.exposure, 10 * self.equity.log(), 10 * (1 - self.equity / self.peak)], dim=-1
        )


def open_accounts(first: Tensor, last: Tensor) -> Accounts:
    """Fresh accounts without a position, at bars `first` [E]."""
    count, device = len(first), first.device
    one = torch.ones(count, device=device)
    neutral = torch.tensor([2, 0, 0], dtype=torch.int64, device=device)
    return Accounts(
        bar=first,
        last=last,
        age=torch.zeros_like(first),
        exposure=torch.zeros(count, device=device),
        equity=one,
        peak=one.clone(),
        actions=neutral.expand(count, len(AGENTS)).clone(),
    )


class Step(NamedTuple):
    """What one bar did to each account.

    `after` are the accounts one bar later, not yet reset; `net` the account's return after costs;
    `traded` the exposure bought or sold.
    """

    after: Accounts
    reward: Tensor
    net: Tensor
    traded: Tensor
    terminated: Tensor
    truncated: Tensor


class MarketReplay:
    """The dynamics. Stateless: accounts go in, accounts come out, so evaluation and rollout can share it.

    A decision is taken at a bar's close and executed there; the exposure it leads to earns the return to the
    next close. Exposure is a share of equity and is kept constant between decisions.
    """

    def __init__(self, market: Market, rules: Rules) -> None:
        self.market, self.rules = market, rules
        device = market.next_return.device
        self._direction = torch.tensor(DIRECTION, device=device)
        self._size = torch.tensor(SIZE, device=device)
        self._speed = torch.tensor(SPEED, device=device)
        starts, ends = [], []
        for span in market.training:
            usable = len(span) - rules.episode_bars + 1
            starts.append(torch.arange(span.first, span.first + usable))
            ends.append(torch.full((usable,), span.last))
        self._starts = torch.cat(starts).to(device)
        self._ends = torch.cat(ends).to(device)

    def reset(self, uniform: Tensor) -> Accounts:
        """Fresh accounts at training bars chosen by numbers `uniform` [E] from [0, 1)."""
        chosen = (uniform.double() * len(self._starts)).long().clamp_(max=len(self._starts) - 1)
        return open_accounts(self._starts[chosen], self._ends[chosen])

    def step(self, accounts: Accounts, actions: Tensor) -> Step:
        """Trade one bar.

        Args:
            accounts: E accounts at their bars.
            actions: joint actions as indices, int64 [E, 3], in the order of `AGENTS`.

        Returns:
            `reward` is shared by the agents: the net return r in percent less `risk_aversion` · r².
        """
        rules = self.rules
        wanted = self._direction[actions[:, 0]] * self._size[actions[:, 1]]
        change = self._speed[actions[:, 2]] * (wanted - accounts.exposure)
        exposure = accounts.exposure + change
        traded = change.abs()
        cost = rules.spread * traded + rules.impact * traded.square()
        net = exposure * self.market.next_return[accounts.bar] - cost
        percent = 100 * net
        reward = percent - rules.risk_aversion * percent.square()
        equity = accounts.equity * (1 + net).clamp_min(1e-6)
        age = accounts.age + 1
        terminated = equity < rules.ruin
        truncated = ~terminated & ((age >= rules.episode_bars) | (accounts.bar >= accounts.last))
        after = Accounts(
            bar=torch.minimum(accounts.bar + 1, accounts.last),
            last=accounts.last,
            age=age,
            exposure=exposure,
            equity=equity,
            peak=torch.maximum(accounts.peak, equity),
            actions=actions,
        )
        return Step(after, reward, net, traded, terminated, truncated)


def replaced(where: Tensor, fresh: Accounts, accounts: Accounts) -> Accounts:
    """`fresh` accounts where `where` [E] is true, `accounts` elsewhere."""
    return Accounts(
        *(
            torch.where(where.unsqueeze(-1) if old.dim() == 2 else where, new, old)
            for new, old in zip(fresh, accounts, strict=True)
        )
    )
