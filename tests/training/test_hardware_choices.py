"""Device, precision, compilation, activation checkpointing: chosen by what is there, said out loud, exact."""

from __future__ import annotations

import ast
import copy
import enum
from pathlib import Path
from typing import Any

import pytest
import torch
from small_workload import Regression, trainer
from torch import nn
from torch.utils.data import TensorDataset
from training_runs import cli

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.catalog import metrics
from obsinfra.config.settings import Settings
from obsinfra.errors import ConfigError
from obsinfra.optimization import precision as precision_module
from obsinfra.optimization.activation_checkpointing import checkpoint_activations
from obsinfra.optimization.gpu_optimizer import create_gpu_optimizer
from obsinfra.optimization.precision import choose_device, choose_precision
from obsinfra.training.trainer import Trainer
from obsinfra.workloads.byte_gpt import SIZES, ByteGPT, ByteGPTWorkload

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
    ("ids", "count", "message"),
    [
        ([0, 5], 2, r"device ids \[0, 5\]; expected ids of CUDA devices of this machine \(0 … 1\)"),
        ([-1], 2, r"device ids \[-1\]"),
        ([], 2, r"device ids \[\]"),
        ([0, 0], 2, "each device once"),
        ([0], 0, "none: no CUDA device here"),
    ],
)
def test_device_ids_that_do_not_exist_or_repeat_are_refused(
    monkeypatch: pytest.MonkeyPatch, ids: list[int], count: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=message):
        create_gpu_optimizer(ids)


def test_devices_of_several_architectures_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [("NVIDIA A100-SXM4-80GB", (8, 0)), ("NVIDIA H100 80GB HBM3", (9, 0))]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: cards[device.index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cards[device.index][1])
    with pytest.raises(ConfigError, match=r"cuda:0: NVIDIA A100-SXM4-80GB \(8.0\), cuda:1: NVIDIA H100"):
        create_gpu_optimizer([0, 1])
    assert create_gpu_optimizer([1], mixed_precision=False).device == torch.device("cuda:1")


@pytest.mark.parametrize("device", ["cpu:3", "mps:1", "cuda:9"])
def test_a_device_of_a_number_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=f"device '{device}'; expected"):
        create_gpu_optimizer(device=device)


def test_one_choice_of_device_is_enough() -> None:
    with pytest.raises(ConfigError, match="beside another choice of device"):
        create_gpu_optimizer([0], device="cpu")
    with pytest.raises(ConfigError, match="precision 'int4'; expected one of 'auto', 'fp32'"):
        create_gpu_optimizer(device="cpu", mixed_precision="int4")


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
    assert checkpoint_activations(saving).recomputed == (0, 1, 2, 3)
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


