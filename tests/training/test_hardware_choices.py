"""Device, precision, compilation, activation checkpointing: chosen by what is there, said out loud, exact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from obsinfra.errors import ConfigError
from obsinfra.optimization import precision as precision_module
from obsinfra.optimization.compilation import checkpoint_activations, compile_model
from obsinfra.optimization.precision import choose_device, choose_precision
from obsinfra.workloads.byte_gpt import SIZES, ByteGPT

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def test_auto_takes_the_gpu_where_there_is_one_unless_it_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert choose_device("auto") == CUDA
    assert choose_device("auto", disable_gpu=True) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == CPU


@pytest.mark.parametrize(
    ("wanted", "count", "message"),
    [
        ("cuda:2", 2, r"'cuda:2'.*\(cuda:0 … cuda:1\)"),
        ("cuda", 0, r"'cuda'.*\(none\)"),
        ("xpu", 0, "auto, cpu, cuda"),
        ("gpu", 0, "auto, cpu, cuda"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch, wanted: str, count: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=message):
        choose_device(wanted)


@pytest.mark.parametrize(
    ("device", "capability", "cpu_bf16", "pays", "chosen"),
    [
        (CUDA, (8, 0), False, True, "bf16"),
        (CUDA, (9, 0), False, True, "bf16"),
        (CUDA, (7, 5), False, True, "fp16"),
        (CUDA, (9, 0), False, False, "fp32"),
        (CPU, (0, 0), True, True, "bf16"),
        (CPU, (0, 0), False, True, "fp32"),
        (torch.device("mps"), (0, 0), True, True, "fp32"),
    ],
)
def test_auto_precision_is_the_narrowest_the_hardware_computes_natively(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    capability: tuple[int, int],
    cpu_bf16: bool,
    pays: bool,
    chosen: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(precision_module, "cpu_has_bf16", lambda: cpu_bf16)
    found = choose_precision("auto", device, autocast_pays=pays)
    assert found.name == chosen and found.reason


@pytest.mark.parametrize("wanted", ["fp32", "bf16", "fp16"])
def test_a_named_precision_is_used_as_asked(wanted: str) -> None:
    found = choose_precision(wanted, CPU, autocast_pays=False)
    assert (found.name, found.reason) == (wanted, "as asked")
    assert found.scaler().is_enabled() == (wanted == "fp16")


def small_gpt() -> ByteGPT:
    torch.manual_seed(0)
    model = ByteGPT(SIZES["nano"])
    for block in model.blocks:  # they begin as the identity, and then without gradients of their own
        nn.init.normal_(block.attention.out.weight, std=0.1)  # type: ignore[union-attr,arg-type]
        nn.init.normal_(block.down.weight, std=0.1)  # type: ignore[union-attr,arg-type]
    nn.init.normal_(model.head.weight, std=0.1)
    return model


def loss_of(model: nn.Module) -> torch.Tensor:
    tokens = torch.arange(64).view(2, 32) % 256
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def test_activation_checkpointing_gives_the_same_loss_and_gradients_and_computes_blocks_twice() -> None:
    plain, saving = small_gpt(), small_gpt()
    assert checkpoint_activations(saving) == 4
    assert saving.state_dict().keys() == plain.state_dict().keys()
    passes = []
    for block in saving.blocks:
        block.attention.register_forward_hook(lambda *_: passes.append(1))  # type: ignore[union-attr]
    losses = []
    for model in (plain, saving):
        loss = loss_of(model)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
    assert losses[0] == losses[1]
    assert len(passes) == 8
    for (name, mine), theirs in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad), name


def test_a_copy_of_a_checkpointed_model_is_a_model_of_its_own() -> None:
    """The check before training works on a copy; it must not reach back into the original."""
    model = small_gpt()
    checkpoint_activations(model)
    loss_of(copy.deepcopy(model)).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="gradient checkpointing of Linear"):
        checkpoint_activations(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("wanted", "device", "compiled"),
    [("on", CPU, True), ("off", CUDA, False), ("auto", CPU, False), ("auto", CUDA, True)],
)
def test_compilation_is_on_where_asked_for_or_where_it_pays(
    wanted: str, device: torch.device, compiled: bool
) -> None:
    model = nn.Linear(1, 1)
    assert compile_model(model, wanted, device) is model
    assert (model._compiled_call_impl is not None) == compiled
    assert list(model.state_dict()) == ["weight", "bias"]
