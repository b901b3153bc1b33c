"""The GPU optimiser wraps a plain loop's model for the ranks of a process group, or says why it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import in_group, whole
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from obsinfra.errors import ConfigError, RanksDifferError
from obsinfra.observation.observed_run import observe
from obsinfra.optimization import wrapping
from obsinfra.optimization.gpu_optimizer import GpuOptimizer, create_gpu_optimizer
from obsinfra.workloads.byte_gpt import ByteGPT, Shape

pytestmark = pytest.mark.slow

ROWS, STEPS = 8, 4


def optimizer(**choices: Any) -> GpuOptimizer:
    return create_gpu_optimizer(device="cpu", mixed_precision=False, **choices)


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def trained(gpu: GpuOptimizer, model: nn.Module, rank: int, size: int, *, norm: bool = True) -> Any:
    """A plain loop over this rank's rows; the model's parameters, and the batch norm's mean on this rank."""
    if not norm:  # whose statistics are those of the rows of one rank
        model[1] = nn.Identity()
    model = gpu.optimize_model(model)
    updates = gpu.create_optimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    rows = torch.randn(STEPS, ROWS, 6, generator=torch.Generator().manual_seed(5))
    for batch in rows:
        updates.zero_grad()
        model(batch.chunk(size)[rank]).square().mean().backward()
        updates.step()
    with torch.inference_mode():
        model(rows[0])
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    parameters = torch.cat([whole(parameter).flatten() for parameter in inner.parameters()])
    return parameters, inner[1].running_mean.tolist() if norm else None


def _ranks_train(ranks: Any) -> Any:
    found: dict[str, Any] = {}
    choices = {
        "ddp": {"parallel": "ddp"},
        "compressed": {"parallel": "ddp", "gradient_compression": "fp16"},
        "fsdp": {"parallel": "fsdp", "fsdp_offload": True},
        "hsdp": {"parallel": "hsdp", "shard_size": 1},
    }
    for name, chosen in choices.items():
        gpu = optimizer(**chosen)
        parameters, _ = trained(gpu, model_of(ranks.rank), ranks.rank, ranks.size, norm=False)
        _, mean = trained(optimizer(**chosen), model_of(ranks.rank), ranks.rank, ranks.size)
        found[name] = (parameters.tolist(), mean, gpu.decisions()["parallel"])
    divided = optimizer(parallel="fsdp").optimize_model(model_of(0))
    return found, sum(parameter.to_local().numel() for parameter in divided.parameters())


def test_two_ranks_train_as_one_process_from_rank_0s_values() -> None:
    """By DDP, FSDP2 and HSDP; batch norm's statistics are rank 0's on both before each forward pass."""
    alone, _ = trained(optimizer(), model_of(0), 0, 1, norm=False)
    start = model_of(0)[0].weight.detach().flatten()
    found = in_group(2, _ranks_train)
    assert all(isinstance(one, tuple) for one in found), found
    (first, own), (second, own_too) = found
    assert own + own_too == sum(p.numel() for p in model_of(0).parameters()) and own > 0 < own_too
    for name in first:
        parameters, mean, _ = first[name]
        assert parameters == second[name][0] and mean == second[name][1], name
        close = 1e-2 if name == "compressed" else 1e-5
        assert torch.allclose(torch.tensor(parameters), alone, atol=close), name
    assert not torch.allclose(alone[: start.numel()], start, atol=2e-2)
    assert {told for *_, told in first.values()} == {
        "ddp",
        "ddp, gradients by fp16",
        "fsdp, parts in host memory",
        "hsdp",
    }


TINY = Shape(2, 32, 4, 16, 8, 3e-3, 1, 64)


