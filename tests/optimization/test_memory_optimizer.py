"""The memory optimiser in a plain loop: profiles, what there is, what to change, what leaks."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from events import captured_events
from torch import Tensor, nn

import obsinfra
from obsinfra.catalog import metrics as catalog
from obsinfra.config.settings import Settings
from obsinfra.errors import ConfigError, MemoryExhaustedError, UserError
from obsinfra.monitoring.training_monitor import TrainingMonitor
from obsinfra.optimization.leak_detection import LeakDetector
from obsinfra.optimization.memory_advice import recommendations
from obsinfra.optimization.memory_optimizer import create_memory_optimizer
from obsinfra.optimization.micro_batching import Share
from obsinfra.optimization.reclaim import resident_bytes

MIB = 2**20


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = torch.tanh(block(inputs))
        return inputs


def test_a_loop_of_ones_own_survives_a_step_that_does_not_fit() -> None:
    """As docs/memory.md has it."""
    memory = create_memory_optimizer(85.0, gradient_checkpointing=True)
    model = memory.optimize_for_training(Blocks())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sizes: list[int] = []

    def passes(shares: Sequence[Share]) -> None:
        for inputs, weight, _ in shares:
            sizes.append(len(inputs))
            if len(inputs) > 10:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            (model(inputs).pow(2).mean() * weight).backward()

    monitor = TrainingMonitor("loop", metrics_port=0)
    with memory.watching(monitor, batch_size=32):
        for step in range(2):
            memory.run(step, [torch.ones(32, 8)], passes)
            optimizer.step()
            optimizer.zero_grad()
            memory.step_done()
    assert sizes == [32, 16, 8, 8, 8, 8, 8, 8, 8, 8]
    assert monitor.instruments.get(catalog.OOM_RECOVERIES) == 1
    info = memory.get_memory_info()
    assert info["micro_batch"] == {"rows": 8, "out_of_memory_recoveries": 1}
    (advice,) = (one for one in memory.get_memory_recommendations() if one.setting == "micro_batch")
    assert advice.value == "8" and advice.because["out_of_memory_recoveries"] == 1
    assert gc.isenabled()


def fails_once(model: nn.Module, extra: nn.Module | None = None) -> Any:
    """Passes whose first attempt runs out of memory after its first backward pass."""
    failed: list[int] = []

    def passes(shares: Sequence[Share]) -> None:
        for rows, weight, _ in shares:
            out = model(rows) if extra is None else extra(model(rows))
            (out.pow(2).mean() * weight).backward()
            if not failed:
                failed.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory.")

    return passes


def passes_of(model: nn.Module) -> Any:
    def passes(shares: Sequence[Share]) -> None:
        for rows, weight, _ in shares:
            (model(rows).pow(2).mean() * weight).backward()

    return passes


def test_a_repetition_never_silently_loses_gradients_of_an_earlier_run() -> None:
    memory = create_memory_optimizer()
    model = memory.optimize_for_training(nn.Linear(4, 1))
    memory.run(0, [torch.ones(8, 4)], passes_of(model))
    kept = model.weight.grad
    with pytest.raises(MemoryExhaustedError, match=r"would lose the gradients.*accumulate within one run"):
        memory.run(0, [torch.ones(8, 4)], fails_once(model))
    assert model.weight.grad is kept


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("stepped", [True, False])
def test_gradients_that_were_used_or_dropped_do_not_stop_a_repetition(stepped: bool, to_none: bool) -> None:
    memory = create_memory_optimizer()
    model = memory.optimize_for_training(nn.Linear(4, 1))
    unused = nn.Parameter(torch.ones(1))  # of the model, but of no optimizer: its gradient is never dropped
    model.unused = unused  # type: ignore[assignment]
    memory.optimize_for_training(model)
    optimizer = torch.optim.SGD([model.weight, model.bias], lr=0.1, fused=True)
    memory.run(0, [torch.ones(8, 4)], passes_of(model))
    if stepped:
        unused.grad = torch.ones(1)
        optimizer.step()
    optimizer.zero_grad(set_to_none=to_none)
    memory.run(1, [torch.ones(8, 4)], fails_once(model))
    assert memory.get_memory_info()["micro_batch"]["out_of_memory_recoveries"] == 1


def test_a_parameter_that_a_repetition_cannot_take_back_is_named() -> None:
    body, head = nn.Linear(4, 3), nn.Linear(3, 1)
    memory = create_memory_optimizer()
    memory.optimize_for_training(body)
    with pytest.raises(ConfigError, match=r"shape \[(1|1, 3)\] outside the model.*nn.ModuleList"):
        memory.run(0, [torch.ones(8, 4)], fails_once(body, head))
    for module in (body, head):
        module.zero_grad()
    memory.optimize_for_training(nn.ModuleList([body, head]))
    memory.run(0, [torch.ones(8, 4)], passes_of(nn.Sequential(body, head)))
    whole = head.weight.grad
    assert whole is not None
    again = create_memory_optimizer()
    again.optimize_for_training(nn.ModuleList([body, head]))  # drops the gradients
    again.run(0, [torch.ones(8, 4)], fails_once(body, head))
    torch.testing.assert_close(head.weight.grad, whole)


def test_a_model_that_is_prepared_within_watching_is_watched() -> None:
    memory = create_memory_optimizer()
    monitor = TrainingMonitor("loop", metrics_port=0)
    with memory.watching(monitor, batch_size=8):
        model = memory.optimize_for_training(nn.Linear(4, 1))
        memory.run(0, [torch.ones(8, 4)], fails_once(model))
    assert monitor.instruments.get(catalog.OOM_RECOVERIES) == 1


def guards() -> int:
    return sum(thread.name == "obsinfra-memory-guard" for thread in threading.enumerate())


def test_a_nested_watching_is_refused_and_leaves_no_thread_behind() -> None:
    before = guards()
    memory = create_memory_optimizer(gc="boundary")
    with memory.watching():
        assert guards() == before + 1
        with pytest.raises(ConfigError, match="watching within watching"), memory.watching():
            pass
        other = create_memory_optimizer(gc="boundary")
        with pytest.raises(ConfigError, match="gc='python'"), other.watching():
            pass
        assert guards() == before + 1
    assert guards() == before and gc.isenabled()
    with memory.watching():
        assert guards() == before + 1


class Codebook(nn.Module):
    """Keeps an average as many models do: past autograd, which counts no such write."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)
        self.register_buffer("average", torch.zeros(4))

    def forward(self, rows: Tensor) -> Tensor:
        self.average.data.mul_(0.9).add_(rows.mean(0))
        return self.line(rows)


