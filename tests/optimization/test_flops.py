"""Operations counted without computing, peaks found by name, MFU and HFU of a real training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training.small_workload import Regression, trainer

from obsinfra.backup.rng import capture_rng_state
from obsinfra.catalog import metrics as catalog
from obsinfra.errors import ConfigError
from obsinfra.optimization.activation_checkpointing import checkpoint_activations
from obsinfra.optimization.device_peaks import PEAKS, find_peak
from obsinfra.optimization.flops import count_flops
from obsinfra.workloads.byte_gpt import SIZES, ByteGPT, ByteGPTWorkload


def gpt_loss(rows: int = 2, size: str = "nano"):  # type: ignore[no-untyped-def]
    def loss(model: nn.Module) -> Tensor:
        tokens = torch.zeros(rows, SIZES[size].context, dtype=torch.long)
        return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    return loss


def test_counted_operations_of_a_gpt_agree_with_the_papers_formula() -> None:
    """Of 12 · layers · context · width (and not half of it) for attention, as Chowdhery et al. count."""
    workload = ByteGPTWorkload.__new__(ByteGPTWorkload)
    workload.shape = SIZES["nano"]
    model = ByteGPT(workload.shape)
    formula = workload.flops_per_sample(model)
    assert formula is not None
    before = [p.clone() for p in model.parameters()]
    state = capture_rng_state()
    found = count_flops(model, gpt_loss()).per(2)
    assert found.model == pytest.approx(formula, rel=0.005)
    # The fused kernel computes the scores again: one of attention's six products, once more.
    scores = 2 * 4 * SIZES["nano"].context ** 2 * SIZES["nano"].width
    assert found.hardware - found.model == pytest.approx(scores)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state["torch"], capture_rng_state()["torch"])


def test_a_loss_of_another_model_than_the_one_given_is_refused_and_leaves_no_gradients() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="does not depend on the model"):
        count_flops(model, lambda _: (nn.Linear(3, 2)(torch.ones(1, 3))).sum())
    assert model.weight.grad is None


def test_recomputed_blocks_count_for_the_hardware_alone() -> None:
    model = ByteGPT(SIZES["nano"])
    plain = count_flops(model, gpt_loss())
    checkpoint_activations(model, every=2)
    half = count_flops(model, gpt_loss())
    checkpoint_all = ByteGPT(SIZES["nano"])
    checkpoint_activations(checkpoint_all)
    whole = count_flops(checkpoint_all, gpt_loss())
    assert plain.model == half.model == whole.model
    extra = whole.hardware - plain.hardware
    assert half.hardware - plain.hardware == pytest.approx(extra / 2)
    # A block's forward pass is a third of forward and backward; torch leaves out its last product.
    assert 0.2 * plain.model < extra < 0.34 * plain.model


@pytest.mark.parametrize(
    ("name", "bf16", "fp32_with_tf32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12, 494.5e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H200", 989.5e12, 494.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("Tesla V100-SXM2-16GB", None, 15.7e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
    ],
)
def test_peaks_are_found_by_the_names_torch_tells(
    name: str, bf16: float | None, fp32_with_tf32: float
) -> None:
    peak = find_peak(name)
    assert peak is not None and peak.source
    assert peak.flops("bf16", tf32=True) == bf16
    assert peak.flops("fp32", tf32=True) == fp32_with_tf32


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GB200", "Quadro P400", "NVIDIA L400", "",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ],
)  # fmt: skip
def test_devices_that_are_not_in_the_table_are_not_taken_for_others(name: str) -> None:
    assert find_peak(name) is None


def test_every_peak_is_plausible() -> None:
    for peak in PEAKS:
        assert peak.half > peak.fp32 and (peak.tf32 is None or peak.half > peak.tf32 >= peak.fp32), peak


class Lines(Regression):
    name = "lines"


def test_a_training_exports_mfu_hfu_and_what_they_are_made_of(tmp_path: Path) -> None:
    """8 multiply-adds a row for the forward pass and the weights' gradient; the input needs none."""
    training = trainer(tmp_path, Lines(), device_tflops=1e-6, epochs=8, threads=1)
    with training.observe() as run:
        training.train(run)
        seen = {s.metric.name: s.value for s in run.monitor.samples() if not s.labels}
        rate = seen[catalog.SAMPLES_PER_SECOND.name]
    per_row = training.gpu.utilization.per_sample
    assert per_row is not None and per_row.model == 16.0
    assert rate > 0
    assert seen[catalog.MODEL_FLOPS_PER_SECOND.name] == pytest.approx(16 * rate)
    assert seen[catalog.MFU_RATIO.name] == pytest.approx(seen[catalog.MODEL_FLOPS_PER_SECOND.name] / 1e6)
    assert seen[catalog.HFU_RATIO.name] == seen[catalog.MFU_RATIO.name]
    assert seen[catalog.COMPILE_GRAPHS.name] == 0 and seen[catalog.SCALER_SKIPPED_STEPS.name] == 0


class Peeking(Lines):
    """Looks at a value, which a tensor without values lacks; says its operations itself, or not."""

    told: float | None = None

    def training_step(self, model: nn.Module, batch):  # type: ignore[no-untyped-def]
        assert float(batch[1].sum()) != 0.5, "a value"
        return super().training_step(model, batch)

    def flops_per_sample(self, model: nn.Module) -> float | None:
        return self.told


@pytest.mark.parametrize("told", [None, 1234.0])
def test_what_cannot_be_counted_is_taken_from_the_workload_or_left_out(
    tmp_path: Path, told: float | None
) -> None:
    workload = Peeking()
    workload.told = told
    training = trainer(tmp_path, workload, device_tflops=1.0, epochs=1)
    training.fit()
    found = training.gpu.utilization.per_sample
    assert (found and found.model) == told
    assert not training.gpu.utilization.missing


def test_without_a_known_peak_nothing_is_counted(tmp_path: Path) -> None:
    training = trainer(tmp_path, Lines(), epochs=1)
    training.fit()
    assert training.gpu.utilization.per_sample is None
    assert "MFU is a ratio to a GPU's data sheet" in training.gpu.utilization.peak_reason
