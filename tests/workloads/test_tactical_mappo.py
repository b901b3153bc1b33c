"""The workload as a whole: networks, loss, validation, and that it learns to earn."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from market_tables import bundled
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from obsinfra.errors import UserError
from obsinfra.workloads.protocol import Workload
from obsinfra.workloads.tactical_mappo import TacticalMappo, create_workload
from obsinfra.workloads.tactical_mappo.environment import MarketReplay
from obsinfra.workloads.tactical_mappo.evaluation import greedy, hold, pieces, play, uniformly_random
from obsinfra.workloads.tactical_mappo.networks import SIZES, ActorsAndCritic
from obsinfra.workloads.tactical_mappo.ppo import clipped_policy_loss, clipped_value_loss, log_probabilities

CPU = torch.device("cpu")


@cache
def workload() -> TacticalMappo:
    return create_workload(data_path=None, model_size=None, seed=0)


def inputs(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    bars = torch.randint(119, 5031, (count,), generator=generator)
    account = torch.randn(count, 3, generator=generator)
    return workload().market.window(bars), account, torch.randint(5, (count, 3), generator=generator)


def test_it_is_a_workload_over_the_bundled_bars() -> None:
    assert isinstance(workload(), Workload)
    described = workload().describe_data()
    assert [part["name"] for part in described["instruments"]] == ["sp500", "nasdaq"]
    assert [part["bars"] for part in described["instruments"]] == [5031, 5031]
    assert described["validation_from"] == "2014-12-31"
    assert described["training_bars"] > 3 * described["validation_bars"] > 0


@pytest.mark.parametrize("size", SIZES)
def test_every_size_gives_policies_and_values(size: str) -> None:
    torch.manual_seed(0)
    model = TacticalMappo(list(bundled()), size).build_model()
    logits, values = model(*inputs(9))
    assert logits.shape == (9, 3, 5) and values.shape == (9,)
    assert logits.abs().max() < 0.2, "the first policy is not nearly uniform"


def test_an_unknown_size_names_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        create_workload(data_path=None, model_size="huge", seed=0)
    assert "'huge'" in caught.value.wrong and "small, medium, large" in caught.value.expected


def test_actors_see_only_their_own_last_action_and_the_critic_sees_all() -> None:
    """Decentralised execution, centralised training."""
    torch.manual_seed(0)
    model = ActorsAndCritic(64)
    windows, account, last = inputs(1)
    logits, values = model(windows, account, last)
    for agent in range(3):
        changed = last.clone()
        changed[:, agent] = (changed[:, agent] + 1) % 5
        other_logits, other_values = model(windows, account, changed)
        moved = [not torch.equal(other_logits[:, i], logits[:, i]) for i in range(3)]
        assert moved == [i == agent for i in range(3)]
        assert not torch.equal(other_values, values)


def test_agents_share_no_parameters() -> None:
    torch.manual_seed(0)
    model = ActorsAndCritic(64)
    model(*inputs(4))[0][:, 1].square().sum().backward()
    touched = {
        name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert touched == {"1"}


def test_the_loss_is_policy_plus_half_value_less_a_hundredth_of_entropy() -> None:
    torch.manual_seed(0)
    model = workload().build_model()
    batches = workload().train_batches(model, batch_size=512, seed=0, num_workers=0, device=CPU)
    batch = next(iter(batches))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    output = workload().training_step(model, batch)
    logits, values = model(batch.windows, batch.account, batch.last_actions)
    policy = clipped_policy_loss(
        log_probabilities(logits, batch.actions), batch.old_log, batch.advantages, 0.2
    )
    value = clipped_value_loss(values, batch.old_values, batch.targets, 0.5)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    torch.testing.assert_close(output.loss, policy + 0.5 * value - 0.01 * entropy)
    assert 0 < float(output.metrics["clipped_ratio"]) < 1
    assert all(not value.requires_grad for value in output.metrics.values() if torch.is_tensor(value))
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_validation_is_deterministic_draws_nothing_and_reports_buy_and_hold() -> None:
    torch.manual_seed(0)
    model = workload().build_model().eval()
    before = torch.get_rng_state()
    with torch.inference_mode():
        one, other = (workload().validate(model, CPU) for _ in range(2))
    assert one == other and torch.equal(torch.get_rng_state(), before)
    held = play(MarketReplay(workload().market, workload().rules), workload().market.validation, hold)
    assert (one["buy_and_hold_reward"], one["buy_and_hold_return"]) == (held.reward, held.total_return)
    assert workload().defaults.metric in one
    assert 0 <= one["max_drawdown"] <= 1 and 0 <= one["exposure"] <= 1


def test_flops_agree_with_torchs_count() -> None:
    """One learning step per pass and a share of the rollout's forward pass, per transition."""
    model = workload().build_model()
    passes = workload().schedule.passes
    with FlopCounterMode(display=False) as learning:
        logits, values = model(*inputs(64))
        (logits.sum() + values.sum()).backward()
    with FlopCounterMode(display=False) as playing, torch.no_grad():
        model(*inputs(64))
    counted = (learning.get_total_flops() + playing.get_total_flops() / passes) / 64
    assert workload().flops_per_sample(model) == pytest.approx(counted, rel=0.03)


@pytest.mark.slow
def test_training_earns_more_than_chance_and_than_holding() -> None:
    """Twenty epochs at the workload's own rate; greedy on the training period, in the benchmark's pieces."""
    torch.manual_seed(0)
    here, model = workload(), workload().build_model()
    replay = MarketReplay(here.market, here.rules)
    spans = pieces(here.market.training, here.rules.episode_bars)

    def earned(policy_of: nn.Module) -> float:
        return play(replay, spans, greedy(policy_of, replay)).reward

    untrained = earned(model)
    defaults = here.defaults
    batches = here.train_batches(model, batch_size=defaults.batch_size, seed=0, num_workers=0, device=CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=defaults.learning_rate, eps=defaults.eps)
    sampled = []
    for _ in range(20):
        rewards = []
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            output = here.training_step(model, batch)
            output.loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rewards.append(float(output.metrics["reward"]))
        sampled.append(sum(rewards) / len(rewards))
    chance = max(play(replay, spans, uniformly_random(seed)).reward for seed in range(5))
    trained = earned(model)
    print(f"{chance=:.4f} {untrained=:.4f} {trained=:.4f} {sampled=}")
    assert trained > max(chance, untrained, play(replay, spans, hold).reward, 0.0) + 0.05
    assert sum(sampled[-3:]) > sum(sampled[:3])