def average_after(steps: int, *, last_fails: bool) -> Tensor:
    """Of a codebook whose last step runs out of memory, or takes half of the rows at a time to begin with."""
    torch.manual_seed(0)
    model = Codebook()
    memory = create_memory_optimizer()
    memory.optimize_for_training(model)
    failed: list[int] = []

    def attempt(shares: Sequence[Share]) -> None:
        for rows, weight, _ in shares:
            out = model(rows)
            if last_fails and step == steps - 1 and not failed:
                failed.append(step)
                raise torch.OutOfMemoryError("CUDA out of memory, as it would say")
            (out.sum() * weight).backward()

    for step in range(steps):
        memory.micro_batching.limit = 4 if step == steps - 1 and not last_fails else None
        memory.run(step, [torch.randn(8, 4)], attempt)
        model.zero_grad()
    assert len(failed) == last_fails
    return model.average.clone()


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_what_a_failed_step_wrote_past_autograd_is_taken_back(steps: int) -> None:
    assert torch.equal(average_after(steps, last_fails=True), average_after(steps, last_fails=False))


def test_a_step_before_the_model_is_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimize_for_training\(model\) before"):
        create_memory_optimizer().run(0, [torch.ones(2, 1)], lambda shares: None)


def test_what_there_is_is_told_in_numbers() -> None:
    memory = obsinfra.create_memory_optimizer()
    model = memory.optimize_for_training(nn.Linear(100, 10))
    info = json.loads(json.dumps(memory.get_memory_info()))
    assert info["model"] == {
        "parameters": 1010, "parameter_bytes": 4040, "gradient_bytes": 0, "buffer_bytes": 0,
        "training_bytes": 4 * 4040, "float32_ratio": 1.0,
    }  # fmt: skip
    assert 0 < info["process"]["resident_bytes"] < info["host"]["limit_bytes"]
    assert info["host"]["limited_by"] in ("host", "cgroup")
    model(torch.ones(2, 100)).sum().backward()
    assert memory.get_memory_info()["model"]["gradient_bytes"] == 4040


