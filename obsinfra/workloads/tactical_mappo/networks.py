"""Actors and the centralised critic. Knows shapes, nothing of environment dynamics or losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from obsinfra.workloads.tactical_mappo.environment import ACCOUNT, ACTIONS, AGENTS, N_FEATURES, WINDOW

SIZES = {"small": 64, "medium": 128, "large": 256}
"""Hidden width by size preset."""


class Branch(nn.Module):
    """A window of bars and a state vector in, `outputs` numbers out: two hidden layers with tanh.

    The state joins after the first layer, so that three numbers are not drowned by 420.
    """

    def __init__(self, width: int, state: int, outputs: int, gain: float) -> None:
        super().__init__()
        self.window = nn.Linear(WINDOW * N_FEATURES, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width + state, width)
        self.out = nn.Linear(width, outputs)
        # Orthogonal with these gains: Andrychowicz et al. 2021 (arXiv 2006.05990), section 3.2. A small last
        # actor layer starts from a nearly uniform policy.
        for layer, layer_gain in ((self.window, 2**0.5), (self.mix, 2**0.5), (self.out, gain)):
            nn.init.orthogonal_(layer.weight, layer_gain)
            nn.init.zeros_(layer.bias)

    def forward(self, flat: Tensor, state: Tensor) -> Tensor:
        """`flat` [B, 420], `state` [B, state] → [B, outputs]."""
        hidden = torch.tanh(self.norm(self.window(flat)))
        hidden = torch.tanh(self.mix(torch.cat([hidden, state], dim=-1)))
        result: Tensor = self.out(hidden)
        return result


class ActorsAndCritic(nn.Module):
    """One actor per agent, each with its own view, and one critic that sees everything.

    An actor sees the window, the account and its own last action; the critic sees the last actions of all
    agents. Decentralised execution, centralised training.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.actors = nn.ModuleList(Branch(width, ACCOUNT + ACTIONS, ACTIONS, gain=0.01) for _ in AGENTS)
        self.critic = Branch(width, ACCOUNT + ACTIONS * len(AGENTS), 1, gain=1.0)

    def forward(self, windows: Tensor, account: Tensor, last_actions: Tensor) -> tuple[Tensor, Tensor]:
        """Policies and values.

        Args:
            windows: [B, 60, 7]. account: [B, 3]. last_actions: int64 [B, 3], an index per agent.

        Returns:
            logits [B, 3, 5] by agent, and values [B].
        """
        flat = windows.flatten(1)
        last = functional.one_hot(last_actions, ACTIONS).to(account.dtype)
        logits = [
            actor(flat, torch.cat([account, last[:, agent]], dim=-1))
            for agent, actor in enumerate(self.actors)
        ]
        values = self.critic(flat, torch.cat([account, last.flatten(1)], dim=-1))
        return torch.stack(logits, dim=1), values.squeeze(-1)