def gpt_trained(gpu: GpuOptimizer, part: int, parts: int) -> tuple[ByteGPT, list[float]]:
    """A plain loop of two passes a step over a part of the rows; losses of that part."""
    torch.manual_seed(part)  # rank 0's values are everyone's
    model = gpu.optimize_model(ByteGPT(TINY))
    updates = gpu.create_optimizer(model.parameters(), lr=1e-2)
    text = torch.randint(0, 256, (STEPS, 2, ROWS, 17), generator=torch.Generator().manual_seed(5))
    losses = []
    for step in text:
        updates.zero_grad()
        for batch in step:
            rows = batch.chunk(parts)[part]
            logits = model(rows[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()) / 2
            loss.backward()
            losses.append(float(loss.detach()))
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        losses.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        updates.step()
    return model, losses


def _ranks_divide_layers(ranks: Any) -> Any:
    found: dict[str, Any] = {}
    choices = {
        "tp": {"parallel": "tp", "tensor_parallel_size": 2},
        "both": {"parallel": "fsdp", "tensor_parallel_size": 2},
        "three": {"parallel": "hsdp", "tensor_parallel_size": 2, "shard_size": 1},
    }
    for name, chosen in choices.items():
        gpu = optimizer(**chosen)
        model, losses = gpt_trained(gpu, *gpu.data_part)
        own = sum(parameter.to_local().numel() for parameter in model.blocks.parameters())
        weights = torch.cat([whole(parameter).flatten() for parameter in model.parameters()])
        found[name] = weights.tolist(), losses, own, gpu.decisions()["parallel"], gpu.data_part
    with pytest.raises(ConfigError, match="tensor_parallel_size 3 does not divide 4 ranks"):
        optimizer(parallel="tp", tensor_parallel_size=3).optimize_model(ByteGPT(TINY))
    return found


def test_two_pairs_divide_the_layers_of_a_model_that_has_a_plan() -> None:
    """Alone, within FSDP2 and within HSDP, in a plain loop that adds up two passes and clips: what one
    process trains on all rows."""
    one, losses = gpt_trained(optimizer(), 0, 1)
    alone = torch.cat([parameter.detach().flatten() for parameter in one.parameters()])
    four = in_group(4, _ranks_divide_layers)
    assert all(isinstance(rank, dict) for rank in four), four
    divided, norms = 12 * 32**2, 2 * 32
    owns = {"tp": divided // 2 + norms, "both": divided // 4 + norms // 2, "three": divided // 2 + norms}
    for name, own in owns.items():
        assert [rank[name][4] for rank in four] == [(0, 2), (0, 2), (1, 2), (1, 2)]
        assert all(rank[name][0] == four[0][name][0] for rank in four), name
        assert [rank[name][2] for rank in four] == [TINY.layers * own] * 4, name
        together = torch.tensor([four[first][name][1] for first in (0, 2)]).mean(0)
        assert torch.allclose(together, torch.tensor(losses), rtol=1e-4), name
        assert torch.allclose(torch.tensor(four[0][name][0]), alone, atol=1e-4), name
    torch.manual_seed(0)
    start = torch.cat([parameter.detach().flatten() for parameter in ByteGPT(TINY).parameters()])
    assert float((alone - start).abs().max()) > 1e-2
    told = [four[0][name][3] for name in owns]
    assert told == [f"{how}, layers divided among 2" for how in ("tp", "fsdp", "hsdp")]


def _observed(ranks: Any, output: Path, parallel: str) -> list[float]:
    """What each step of an observed loop draws."""
    gpu = optimizer(parallel=parallel)
    model = gpu.optimize_model(ByteGPT(TINY))
    updates = gpu.create_optimizer(model.parameters())
    settings = {"output_dir": output, "disable_monitoring": True, "metrics_port": 0}
    run = observe(model, updates, run=parallel, ranks=ranks, **settings)
    drawn = [float(torch.rand(())) for _ in run.steps(range(3))]
    run.finish()
    return drawn


def test_ranks_that_compute_the_same_batch_draw_alike_in_an_observed_loop(tmp_path: Path) -> None:
    """Of a model in parts of layers; of a whole one each rank draws for itself."""
    first, second = in_group(2, _observed, tmp_path, "tp")
    assert first == second and len(set(first)) == 3, (first, second)
    own = in_group(2, _observed, tmp_path, "ddp")
    assert own[0] == first and len({*own[0], *own[1]}) == 6, own


def _refused(gpu: GpuOptimizer, model: nn.Module, error: type[Exception] = ConfigError) -> str:
    with pytest.raises(error) as caught:
        gpu.optimize_model(model)
    return str(caught.value)


def _ranks_refuse(ranks: Any) -> Any:
    ddp, fsdp = optimizer(parallel="ddp"), optimizer(parallel="fsdp")
    lone = nn.Linear(2, 2 + ranks.rank)
    half_frozen = nn.Linear(2, 2)
    half_frozen.bias.requires_grad_(ranks.rank == 0)
    told = {
        "frozen": _refused(ddp, nn.Linear(2, 2).requires_grad_(False)),
        "empty": _refused(ddp, nn.ReLU()),
        "lazy": _refused(ddp, nn.LazyLinear(2)),
        "list": _refused(fsdp, nn.ModuleList([nn.Linear(2, 2)])),
        "script": _refused(fsdp, torch.jit.script(nn.Linear(2, 2))),
        "twice": _refused(ddp, ddp.optimize_model(nn.Linear(2, 2))),
        "parts twice": _refused(fsdp, fsdp.optimize_model(nn.Linear(2, 2))),
        "hsdp": _refused(optimizer(parallel="hsdp", shard_size=3), nn.Linear(2, 2)),
        "no plan": _refused(optimizer(parallel="tp"), nn.Linear(2, 2)),
        "heads": _refused(optimizer(parallel="tp"), ByteGPT(replace(TINY, heads=1))),
        "one group": _refused(optimizer(parallel="fsdp", tensor_parallel_size=2), ByteGPT(TINY)),
        "differ": _refused(ddp, lone, RanksDifferError),
        "differ in parts": _refused(fsdp, lone, RanksDifferError),
        "trained": _refused(fsdp, half_frozen, RanksDifferError),
    }
    # Heads, of which the shapes say nothing: rank 1 alone has ones that divide.
    odd_heads = ByteGPT(replace(TINY, heads=1 + ranks.rank))
    told["heads of one"] = _refused(
        optimizer(parallel="tp"), odd_heads, RanksDifferError if ranks.rank else ConfigError
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrapping, "kind_of", lambda device: f"card {ranks.rank}")
        told["kinds"] = _refused(ddp, nn.Linear(2, 2), RanksDifferError)
    # One that only rank 1 cannot wrap: both hear of it, and none waits for the other.
    odd = nn.Linear(2, 2).requires_grad_(ranks.rank == 0)
    told["one"] = _refused(ddp, odd, ConfigError if ranks.rank else RanksDifferError)
    with pytest.raises(ConfigError, match="find_batch_size with parallel 'ddp'"):
        ddp.find_batch_size(nn.Linear(2, 2), lambda model, rows: model(torch.ones(rows, 2)).mean())
    parts = fsdp.optimize_model(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="of a model of which ranks have parts"):
        fsdp.optimize_for_inference(parts, torch.ones(1, 2))
    return told


EXPECTED = {
    "frozen": "Linear cannot be wrapped by DDP: none of its parameters is trained",
    "empty": "ReLU cannot be wrapped by DDP: it has no parameters",
    "lazy": "weight has no shape yet; call the model once on a batch before",
    "list": "ModuleList cannot be wrapped by FSDP2: it has no forward of its own",
    "script": "it is a ScriptModule",
    "twice": "DistributedDataParallel cannot be wrapped by DDP: it is wrapped by DDP already",
    "parts twice": "cannot be wrapped by FSDP2: ranks have parts of it already",
    "hsdp": "shard_size 3 does not divide 2 ranks",
    "no plan": "wrapped by tensor parallelism: parallel 'tp' with Linear, which has no tensor_parallel_plan",
    "heads": "1 heads of byte_gpt cannot be divided among 2 ranks",
    "one group": "tensor_parallel_size 2 of 2 ranks with parallel 'fsdp'; expected several groups",
    "differ": "rank 1 has parameters of other names, shapes or types than rank 0",
    "differ in parts": "rank 1 has parameters of other names, shapes or types than rank 0",
    "kinds": "rank 1 computes on another kind of device than rank 0 (this one: card ",
    "trained": "rank 1 has parameters of other names, shapes or types than rank 0, or trains others",
}


def test_what_cannot_be_wrapped_is_said_on_every_rank() -> None:
    found = in_group(2, _ranks_refuse)
    assert all(isinstance(one, dict) for one in found), found
    for rank, told in enumerate(found):
        for name, text in EXPECTED.items():
            assert text in told[name], (rank, name, told[name])
    assert "1 heads of byte_gpt cannot be divided" in found[0]["heads of one"]
    assert "rank 0 cannot wrap its model by tensor parallelism" in found[1]["heads of one"]
    assert "rank 1 cannot wrap its model by DDP" in found[0]["one"]
    assert "none of its parameters is trained" in found[1]["one"]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"parallel": "pp"}, "parallel 'pp'; expected one of 'off', 'ddp', 'fsdp', 'hsdp', 'tp'"),
        ({"parallel": "tp", "compile_model": True}, "compile_model True with parallel 'tp'"),
        ({"parallel": "tp", "fsdp_offload": True}, "fsdp_offload True with parallel 'tp'"),
        (
            {"parallel": "ddp", "tensor_parallel_size": 2},
            "tensor_parallel_size 2 with parallel 'ddp'; expected parallel 'tp' or 'fsdp' or 'hsdp'",
        ),
        ({"parallel": "tp", "tensor_parallel_size": 0}, "tensor_parallel_size 0; expected a whole number of"),
        ({"parallel": "fsdp", "compile_model": True}, "compile_model True with parallel 'fsdp'"),
        ({"parallel": "fsdp", "gradient_compression": "fp16"}, "gradient_compression 'fp16' with parallel"),
        ({"gradient_compression": "zip"}, "gradient_compression 'zip'; expected one of 'off'"),
        ({"parallel": "ddp", "shard_size": 2}, "shard_size 2 with parallel 'ddp'; expected parallel 'hsdp'"),
        ({"parallel": "hsdp", "shard_size": 0}, "shard_size 0; expected a whole number of at least 1"),
        ({"fsdp_offload": True}, "fsdp_offload True with parallel 'off'; expected parallel 'fsdp' or 'hsdp'"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        optimizer(**choices)
    assert message in str(error.value)


def test_without_a_process_group_it_says_how_to_get_one() -> None:
    model = nn.Linear(2, 2)
    told = _refused(optimizer(parallel="ddp"), model)
    assert "parallel 'ddp' without a process group" in told and "torchrun" in told
    assert optimizer().optimize_model(model) is model


def test_each_rank_of_a_host_takes_the_device_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert create_gpu_optimizer([2, 3], parallel="ddp").device == torch.device("cuda:3")
    assert create_gpu_optimizer(parallel="ddp").device == torch.device("cuda:1")
    assert create_gpu_optimizer(device="cpu", parallel="ddp").device == torch.device("cpu")
    assert create_gpu_optimizer([2, 3]).device == torch.device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"device ids \[2, 3\] on rank 2 of its host"):
        create_gpu_optimizer([2, 3], parallel="ddp")
