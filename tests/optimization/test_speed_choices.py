"""Layout, TF32, attention kernels, fused optimizers, threads, batch size: chosen by trying, said, exact."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from obsinfra import TrainingMonitor, create_gpu_optimizer
from obsinfra.errors import ConfigError
from obsinfra.optimization import memory_layout
from obsinfra.optimization.attention_kernels import BACKENDS, measure_attention, use_attention
from obsinfra.optimization.batch_size import find_batch_size
from obsinfra.optimization.cpu_threads import tune_threads
from obsinfra.optimization.fused_optimizers import create_optimizer
from obsinfra.optimization.gpu_optimizer import COMPILE_SECONDS
from obsinfra.optimization.timing import Timing, time_in_turns

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def process_wide_choices_undone() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    use_attention("auto")
    torch.set_num_threads(threads)


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:64, None] / 16
    return images, torch.tensor(data.target[:64])


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
    )


def digits_loss(model: nn.Module) -> Tensor:
    images, labels = digits()
    return nn.functional.cross_entropy(model(images), labels)


# ---- layout ------------------------------------------------------------------------------------------


def is_channels_last(model: nn.Module) -> bool:
    weight = model[3].weight  # type: ignore[index]
    return bool(weight.is_contiguous(memory_format=torch.channels_last))


def test_channels_last_changes_the_layout_and_nothing_else() -> None:
    plain = convolutions()
    fast = create_gpu_optimizer(device="cpu", mixed_precision=False, channels_last=True).optimize_model(
        convolutions()
    )
    assert is_channels_last(fast) and not is_channels_last(plain)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, fast.state_dict()[key]), key
    torch.testing.assert_close(digits_loss(fast), digits_loss(plain))


@pytest.mark.parametrize(
    ("first", "last", "chosen"), [(0.2, 0.1, True), (0.1, 0.1, False), (0.1, 0.2, False)]
)
def test_a_layout_is_changed_only_where_it_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, first: float, last: float, chosen: bool
) -> None:
    """The clock is the test's; both candidates run for real, and the model is none of them."""
    losses = []

    def timed(calls: Any, device: torch.device) -> dict[str, Timing]:
        for call in calls.values():
            losses.append(call())
        return {"first": Timing((first,)), "last": Timing((last,))}

    monkeypatch.setattr(memory_layout, "time_in_turns", timed)
    model = convolutions()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    gpu = create_gpu_optimizer(device="cpu", mixed_precision=False)
    gpu.optimize_model(model, "net", loss=digits_loss)
    assert len(losses) == 2 and is_channels_last(model) == chosen
    assert gpu.layouts["net"].speedup == pytest.approx(first / last)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(state, torch.get_rng_state())


def test_a_choice_by_rule_never_looks_at_the_clock() -> None:
    def never(model: nn.Module) -> Tensor:
        raise AssertionError("the model was tried")

    gpu = create_gpu_optimizer(device="cpu", mixed_precision=False, channels_last="rule")
    assert not is_channels_last(gpu.optimize_model(convolutions(), "net", loss=never))
    assert gpu.layouts["net"].speedup is None


def test_the_layout_is_really_measured() -> None:
    gpu = create_gpu_optimizer(device="cpu", mixed_precision=False)
    gpu.optimize_model(convolutions(), "net", loss=digits_loss)
    found = gpu.layouts["net"]
    assert found.speedup is not None and 0.02 < found.speedup < 50
    assert found.channels_last == (found.speedup >= memory_layout.WORTH_RATIO)
    gpu.optimize_model(nn.Linear(2, 2), "line", loss=lambda model: model(torch.ones(1, 2)).sum())
    assert gpu.layouts["line"].reason == "no convolution over images"


def test_fp16_steps_that_overflow_are_counted_in_a_loop_of_ones_own() -> None:
    gpu = create_gpu_optimizer(device="cpu", mixed_precision="fp16")
    model = nn.Linear(2, 2)
    scaler, optimizer = gpu.create_scaler(), gpu.create_optimizer(model.parameters(), lr=1e-3)
    before = model.weight.detach().clone()
    for factor in (1.0, float("inf"), float("nan"), 1.0):
        scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert (
        gpu.skipped_steps == 2
        and torch.isfinite(model.weight).all()
        and not torch.equal(model.weight, before)
    )


