"""The workload: market, networks, loss and validation together. Called by the registry and the trainer."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import nn

from obsinfra.errors import UserError
from obsinfra.workloads.market_data import FEATURES, Instrument, load_instruments
from obsinfra.workloads.protocol import Batches, Defaults, StepOutput
from obsinfra.workloads.tactical_mappo.environment import (
    AGENTS,
    N_FEATURES,
    WINDOW,
    MarketReplay,
    Rules,
    build_market,
)
from obsinfra.workloads.tactical_mappo.evaluation import greedy, hold, play
from obsinfra.workloads.tactical_mappo.networks import SIZES, ActorsAndCritic
from obsinfra.workloads.tactical_mappo.ppo import (
    clipped_policy_loss,
    clipped_value_loss,
    entropies,
    log_probabilities,
)
from obsinfra.workloads.tactical_mappo.rollout import Rollouts, Schedule, Transitions

CLIP = 0.2
"""ε of the policy ratio."""
VALUE_CLIP = 0.5
"""Furthest a value moves in one epoch; rewards are in percent, so values are of order 1."""
VALUE_WEIGHT = 0.5
ENTROPY_WEIGHT = 0.01


class TacticalMappo:
    """Three agents (tactical, risk, execution) trade market bars for one risk-adjusted reward.

    Args:
        instruments: validated bars.
        model_size: a name of `networks.SIZES`.
        rules: costs and reward.
        schedule: size and use of a rollout.

    Raises:
        UserError: unknown size.
        DataError: too few bars on one side of the split.
    """

    name = "tactical_mappo"
    defaults = Defaults(
        epochs=100,
        batch_size=1024,
        learning_rate=7e-4,
        weight_decay=1e-4,
        schedule="cosine",
        metric="reward",
        mode="max",
        autocast=False,  # ratios of probabilities; and the networks are too small to gain
        validate_every=5,
        eps=1e-5,
    )

    def __init__(
        self,
        instruments: list[Instrument],
        model_size: str | None = None,
        rules: Rules | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        size = model_size or "small"
        if size not in SIZES:
            raise UserError(f"tactical_mappo has no size {size!r}", f"one of {', '.join(SIZES)}")
        self.width = SIZES[size]
        self.rules, self.schedule = rules or Rules(), schedule or Schedule()
        self.instruments = instruments
        self.market = build_market(instruments, self.rules)
        self.fingerprint = _fingerprint(instruments)

    def build_model(self) -> nn.Module:
        """Fresh actors and critic."""
        return ActorsAndCritic(self.width)

    def train_batches(
        self, model: nn.Module, *, batch_size: int, seed: int, num_workers: int, device: torch.device
    ) -> Batches:
        """Rollouts of `model`. There is nothing to load, so `num_workers` has no use here."""
        return Rollouts(
            MarketReplay(self.market.to(device), self.rules),
            model,
            self.schedule,
            batch_size=batch_size,
            seed=seed,
            fingerprint=self.fingerprint,
        )

    def training_step(self, model: nn.Module, batch: Transitions) -> StepOutput:
        """PPO's loss on one mini-batch; `metrics` say how far the policy has moved."""
        logits, values = model(batch.windows, batch.account, batch.last_actions)
        logits, values = logits.float(), values.float()
        new_log = log_probabilities(logits, batch.actions)
        policy_loss = clipped_policy_loss(new_log, batch.old_log, batch.advantages, CLIP)
        value_loss = clipped_value_loss(values, batch.old_values, batch.targets, VALUE_CLIP)
        entropy = entropies(logits).mean()
        loss = policy_loss + VALUE_WEIGHT * value_loss - ENTROPY_WEIGHT * entropy
        with torch.no_grad():
            change = new_log - batch.old_log
            kl = (change.exp() - 1 - change).mean()
            clipped = ((change.exp() - 1).abs() > CLIP).float().mean()
        return StepOutput(
            loss=loss,
            samples=len(values),
            metrics={
                "reward": batch.rewards.mean(),
                "policy_loss": policy_loss.detach(),
                "value_loss": value_loss.detach(),
                "entropy": entropy.detach(),
                "approximate_kl": kl,
                "clipped_ratio": clipped,
            },
        )

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """The greedy policy through the whole validation period, beside buying and holding it."""
        replay = MarketReplay(self.market.to(device), self.rules)
        spans = replay.market.validation
        trained, held = play(replay, spans, greedy(model, replay)), play(replay, spans, hold)
        return {
            "reward": trained.reward,
            "return": trained.total_return,
            "max_drawdown": trained.max_drawdown,
            "sharpe": trained.sharpe,
            "exposure": trained.exposure,
            "turnover": trained.turnover,
            "buy_and_hold_reward": held.reward,
            "buy_and_hold_return": held.total_return,
            "buy_and_hold_max_drawdown": held.max_drawdown,
            "buy_and_hold_sharpe": held.sharpe,
        }

    def flops_per_sample(self, model: nn.Module) -> float | None:
        """Per weight two forward and four backward, but two in the first layers, whose input has no gradient;
        the rollout's forward passes are two more, shared by the passes over it."""
        weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        first = (len(AGENTS) + 1) * WINDOW * N_FEATURES * self.width
        return (6.0 + 2.0 / self.schedule.passes) * weights - 2.0 * first

    def describe_data(self) -> dict[str, Any]:
        """Sources, dates and split."""
        return {
            "instruments": [
                {
                    "name": instrument.name,
                    "source": instrument.source,
                    "bars": len(instrument),
                    "first": str(np.datetime_as_string(instrument.dates[0], "D")),
                    "last": str(np.datetime_as_string(instrument.dates[-1], "D")),
                }
                for instrument in self.instruments
            ],
            "features": list(FEATURES),
            "validation_from": str(np.datetime_as_string(self.market.split, "D")),
            "training_bars": sum(map(len, self.market.training)),
            "validation_bars": sum(map(len, self.market.validation)),
            "fingerprint": self.fingerprint,
        }


def _fingerprint(instruments: list[Instrument]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for instrument in instruments:
        for column in ("dates", "open", "high", "low", "close", "volume"):
            digest.update(np.ascontiguousarray(getattr(instrument, column)).tobytes())
    return digest.hexdigest()


def create_workload(*, data_path: str | None, model_size: str | None, seed: int) -> TacticalMappo:
    """Multi-agent PPO with a centralised critic, trading replayed market bars.

    Raises:
        UserError, DataError: unknown size; missing, malformed or too little data.
    """
    return TacticalMappo(load_instruments(data_path), model_size)
