"""torch.compile through the GPU optimiser: exact results, and a counted way out where it fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn

from obsinfra import create_gpu_optimizer
from obsinfra.catalog import metrics
from obsinfra.errors import ConfigError
from obsinfra.optimization.compilation import Compilation, compile_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch.compiler.reset()


class Net(nn.Module):
    """Two layers with dropout, and a break in the middle on request."""

    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(torch.relu(self.first(x)), 0.3, self.training)
        if self.breaks:
            torch._dynamo.graph_break()
        out: Tensor = self.second(x)
        return out


def nets(**options: bool) -> tuple[Net, Net]:
    """Two with the same weights."""
    left, right = Net(**options), Net(**options)
    right.load_state_dict(left.state_dict())
    return left, right


def outcome(model: nn.Module, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of one pass, from the same random state."""
    torch.manual_seed(7)
    model.zero_grad()
    out = model(inputs)
    out.square().sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def failing_on(calls: set[int], seen: list[int]) -> Any:
    """A backend that fails on some of its calls, counted from 0, and else runs the graph as it is."""

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        seen.append(len(seen))
        if seen[-1] in calls:
            raise RuntimeError("no kernel\nfor this")
        return graph.forward

    return backend


def assert_same(left: tuple[Tensor, list[Tensor]], right: tuple[Tensor, list[Tensor]]) -> None:
    assert torch.equal(left[0], right[0])
    assert len(left[1]) == len(right[1]) == 4
    for mine, theirs in zip(left[1], right[1], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_inductor_compiles_in_place_and_agrees_with_eager() -> None:
    plain, fast = nets()
    compilation = compile_model(fast, "on", CPU)
    assert list(fast.state_dict()) == list(plain.state_dict())
    inputs = torch.randn(5, 6)
    plain.eval(), fast.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast(inputs), plain(inputs))
    assert compilation.graphs == 1 and compilation.seconds > 0
    assert compilation.fallbacks == {"backend": 0, "tracing": 0, "variants": 0}


def test_a_graph_the_backend_fails_on_runs_eagerly_with_the_same_result_counted_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain, fast = nets(breaks=True)
    compilation = compile_model(fast, True, CPU, backend=failing_on({1}, []))
    inputs = torch.randn(5, 6)
    with caplog.at_level(logging.WARNING, "obsinfra.training"):
        got = outcome(fast, inputs)
    assert_same(got, outcome(plain, inputs))
    assert compilation.graphs == 1 and compilation.graph_breaks == 1
    assert compilation.fallbacks["backend"] == 1
    assert "compile_fell_back model=Net cause=backend" in caplog.text
    assert "RuntimeError: no kernel'" in caplog.text
    assert_same(outcome(fast, inputs), outcome(plain, inputs))  # settled: nothing is tried anew
    assert compilation.fallbacks["backend"] == 1


def test_two_models_are_added_up_and_share_what_torch_counts_for_the_process() -> None:
    gpu = create_gpu_optimizer(device="cpu", mixed_precision=False, compile_model="off")
    for name in ("one", "two"):
        gpu.optimize_model(Net(), name)
    for name in ("one", "two"):
        model = Net(breaks=True)
        gpu.compilations[name] = compile_model(model, True, CPU, backend=failing_on({1}, []))
        model(torch.randn(5, 6))
    one, two = gpu.compilations["one"], gpu.compilations["two"]
    assert one.fallbacks["backend"] == two.fallbacks["backend"] == 1
    shown = {(s.metric, s.labels.get("cause")): s.value for s in gpu.samples()}
    assert shown[metrics.COMPILE_GRAPHS, None] == one.graphs + two.graphs
    assert shown[metrics.COMPILE_FALLBACKS, "backend"] == 2
    assert shown[metrics.COMPILE_GRAPH_BREAKS, None] == one.graph_breaks == two.graph_breaks + 1