@pytest.mark.parametrize(
    "given",
    [
        {"compile_model": "maybe"},
        {"compile_model": None},
        {"compile_mode": "fast"},
        {"channels_last": "yes"},
        {"gradient_checkpointing": -1},
        {"activation_budget_bytes": 0},
        {"peak_flops": -5.0},
        {"device_ids": 0},
        {"device_ids": ["0"]},
    ],
)
def test_choices_out_of_range_are_named(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        create_gpu_optimizer(**{"device": "auto", **given})


def test_decisions_about_an_unknown_model_name_those_there_are() -> None:
    gpu = create_gpu_optimizer(device="cpu", mixed_precision=False)
    gpu.optimize_model(nn.Linear(2, 2), "line")
    with pytest.raises(ConfigError, match="one optimized before: line"):
        gpu.decisions()


def test_the_first_step_of_a_compiled_model_is_not_called_slow() -> None:
    for compiled, allowance in (("off", 0.0), ("on", COMPILE_SECONDS)):
        gpu = create_gpu_optimizer(device="cpu", mixed_precision=False, compile_model=compiled)
        gpu.optimize_model(nn.Linear(2, 2), "line")
        gpu.watch(monitor := TrainingMonitor("m", metrics_port=0))
        assert monitor.recorder.first_step_allowance == allowance


def test_what_was_chosen_is_in_the_log_of_the_run_that_watches(caplog: pytest.LogCaptureFixture) -> None:
    gpu = create_gpu_optimizer(device="cpu", mixed_precision=False)
    gpu.optimize_model(convolutions(), "net")
    with caplog.at_level(logging.INFO, "obsinfra.training"):
        gpu.watch(TrainingMonitor("m", metrics_port=0))
        gpu.optimize_model(nn.Linear(2, 2), "later")
    assert caplog.text.count("model_optimized") == 2
    assert "name=net" in caplog.text and "name=later" in caplog.text
    found = gpu.decisions("net")
    assert found["compiled"] == "off: rarely pays on cpu; ask for it with on"
    assert found["channels_last"].startswith("no: not measured") and found["precision"] == "fp32: as asked"


# ---- kernels of the whole process ----------------------------------------------------------------


def test_what_does_not_apply_to_a_cpu_is_said() -> None:
    before = torch.get_float32_matmul_precision()
    gpu = create_gpu_optimizer(device="cpu", tf32=True, attention="flash")
    assert gpu.process_wide == {"tf32": "TF32 does not apply to a cpu", "attention": "as asked, else math"}
    assert torch.get_float32_matmul_precision() == before


def test_attention_kernels_are_measured_and_those_that_cannot_are_named() -> None:
    found = measure_attention((2, 4, 64, 16), CPU, torch.float32, rounds=2)
    assert found.fastest in found.seconds and set(found.seconds) >= {"flash", "math"}
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert set(found.seconds) | set(found.refused) == set(BACKENDS)
    assert all(found.refused.values())


@pytest.mark.parametrize(
    ("kernel", "flash", "efficient"), [("auto", True, True), ("flash", True, False), ("math", False, False)]
)
def test_the_chosen_kernel_is_allowed_for_the_process(kernel: Any, flash: bool, efficient: bool) -> None:
    use_attention(kernel)
    cuda = torch.backends.cuda
    assert cuda.flash_sdp_enabled() == flash and cuda.mem_efficient_sdp_enabled() == efficient
    assert cuda.math_sdp_enabled()


def test_a_choice_of_somebody_else_is_left_alone() -> None:
    cuda = torch.backends.cuda
    cuda.enable_mem_efficient_sdp(False)
    try:
        create_gpu_optimizer(device="cpu")
        assert not cuda.mem_efficient_sdp_enabled()
        use_attention("efficient")
        use_attention("flash")
        assert not cuda.mem_efficient_sdp_enabled() and cuda.flash_sdp_enabled()
        use_attention("auto")
        assert not cuda.mem_efficient_sdp_enabled() and cuda.flash_sdp_enabled()
    finally:
        cuda.enable_mem_efficient_sdp(True)


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ConfigError, match="attention 'fast'; expected one of 'auto', 'flash'"):
        create_gpu_optimizer(device="cpu", attention="fast")  # type: ignore[arg-type]


# ---- optimizers ----------------------------------------------------------------------------------


