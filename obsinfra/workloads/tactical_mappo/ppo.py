"""The arithmetic of PPO: advantages and losses, as pure functions of tensors.

Schulman et al. 2016 (GAE, arXiv 1506.02438), 2017 (PPO, arXiv 1707.06347); value clipping as in Yu et al.
2022 (MAPPO, arXiv 2103.01955).
"""

from __future__ import annotations

import torch
from torch import Tensor


def generalised_advantages(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    ended: Tensor,
    *,
    discount: float,
    smoothing: float,
) -> Tensor:
    """Generalised advantage estimates, computed backwards in time.

    Args:
        rewards, values: [T, E].
        next_values: value of the state each step led to, before any reset, [T, E]; so an episode that was
            merely cut off is bootstrapped.
        terminated: bool [T, E], the step ended the episode for good: nothing follows, no bootstrap.
        ended: bool [T, E], terminated or cut off: the next row belongs to another episode.
        discount: γ. smoothing: λ.

    Returns:
        Advantages [T, E]; advantages + values are the targets of the critic.
    """
    errors = rewards + discount * next_values * (~terminated) - values
    carry = discount * smoothing * (~ended).to(rewards.dtype)
    advantages = torch.empty_like(rewards)
    running = torch.zeros_like(rewards[0])
    for t in range(len(rewards) - 1, -1, -1):
        running = errors[t] + carry[t] * running
        advantages[t] = running
    return advantages


def log_probabilities(logits: Tensor, actions: Tensor) -> Tensor:
    """Log-probability of each agent's action: logits [..., A, 5], actions int64 [..., A] → [..., A]."""
    return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def entropies(logits: Tensor) -> Tensor:
    """Entropy of each policy in nats: [..., A, 5] → [..., A]."""
    log = logits.log_softmax(-1)
    return -(log.exp() * log).sum(-1)


def clipped_policy_loss(new_log: Tensor, old_log: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's pessimistic surrogate, averaged over samples and agents.

    Args:
        new_log, old_log: log-probabilities of the joint action by agent, [B, A].
        advantages: shared by the agents, [B].
        clip: ε; beyond 1 ± ε a ratio earns nothing more.
    """
    ratio = (new_log - old_log).exp()
    shared = advantages.unsqueeze(-1)
    return -torch.minimum(ratio * shared, ratio.clamp(1 - clip, 1 + clip) * shared).mean()


def clipped_value_loss(values: Tensor, old_values: Tensor, targets: Tensor, clip: float) -> Tensor:
    """Half the squared error, the larger of it with and without the step limited to ±`clip`; all [B]."""
    limited = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - targets).square(), (limited - targets).square()).mean()