def kept_bytes(model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass, parameters left out, each storage once."""
    mine = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model)
    return sum(storage.nbytes() for storage in kept.values())


def test_every_second_block_saves_about_half_of_what_every_block_saves() -> None:
    plain, half, whole = small_gpt(), small_gpt(), small_gpt()
    assert checkpoint_activations(half, every=2).recomputed == (0, 2)
    checkpoint_activations(whole)
    saved = kept_bytes(plain) - kept_bytes(whole)
    assert 0.4 * saved < kept_bytes(plain) - kept_bytes(half) < 0.6 * saved


@pytest.mark.parametrize("share", [1.0, 0.7, 0.45])
def test_a_memory_budget_recomputes_no_more_blocks_than_it_must(share: float) -> None:
    model = small_gpt()
    whole = kept_bytes(model)
    made = checkpoint_activations(model, budget_bytes=int(share * whole), loss=loss_of)
    assert made.whole_bytes == pytest.approx(whole, rel=0.05) and made.kept_bytes is not None
    assert kept_bytes(model) == pytest.approx(made.kept_bytes, rel=0.05)
    assert made.kept_bytes <= share * made.whole_bytes
    if made.recomputed:
        block = (made.whole_bytes - made.kept_bytes) / len(made.recomputed)
        assert made.kept_bytes + block > share * whole
    assert (len(made.recomputed) == 0) == (share == 1.0)


def test_a_budget_below_what_recomputing_everything_keeps_is_refused_with_what_is_possible() -> None:
    with pytest.raises(ConfigError, match=r"budget of 0 MB; expected at least \d+ MB.*--batch-size"):
        checkpoint_activations(small_gpt(), budget_bytes=1000, loss=loss_of)


def gpt_trainer(tmp_path: Path, **settings: Any) -> Trainer:
    text = tmp_path / "text"
    if not text.exists():
        text.mkdir()
        for number, source in enumerate((Path(copy.__file__), Path(ast.__file__), Path(enum.__file__))):
            (text / f"{number}.py").write_bytes(source.read_bytes())
    usual: dict[str, Any] = {
        "model_name": "byte_gpt", "output_dir": tmp_path / "runs", "disable_monitoring": True,
        "disable_backups": True, "device": "cpu", "precision": "fp32", "max_steps": 2, "micro_batch": 4,
    }  # fmt: skip
    workload = ByteGPTWorkload(str(text), "nano")
    return Trainer(workload, Settings(**{**usual, **settings}))


def test_a_training_keeps_its_activations_below_a_budget_and_learns_the_same(tmp_path: Path) -> None:
    plain = gpt_trainer(tmp_path)
    saving = gpt_trainer(tmp_path, activation_budget_mb=10)
    made = saving.gpu.checkpointing["byte_gpt"]
    assert made.whole_bytes is not None and made.kept_bytes is not None
    assert made.kept_bytes <= 10e6 < made.whole_bytes and 0 < len(made.recomputed) < made.blocks
    for training in (plain, saving):
        training.fit()
    for mine, theirs in zip(plain.model.parameters(), saving.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ConfigError, match=r"budget of 1 MB; expected at least"):
        gpt_trainer(tmp_path, activation_budget_mb=1)


class Large(Regression):
    """Targets so large that the scaled gradients do not fit into 16 bits at first."""

    name = "large"

    def __init__(self) -> None:
        super().__init__()
        inputs, targets = self.data.tensors
        self.data = TensorDataset(inputs, targets * 1000)


def test_steps_left_out_under_fp16_are_counted_and_exported(tmp_path: Path) -> None:
    training = trainer(tmp_path, Large(), precision="fp16", epochs=8)
    with training.observe() as run:
        training.train(run)
        shown = {sample.metric: sample.value for sample in run.monitor.samples() if not sample.labels}
    skipped = training.gpu.skipped_steps
    assert 0 < skipped < 32
    assert shown[metrics.SCALER_SKIPPED_STEPS] == skipped
    assert shown[metrics.LOSS_SCALE] == 2.0**16 / 2**skipped
    assert training.schedule.state_dict()["step"] == 32 - skipped


@pytest.mark.slow
def test_a_model_that_cannot_be_compiled_ends_a_run_that_asked_for_it_and_no_other(tmp_path: Path) -> None:
    """There is no C++ compiler, so that nothing can be compiled for a CPU."""
    where = {"PATH": str(tmp_path), "CXX": "missing-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")}
    common = ("train", "--model-name=digits", "--max-steps=3", "--metrics-port=0", "--disable-testing")
    refused = cli(*common, f"--output-dir={tmp_path / 'runs'}", "--compile=on", "--run=r", env=where)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr, refused.stderr
    said = " ".join(refused.stderr.split())
    assert "cannot be compiled" in said and "--compile off, or auto" in said
    left = create_backup_system(tmp_path / "runs" / "r" / "checkpoints").verify()
    assert [found for found in left if found.problem] == []  # step 0 as a whole, nothing by halves
    assert cli(*common, f"--output-dir={tmp_path / 'runs'}", env=where).returncode == 0


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="gradient checkpointing of Linear"):
        checkpoint_activations(nn.Linear(1, 1))