def test_optimizers_are_fused_where_torch_has_that_and_say_why_not_elsewhere() -> None:
    model = nn.Linear(3, 3)
    optimizer, how = create_optimizer(torch.optim.AdamW, model.parameters(), CPU, lr=0.1)
    assert how == "fused" and optimizer.defaults["fused"] and optimizer.defaults["lr"] == 0.1
    _, how = create_optimizer(torch.optim.RMSprop, model.parameters(), CPU)
    assert how == "RMSprop has no fused version"
    _, how = create_optimizer(torch.optim.AdamW, model.parameters(), torch.device("xla"))
    assert how == "no fused version on xla"
    whole = nn.Parameter(torch.ones(2, dtype=torch.long), requires_grad=False)
    for parameters in ([whole], [{"params": iter([whole])}], [("whole", whole)]):
        optimizer, how = create_optimizer(torch.optim.AdamW, parameters, CPU)
        assert how.startswith("not fused: some") and not optimizer.defaults["fused"]
    optimizer, how = create_optimizer(torch.optim.AdamW, model.parameters(), CPU, differentiable=True)
    assert how.startswith("not fused: `fused`") and not optimizer.defaults["fused"]
    groups = [{"params": model.parameters(), "lr": 0.5}]
    optimizer, how = create_optimizer(torch.optim.SGD, groups, CPU)
    assert how == "fused" and len(optimizer.param_groups[0]["params"]) == 2
    _, how = create_optimizer(torch.optim.AdamW, model.parameters(), CPU, foreach=True)
    assert how == "as asked"


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_an_embedding_with_sparse_gradients_is_not_given_to_a_fused_kernel(kind: Any) -> None:
    gpu = create_gpu_optimizer(device="cpu", mixed_precision=False)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 1))
    gpu.optimize_model(model)
    optimizer = gpu.create_optimizer(model.parameters(), kind, lr=0.5)
    before = model[0].weight.detach().clone()
    model(torch.tensor([3])).sum().backward()
    optimizer.step()
    changed = (model[0].weight != before).any(1)
    assert changed.tolist() == [row == 3 for row in range(9)]
    _, how = create_optimizer(kind, model.parameters(), CPU, {model[0].weight: "words"}, lr=0.5)
    assert how == "not fused: the gradient of words is sparse"


def test_an_optimizer_that_takes_no_sparse_gradients_is_refused_before_training() -> None:
    gpu = create_gpu_optimizer(device="cpu", mixed_precision=False)
    model = nn.ModuleDict({"words": nn.EmbeddingBag(9, 4, sparse=True)})
    gpu.optimize_model(model)
    with pytest.raises(ConfigError, match=r"AdamW for words\.weight, whose gradients are.*SGD, Adagrad"):
        gpu.create_optimizer(model.parameters())
    with pytest.raises(ConfigError, match=r"a fused SGD for words\.weight.*drop fused=True"):
        gpu.create_optimizer(model.parameters(), torch.optim.SGD, lr=0.1, fused=True)
    gpu.create_optimizer(model.parameters(), torch.optim.SparseAdam)


def test_a_sparse_gradient_nobody_knew_of_is_named_at_the_step() -> None:
    words, line = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 1)
    optimizer, how = create_optimizer(torch.optim.SGD, [*line.parameters(), words.weight], CPU, lr=0.1)
    assert how == "fused"
    line(torch.ones(1, 4)).sum().backward()
    optimizer.step()  # the embedding has no gradient yet
    line(words(torch.tensor([3]))).sum().backward()
    with pytest.raises(ConfigError, match=r"SGD, and parameter 2 of shape \[9, 4\] has a sparse gradient"):
        optimizer.step()


def test_a_batch_size_is_searched_with_the_optimizer_that_takes_the_model() -> None:
    gpu = create_gpu_optimizer(device="cpu", mixed_precision=False)
    model = nn.Embedding(9, 4, sparse=True)
    tokens = torch.arange(8)

    def loss(model: nn.Module, rows: int) -> Tensor:
        return model(tokens[:rows]).sum()  # type: ignore[no-any-return]

    with pytest.raises(ConfigError, match="AdamW for weight, whose gradients are sparse"):
        gpu.find_batch_size(model, loss, last=8)
    assert gpu.find_batch_size(model, loss, torch.optim.SparseAdam, last=8, rounds=1).largest == 8


# ---- threads and timing --------------------------------------------------------------------------


def test_threads_are_measured_and_the_fewest_of_the_fast_are_kept() -> None:
    torch.set_num_threads(2)
    matrix = torch.randn(64, 64)
    seen: set[int] = set()

    def step() -> None:
        seen.add(torch.get_num_threads())
        (matrix @ matrix).relu().sum()

    found = tune_threads(step, candidates=[1, 2], rounds=3)
    assert seen == {1, 2} == set(found.seconds)
    assert torch.get_num_threads() == found.threads
    fastest = min(found.seconds.values())
    assert found.seconds[found.threads] <= 1.03 * fastest
    assert found.speedup == found.seconds[2] / found.seconds[found.threads]


