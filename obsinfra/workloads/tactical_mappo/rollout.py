"""Training data of PPO: each epoch plays the market once with the present policy, then deals mini-batches.

Everything needed to go on in the middle of an epoch is in `state_dict`: accounts, generator, and the rollout
as bar numbers and small states; the windows are gathered anew for each mini-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from obsinfra.errors import DataError
from obsinfra.optimization.data_order import derived_seed
from obsinfra.workloads.tactical_mappo.environment import AGENTS, Accounts, MarketReplay, replaced
from obsinfra.workloads.tactical_mappo.ppo import generalised_advantages, log_probabilities


@dataclass(frozen=True, slots=True)
class Schedule:
    """Size and use of a rollout.

    Attributes:
        accounts: environments side by side.
        bars: steps each of them takes per epoch.
        passes: times each transition is learned from.
        discount, smoothing: γ and λ of the advantages.
    """

    accounts: int = 128
    bars: int = 64
    passes: int = 4
    discount: float = 0.9
    smoothing: float = 0.9

    @property
    def transitions(self) -> int:
        return self.accounts * self.bars


class Transitions(NamedTuple):
    """A mini-batch of B decisions: windows [B, 60, 7], account [B, 3], last_actions and actions int64 [B, 3],
    old_log [B, 3], old_values, advantages (normalised over the rollout) and targets [B], rewards [B]."""

    windows: Tensor
    account: Tensor
    last_actions: Tensor
    actions: Tensor
    old_log: Tensor
    old_values: Tensor
    advantages: Tensor
    targets: Tensor
    rewards: Tensor


_COMPACT: dict[str, torch.dtype] = {"bar": torch.int32, "last_actions": torch.int8, "actions": torch.int8}
_KEPT = (
    "bar", "account", "last_actions", "actions", "old_log", "old_values", "advantages", "targets", "rewards",
)  # fmt: skip


class Rollouts:
    """`Batches` of mini-batches; an epoch is one rollout and `passes` shuffled passes over it.

    All randomness comes from an own generator on the CPU, whatever the device, and from (seed, epoch).

    Args:
        replay: the environment, on the model's device.
        model: called as `model(windows, account, last_actions)` for the policy; not trained here.
        schedule: how much to play and how often to use it.
        batch_size: transitions per mini-batch; the last of a pass may be smaller.
        seed: of everything drawn here.
        fingerprint: identifies the market, so that a state of another is refused.

    Attributes:
        phase: `rollout`, for the time inside `next()`.
    """

    phase = "rollout"

    def __init__(
        self,
        replay: MarketReplay,
        model: nn.Module,
        schedule: Schedule,
        *,
        batch_size: int,
        seed: int,
        fingerprint: str,
    ) -> None:
        self.replay, self.model, self.schedule = replay, model, schedule
        self.batch_size, self.seed = min(batch_size, schedule.transitions), seed
        self.fingerprint = fingerprint
        self.epoch = 0
        self.position = 0
        self._continue = False
        self._generator = torch.Generator().manual_seed(derived_seed(seed, "rollout"))
        self._accounts: Accounts = replay.reset(
            torch.rand(schedule.accounts, generator=self._generator).to(self._device)
        )
        self._rollout: dict[str, Tensor] | None = None

    @property
    def _device(self) -> torch.device:
        return self.replay.market.next_return.device

    @property
    def _per_pass(self) -> int:
        return -(-self.schedule.transitions // self.batch_size)

    def __len__(self) -> int:
        return self._per_pass * self.schedule.passes

    def __iter__(self) -> Iterator[Transitions]:
        if not self._continue and self.position:
            self._finish_epoch()
        self._continue = False
        return self._epoch()

    def _epoch(self) -> Iterator[Transitions]:
        order: Tensor | None = None
        ordered_pass = -1
        while self.position < len(self):
            if self._rollout is None:
                self._rollout = self._play()
            this_pass, within = divmod(self.position, self._per_pass)
            if this_pass != ordered_pass:
                order, ordered_pass = self._order(this_pass), this_pass
            assert order is not None
            chosen = order[within * self.batch_size : (within + 1) * self.batch_size].to(self._device)
            batch = self._gather(self._rollout, chosen)
            self.position += 1
            yield batch
        self._finish_epoch()

    def _finish_epoch(self) -> None:
        self.epoch += 1
        self.position = 0
        self._rollout = None

    def _order(self, this_pass: int) -> Tensor:
        shuffle = torch.Generator().manual_seed(derived_seed(self.seed, "order", self.epoch, this_pass))
        return torch.randperm(self.schedule.transitions, generator=shuffle)

    def _gather(self, rollout: Mapping[str, Tensor], chosen: Tensor) -> Transitions:
        rows = {name: rollout[name][chosen] for name in _KEPT}
        return Transitions(
            windows=self.replay.market.window(rows["bar"].long()),
            account=rows["account"],
            last_actions=rows["last_actions"].long(),
            actions=rows["actions"].long(),
            old_log=rows["old_log"],
            old_values=rows["old_values"],
            advantages=rows["advantages"],
            targets=rows["targets"],
            rewards=rows["rewards"],
        )

    @torch.no_grad()
    def _play(self) -> dict[str, Tensor]:
        """One rollout with the present policy; `self._accounts` are afterwards where the next one begins."""
        schedule, market, agents = self.schedule, self.replay.market, len(AGENTS)
        # Drawn at once, on the CPU: one copy to the device, and the same numbers whatever the device.
        noise = torch.rand(schedule.bars, schedule.accounts, agents + 1, generator=self._generator).to(
            self._device
        )
        rows: dict[str, list[Tensor]] = {}

        def keep(**values: Tensor) -> None:
            for name, value in values.items():
                rows.setdefault(name, []).append(value)

        accounts = self._accounts
        logits, values = self._policy(accounts)
        for t in range(schedule.bars):
            cumulative = logits.softmax(-1).cumsum(-1)
            actions = (cumulative[..., :-1] < noise[t, :, :agents, None]).sum(-1)
            step = self.replay.step(accounts, actions)
            ended = step.terminated | step.truncated
            following = step.after
            next_logits, next_values = self._policy(following)
            keep(
                bar=accounts.bar,
                account=accounts.own_state(),
                last_actions=accounts.actions,
                actions=actions,
                old_log=log_probabilities(logits, actions),
                old_values=values,
                next_values=next_values,
                rewards=step.reward,
                terminated=step.terminated,
                ended=ended,
            )
            if bool(ended.any()):
                following = replaced(ended, self.replay.reset(noise[t, :, agents]), following)
                next_logits, next_values = self._policy(following)
            accounts, logits, values = following, next_logits, next_values
        self._accounts = accounts
        played = {name: torch.stack(parts) for name, parts in rows.items()}
        played["advantages"] = generalised_advantages(
            played["rewards"],
            played["old_values"],
            played.pop("next_values"),
            played.pop("terminated"),
            played.pop("ended"),
            discount=schedule.discount,
            smoothing=schedule.smoothing,
        )
        played["targets"] = played["advantages"] + played["old_values"]
        # Over the rollout, not the mini-batch, so a small last mini-batch is not scaled by its own noise.
        spread, mean = torch.std_mean(played["advantages"])
        played["advantages"] = (played["advantages"] - mean) / (spread + 1e-8)
        assert market.windows.shape[0] < 2**31
        return {
            name: value.flatten(0, 1).to(_COMPACT.get(name, value.dtype)) for name, value in played.items()
        }

    def _policy(self, accounts: Accounts) -> tuple[Tensor, Tensor]:
        logits, values = self.model(
            self.replay.market.window(accounts.bar), accounts.own_state(), accounts.actions
        )
        return logits.float(), values.float()

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch is, the rollout it learns from, the accounts and the generator."""
        return {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "schedule": [self.schedule.accounts, self.schedule.bars, self.schedule.passes],
            "epoch": self.epoch,
            "position": self.position,
            "generator": self._generator.get_state(),
            "accounts": {name: value.clone() for name, value in self._accounts._asdict().items()},
            "rollout": None if self._rollout is None else dict(self._rollout),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there at the next `iter()`.

        Raises:
            DataError: it belongs to another market, seed, batch size or schedule.
        """
        mine = self.state_dict()
        for key in ("fingerprint", "seed", "batch_size", "schedule"):
            if state.get(key) != mine[key]:
                raise DataError(
                    f"the saved rollout has {key} {state.get(key)!r}, this run {mine[key]!r}",
                    "the data and settings the run was started with",
                    "resume with the same --data-path, --seed and --batch-size, or start a new run",
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._generator.set_state(state["generator"].cpu())
        self._accounts = Accounts(**{name: v.to(self._device) for name, v in state["accounts"].items()})
        rollout = state["rollout"]
        self._rollout = None if rollout is None else {n: v.to(self._device) for n, v in rollout.items()}
        self._continue = True