def test_memory_is_given_back_on_request() -> None:
    memory = create_memory_optimizer()
    gc.collect()
    gc.disable()
    try:
        knot: list[Any] = [torch.ones(64 * MIB, dtype=torch.uint8)]
        knot.append(knot)
        del knot
        freed = memory.optimize_memory()
    finally:
        gc.enable()
    assert freed["objects_collected"] >= 1 and freed["freed_bytes"]["resident"] > 60 * MIB


# ---- profiles ------------------------------------------------------------------------------------------


def test_blocks_nest_and_peaks_belong_to_all_that_were_open() -> None:
    memory = create_memory_optimizer()
    with captured_events(), memory.memory_profiler("epoch") as outer:
        with memory.memory_profiler("spike") as spike:
            torch.ones(128 * MIB, dtype=torch.uint8)
        with memory.memory_profiler("calm") as calm:
            kept = torch.ones(16 * MIB, dtype=torch.uint8)
    assert [one.name for one in memory.profiler.profiles] == ["epoch/spike", "epoch/calm", "epoch"]
    if not spike.peak_is_exact:
        pytest.skip("this kernel does not let a process reset its peak")
    assert spike.resident_peak - spike.resident_before > 120 * MIB and spike.grown_bytes < 64 * MIB
    assert calm.resident_peak - calm.resident_before < 64 * MIB, "the spike before it is not its own"
    assert outer.resident_peak >= spike.resident_peak and outer.seconds >= spike.seconds + calm.seconds
    assert len(kept) and calm.grown_bytes > 14 * MIB


def test_the_largest_python_allocations_are_named_by_line() -> None:
    memory = create_memory_optimizer()
    with memory.memory_profiler("lists", python_top=3) as profile:
        kept = [str(number) * 20 for number in range(20_000)]
    assert len(kept) and profile.python
    assert profile.python[0]["bytes"] > MIB and "test_memory_optimizer.py" in profile.python[0]["at"]


def test_a_profiler_that_is_off_measures_nothing() -> None:
    memory = create_memory_optimizer(profile=False)
    with memory.memory_profiler("anything", python_top=3) as profile:
        pass
    assert not memory.profiler.profiles and profile.seconds == 0.0
    assert memory.memory_profiler("a") is memory.memory_profiler("b"), "nothing is made"


def test_a_block_that_raises_is_profiled_and_closed() -> None:
    memory = create_memory_optimizer()
    with pytest.raises(KeyError), memory.memory_profiler("outer"), memory.memory_profiler("inner"):
        raise KeyError("x")
    with memory.memory_profiler("next"):
        pass
    assert [one.name for one in memory.profiler.profiles] == ["outer/inner", "outer", "next"]


# ---- leaks ---------------------------------------------------------------------------------------------


class Keeper:
    def __init__(self) -> None:
        self.losses: list[Tensor] = []


def test_a_leak_is_found_by_size_holder_and_maker() -> None:
    keeper, weight = Keeper(), torch.ones(1000, 700, requires_grad=True)
    detector = LeakDetector(looks=3)
    found = []
    for step in range(0, 50, 10):
        keeper.losses.append(weight * 2.0)  # the loss with its graph: the classic
        short_lived = torch.ones(1000, 700)
        found = detector.look(step)
        del short_lived
        if step < 30:
            assert found == [], "three looks are three growths"
    (leak,) = found
    assert (leak.shape, leak.dtype, leak.device) == ((1000, 700), "float32", "cpu")
    assert leak.grown == 3 and leak.bytes_per_step == pytest.approx(1000 * 700 * 4 / 10)
    assert leak.made_by[0][0].startswith("MulBackward")
    assert any("Keeper.losses" in way for way in leak.held_by), leak.held_by


def test_what_stays_or_comes_and_goes_is_no_leak() -> None:
    detector, cache = LeakDetector(looks=2), []
    for step in range(6):
        if step < 2:
            cache.append(torch.ones(999, 600))  # fills up, and stays
        batch = [torch.ones(998, 600) for _ in range(step % 2 + 1)]
        assert not [one for one in detector.look(step) if one.shape[0] in (998, 999)]
        del batch


def test_leaks_are_looked_for_every_so_many_steps_and_told_once() -> None:
    memory = create_memory_optimizer(leak_check_steps=2)
    kept = []
    with captured_events() as events, memory.watching():
        for _ in range(14):
            kept.append(torch.ones(640, 997))
            memory.step_done()
    (event,) = (event for event in events if event["event"] == "tensors_growing" and event["shape"][1] == 997)
    assert event["after_steps"] == 10 and event["bytes_per_step"] == pytest.approx(640 * 997 * 4)
    assert memory.leaks.instruments.get(catalog.GROWING_TENSOR_BYTES) >= 14 * 640 * 997 * 4


