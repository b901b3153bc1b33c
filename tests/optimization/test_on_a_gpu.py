"""The GPU optimiser on a real CUDA device: what the CPU's tests cannot show."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from obsinfra import create_gpu_optimizer
from obsinfra.catalog import metrics as catalog
from obsinfra.config.settings import Settings
from obsinfra.observation.observed_run import ObservedRun, observe
from obsinfra.optimization.batch_size import find_batch_size
from obsinfra.training.trainer import Trainer
from obsinfra.workloads.byte_gpt import BYTES, SIZES, ByteGPT, create_workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]

DEVICE = torch.device("cuda", 0)
SHAPE = SIZES["micro"]


def windows(rows: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(BYTES, (rows, SHAPE.context + 1), generator=generator).to(DEVICE)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1]).float()
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def model(**choices: Any) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    gpu = create_gpu_optimizer([0], **{"compile_model": "off", **choices})
    made = gpu.optimize_model(ByteGPT(SHAPE), loss=lambda m: loss_of(m, windows()))
    with torch.no_grad():
        for block in made.blocks:  # they begin as the identity
            nn.init.normal_(block.down.weight, std=0.02)
            nn.init.normal_(block.attention.out.weight, std=0.02)
        nn.init.normal_(made.head.weight, std=0.02)
    return gpu, made


def gradients(gpu: Any, made: nn.Module) -> tuple[float, list[Tensor]]:
    with gpu.autocast():
        loss = loss_of(made, windows())
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), [p.grad.clone() for p in made.parameters() if p.grad is not None]


def test_compiled_bf16_agrees_with_eager_fp32() -> None:
    exact, _ = gradients(*model(mixed_precision=False, tf32=False))
    gpu, fast = model(compile_model="on")
    loss, _ = gradients(gpu, fast)
    assert gpu.precision.name in ("bf16", "fp16") and loss == pytest.approx(exact, rel=0.02)
    found = gpu.compilations["model"]
    assert found.graphs >= 1 and found.graph_breaks == 0 and sum(found.fallbacks.values()) == 0


def peak_bytes(gpu: Any, made: nn.Module) -> int:
    gradients(gpu, made)
    made.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    gradients(gpu, made)
    return torch.cuda.max_memory_allocated(DEVICE) - before


def test_recomputed_blocks_save_device_memory_and_change_nothing() -> None:
    plain, saving = model(), model(gradient_checkpointing=True)
    (loss, expected), (same, got) = gradients(*plain), gradients(*saving)
    assert loss == same
    for mine, theirs in zip(expected, got, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4)
    assert peak_bytes(*saving) < 0.7 * peak_bytes(*plain)


def test_a_budget_is_kept_on_the_device() -> None:
    gpu, made = model()
    peak = peak_bytes(gpu, made)
    gpu, made = model(activation_budget_bytes=peak // 2)
    chosen = gpu.checkpointing["model"]
    assert len(chosen.recomputed) > 0 and chosen.kept_bytes <= peak // 2
    assert peak_bytes(gpu, made) < peak


def test_the_largest_batch_is_found_by_exhausting_the_device() -> None:
    row = 256 * 2**20
    limit = 8 * 2**30
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), DEVICE)
    try:
        found = find_batch_size(
            lambda rows: torch.empty(rows * row, dtype=torch.uint8, device=DEVICE).fill_(1),
            DEVICE,
            rounds=1,
            limit_bytes=2**50,
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    assert 24 <= found.largest <= 32
    assert any("out of memory" in tried.problem for tried in found.tried)
    torch.cuda.empty_cache()
    torch.ones(1, device=DEVICE)  # the device is as usable as before


def test_fp16_steps_that_overflow_are_left_out_and_counted() -> None:
    gpu, made = model(mixed_precision="fp16")
    scaler, optimizer = gpu.create_scaler(), gpu.create_optimizer(made.parameters(), lr=1e-4)
    scaler._init_scale = 2.0**40
    for _ in range(3):
        with gpu.autocast():
            loss = loss_of(made, windows())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert gpu.skipped_steps == 3


def test_a_training_exports_mfu_and_the_gpu_is_watched(tmp_path: Path) -> None:
    settings = Settings(
        model_name="byte_gpt", device="cuda", compile="off", output_dir=tmp_path, max_steps=80,
        device_tflops=1000.0, disable_monitoring=True,
    )  # fmt: skip
    trainer = Trainer(create_workload(data_path=None, model_size="micro", seed=0), settings)
    report = []
    with trainer.observe() as run:
        watch = threading.Thread(target=lambda: report.append(trainer.gpu.monitor_gpu_utilization(2.0)))
        watch.start()
        trainer.train(run)
        watch.join()
        shown = {s.metric: s.value for s in run.monitor.samples() if not s.labels}
    assert 0 < shown[catalog.MFU_RATIO] <= shown[catalog.HFU_RATIO] < 1
    (device, *_) = report[0].devices
    assert device.utilization is not None and device.memory.max > 0 and report[0].evidence


def test_no_step_of_the_observed_loop_waits_for_the_device(tmp_path: Path) -> None:
    """By the profiler's account: no cudaStreamSynchronize, no cudaMemcpy, nothing of the kind."""
    from torch.profiler import ProfilerActivity, profile

    gpu, made = model()
    optimizer = gpu.create_optimizer(made.parameters(), lr=1e-4)
    batch = windows()
    run: ObservedRun = observe(
        made, optimizer, run="r", output_dir=tmp_path, metrics_port=0, checkpoint_epochs=0,
        snapshot_seconds=1e9,
    )  # fmt: skip
    gpu.watch(run.monitor)

    def forever() -> Any:
        while True:
            yield batch

    with run:
        steps = run.steps(forever())

        def take() -> None:
            with gpu.autocast():
                loss = loss_of(made, next(steps))
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(made.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.record(loss=loss, grad_norm=norm, samples=len(batch))

        for _ in range(20):
            take()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            for _ in range(10):
                take()
        steps.close()
    waits = Counter(e.name for e in profiled.events() if "Synchronize" in e.name or e.name == "cudaMemcpy")
    waits["cudaDeviceSynchronize"] -= 1  # the profiler's own, when it ends
    assert +waits == Counter()


def test_a_model_is_served_on_the_device_by_an_engine_that_agrees() -> None:
    gpu, made = model(mixed_precision=False)
    example = windows(2)[:, :64]
    served = gpu.optimize_for_inference(made, example, calls=20)
    found = {result.engine: result for result in served.results}
    assert found["aot_inductor"].problem is None
    torch.testing.assert_close(served(example), made.eval()(example), rtol=1e-2, atol=1e-2)