def test_threads_are_as_before_when_the_step_fails() -> None:
    torch.set_num_threads(2)

    def step() -> None:
        raise ValueError("broken step")

    with pytest.raises(ValueError, match="broken step"):
        tune_threads(step, candidates=[1])
    assert torch.get_num_threads() == 2
    with pytest.raises(ConfigError, match="candidates 0; expected a whole number"):
        tune_threads(step, candidates=[0])


def test_calls_are_timed_in_turns_after_a_warm_up() -> None:
    order: list[str] = []
    large = torch.randn(700, 700)  # a call long enough not to be repeated

    def call(name: str) -> Any:
        def run() -> None:
            order.append(name)
            for _ in range(3):
                large @ large

        return run

    times = time_in_turns({"a": call("a"), "b": call("b")}, CPU, rounds=3, warm_up=1)
    assert len(times["a"].seconds) == 3 and times["a"].spread >= 1
    runs = "".join(order).removeprefix("aa")
    assert [name for i, name in enumerate(runs) if i == 0 or runs[i - 1] != name][1:] == list("ababab")


# ---- batch size ----------------------------------------------------------------------------------


def test_the_largest_batch_is_found_to_an_eighth_when_the_allocator_refuses() -> None:
    limit = 100

    def step(rows: int) -> None:
        if rows > limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {rows} rows")

    found = find_batch_size(step, CPU, limit_bytes=2**50, rounds=1)
    assert limit * 7 / 8 <= found.largest <= limit
    refused = [tried for tried in found.tried if not tried.fits]
    assert refused and all("out of memory" in tried.problem for tried in refused)
    assert [tried.rows for tried in found.tried] == sorted({tried.rows for tried in found.tried})


SEARCH_BELOW_A_LIMIT = """
import json
import torch
from obsinfra.optimization.batch_size import find_batch_size
from obsinfra.optimization.reclaim import resident_bytes

row = 8 * 2**20
tried = []

def step(rows):
    tried.append(rows)
    torch.ones(rows * row // 4)

step(1)
limit = resident_bytes() + 12 * row + row // 2
found = find_batch_size(step, torch.device("cpu"), limit_bytes=limit, rounds=1)
sizes = [(size.rows, size.fits, size.problem or "") for size in found.tried]
print(json.dumps({"tried": tried, "largest": found.largest, "fastest": found.fastest, "sizes": sizes}))
"""


def test_on_a_cpu_a_size_that_would_exceed_the_limit_is_never_tried() -> None:
    """A step that really holds 8 MB a row, with room for 12 of them, in a process of its own."""
    command = [sys.executable, "-c", SEARCH_BELOW_A_LIMIT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    sizes = {rows: (fits, problem) for rows, fits, problem in said["sizes"]}
    assert 8 <= said["largest"] <= 13
    attempted = [rows for rows, (fits, why) in sizes.items() if fits or "foreseen" not in why]
    assert max(said["tried"]) == max(attempted)
    assert max(said["tried"]) < 16
    assert any("foreseen" in why for fits, why in sizes.values() if not fits)
    assert sizes[said["fastest"]][0]


def test_a_model_is_measured_by_whole_training_steps_of_a_copy() -> None:
    gpu = create_gpu_optimizer(device="cpu", mixed_precision=False)
    model = convolutions()
    before = copy.deepcopy(model.state_dict())
    images, labels = digits()
    seen: list[int] = []

    def loss(model: nn.Module, rows: int) -> Tensor:
        seen.append(rows)
        return nn.functional.cross_entropy(model(images[:rows]), labels[:rows])

    found = gpu.find_batch_size(model, loss, first=2, last=50, rounds=1)
    assert found.largest == 50 and sorted(set(seen)) == [2, 4, 8, 16, 32, 50]
    best = max(tried.rows_per_second for tried in found.tried)
    fastest = next(tried for tried in found.tried if tried.rows == found.fastest)
    assert fastest.rows_per_second * 1.02 >= best
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_cannot_be_searched_is_refused() -> None:
    def step(rows: int) -> None:
        raise MemoryError("no room")

    with pytest.raises(ConfigError, match="a batch of 4 does not fit: no room"):
        find_batch_size(step, CPU, first=4)
    with pytest.raises(ConfigError, match="from 8 to 4"):
        find_batch_size(step, CPU, first=8, last=4)

    def broken(rows: int) -> None:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        find_batch_size(broken, CPU)