# ---- advice and bad input ------------------------------------------------------------------------------


def device(**numbers: Any) -> dict[str, Any]:
    return {
        "device": 0, "free_bytes": 1, "total_bytes": 80_000, "allocated_bytes": 40_000,
        "allocated_peak_bytes": 60_000, "reserved_bytes": 60_000, "retries": 0, **numbers,
    }  # fmt: skip


def host(used: int, limited_by: str) -> dict[str, Any]:
    return {
        "used_bytes": used, "limit_bytes": 100, "ratio": used / 100, "limited_by": limited_by,
        "swap_used_bytes": 0,
    }  # fmt: skip


def advice(**parts: Any) -> dict[str, Any]:
    """What is recommended, setting → numbers, where `parts` differ from a machine at ease."""
    info = {
        "host": host(10, "host"),
        "model": {"training_bytes": 10_000, "float32_ratio": 1.0},
        "micro_batch": {"rows": None, "out_of_memory_recoveries": 0},
        "seconds_to_exhaustion": {},
        "cuda": [],
    }  # fmt: skip
    return {one.setting: one.because for one in recommendations({**info, **parts}, 85.0)}


def test_each_recommendation_has_its_reason_and_a_setting_that_exists() -> None:
    assert advice() == {} and advice(cuda=[device()]) == {}
    found = {
        **advice(seconds_to_exhaustion={"host": 300.0}),
        **advice(host=host(90, "cgroup")),
        **advice(micro_batch={"rows": 4, "out_of_memory_recoveries": 2}),
        **advice(cuda=[device(allocated_peak_bytes=79_000)]),
        **advice(cuda=[device(retries=3)]),
        **advice(cuda=[device(allocated_peak_bytes=9_000, reserved_bytes=9_500, allocated_bytes=9_000)]),
    }
    assert set(found) == {
        "leak_check_steps", "num_workers", "micro_batch", "gradient_checkpointing", "precision",
        "PYTORCH_CUDA_ALLOC_CONF", "batch_size",
    }  # fmt: skip
    assert found["gradient_checkpointing"] == {
        "peak_bytes": 79_000, "total_bytes": 80_000, "activation_bytes": 69_000,
    }  # fmt: skip
    assert set(found) - {"PYTORCH_CUDA_ALLOC_CONF"} <= set(Settings.model_fields)
    assert all(because for because in found.values())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"max_memory_percent": 101.0}, "101.0"),
        ({"max_memory_percent": -1.0}, "-1.0"),
        ({"micro_batch": 0}, "micro_batch 0"),
        ({"gc": "never"}, "'never'"),
        ({"leak_check_steps": -5}, "-5"),
    ],
)
def test_values_out_of_range_are_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match="expected") as caught:
        create_memory_optimizer(**given)
    assert named in str(caught.value)


def test_without_blocks_nothing_can_be_recomputed() -> None:
    with pytest.raises(ConfigError, match="gradient checkpointing of Linear"):
        create_memory_optimizer(gradient_checkpointing=True).optimize_for_training(nn.Linear(2, 2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_snapshot_without_a_device_says_what_to_do_instead(tmp_path: Path) -> None:
    memory = create_memory_optimizer()
    with (
        pytest.raises(UserError, match="get_memory_info"),
        memory.cuda_memory_snapshot(tmp_path / "x.pickle"),
    ):
        pass
    assert not (tmp_path / "x.pickle").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_snapshot_is_written_also_when_memory_runs_out(tmp_path: Path) -> None:
    torch.ones(1, device="cuda")
    memory = create_memory_optimizer(device="cuda")
    with (
        pytest.raises(torch.OutOfMemoryError),
        memory.cuda_memory_snapshot(tmp_path / "full.pickle"),
        memory.memory_profiler("full") as profile,
    ):
        kept = [torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(10_000)]
    assert not profile.devices[0].allocated_peak < 2**30
    assert (tmp_path / "full.pickle").stat().st_size > 0
    del kept


def test_the_public_name_costs_no_torch_until_it_is_used() -> None:
    code = "import obsinfra, sys; assert 'torch' not in sys.modules; obsinfra.create_memory_optimizer"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert resident_bytes() > 0