def test_a_backward_graph_that_cannot_be_compiled_is_found_in_the_forward_pass() -> None:
    from torch._dynamo.backends.common import aot_autograd

    def as_it_is(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return make_boxed_func(graph.forward)

    def refuse(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        raise RuntimeError("no kernel for the gradient")

    plain, fast = nets()
    backend = aot_autograd(fw_compiler=as_it_is, bw_compiler=refuse)
    compilation = compile_model(fast, "auto", torch.device("cuda"), backend=backend)
    inputs = torch.randn(5, 6)
    assert_same(outcome(fast, inputs), outcome(plain, inputs))
    assert compilation.graphs == 0 and compilation.fallbacks["backend"] == 1


def test_a_model_the_tracer_fails_on_runs_eagerly_and_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, fast = nets()
    compilation = compile_model(fast, "auto", torch.device("cuda"), backend="eager")

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("the tracer's own bug")

    monkeypatch.setattr(torch._dynamo.output_graph.OutputGraph, "compile_subgraph", broken)
    inputs = torch.randn(5, 6)
    got = outcome(fast, inputs)
    monkeypatch.undo()
    assert_same(got, outcome(plain, inputs))
    assert compilation.fallbacks["tracing"] == 1
    outcome(fast, inputs)
    assert compilation.graphs == 0


def test_who_asks_for_compilation_hears_at_the_first_call_that_it_cannot_be() -> None:
    model = Net()
    compile_model(model, "on", CPU, backend=failing_on({0}, []))
    with pytest.raises(
        ConfigError, match=r"Net cannot be compiled: RuntimeError: no kernel; expected.*--compile off"
    ):
        model(torch.randn(5, 6))


def test_later_failures_never_stop_a_training_that_asked_for_compilation() -> None:
    model = Net()
    compilation = compile_model(model, "on", CPU, backend=failing_on({1}, []))
    model(torch.randn(5, 6))
    model(torch.randn(9, 6))
    assert compilation.graphs == 1 and compilation.recompiles == 1 and compilation.fallbacks["backend"] == 1


def test_out_of_memory_in_the_compiler_is_nobodys_fallback() -> None:
    """The step is done again in smaller pieces instead: see oom_recovery."""

    def hungry(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = Net()
    compilation = compile_model(model, "auto", torch.device("cuda"), backend=hungry)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        model(torch.randn(5, 6))
    assert sum(compilation.fallbacks.values()) == 0


def test_errors_of_the_model_itself_come_through_as_they_are() -> None:
    model = Net()
    compilation = compile_model(model, "auto", torch.device("cuda"), backend="eager")
    with pytest.raises(Exception, match=r"(?s)5x3|must match|size"):
        model(torch.randn(5, 3))
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 3))
    assert compilation.fallbacks["backend"] == 0


def test_more_kinds_of_input_than_torch_keeps_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    compilation = compile_model(model, "on", CPU, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=3), caplog.at_level(logging.WARNING, "obsinfra.training"):
        for kind in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float32):
            model.to(kind)
            model(torch.randn(5, 6, dtype=kind))
    assert compilation.graphs == 3 and compilation.recompiles == 2
    assert compilation.fallbacks["variants"] == 1
    assert caplog.text.count("compile_fell_back model=Net cause=variants") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "turbo"}, "compile mode 'turbo'; expected one of default,"),
        ({"backend": "gcc"}, "compile backend 'gcc'; expected one of"),
        ({"backend": "eager", "mode": "max-autotune"}, "compile mode 'max-autotune' for the backend eager"),
    ],
)
def test_unknown_modes_and_backends_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compile_model(Net(), "on", CPU, **options)


@pytest.mark.parametrize(
    ("wanted", "device", "compiled"),
    [("on", CPU, True), ("off", torch.device("cuda:0"), False), ("auto", CPU, False), (False, CPU, False),
     (True, CPU, True), ("auto", torch.device("cuda:0"), True)],
)  # fmt: skip
def test_compilation_is_on_where_asked_for_or_where_it_pays(
    wanted: Any, device: torch.device, compiled: bool
) -> None:
    model = Net()
    found: Compilation = compile_model(model, wanted, device)
    assert (model._compiled_call_impl is not None) == compiled == (found.reason is None)
