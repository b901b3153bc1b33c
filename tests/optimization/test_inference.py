"""A trained model in every engine that takes it: equal to eager, measured, kept out where it is not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from obsinfra import TrainingMonitor, create_gpu_optimizer
from obsinfra.catalog import metrics as catalog
from obsinfra.errors import ConfigError
from obsinfra.optimization import inference, inference_engines
from obsinfra.optimization.inference import InferenceModel, optimize_for_inference
from obsinfra.workloads.byte_gpt import SIZES, ByteGPT

GPU = create_gpu_optimizer(device="cpu", mixed_precision=False)


class Net(nn.Module):
    """Batch norm and dropout, which training and evaluation do differently; two outputs, with names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.5))
        self.mean, self.scale = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.layers(x)
        return {"mean": self.mean(hidden), "scale": self.scale(hidden).exp()}


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    for _ in range(3):
        model(torch.randn(32, 6))  # batch norm has seen something
    return model


@pytest.fixture(scope="module")
def made(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceModel]:
    folder = tmp_path_factory.mktemp("engines")
    yield GPU.optimize_for_inference(
        net,
        torch.randn(4, 6),
        engines=("aot_inductor", "onnx_runtime", "tensorrt", "torchscript"),
        dynamic_batch=True,
        calls=20,
        folder=folder,
    )


def outcome(made: InferenceModel, engine: str) -> inference.EngineResult:
    return next(result for result in made.results if result.engine == engine)


@pytest.mark.parametrize("engine", ["eager", "aot_inductor", "onnx_runtime", "torchscript"])
def test_an_engine_agrees_with_the_model_and_its_latency_is_measured(
    made: InferenceModel, engine: str
) -> None:
    found = outcome(made, engine)
    assert found.problem is None, found.problem
    assert found.difference is not None and 0 <= found.difference < 1e-3
    latency = found.latency
    assert latency is not None and 0 < latency[0.5] <= latency[0.95] <= latency[0.99]


def test_what_does_not_apply_says_so_in_a_line(made: InferenceModel) -> None:
    found = outcome(made, "tensorrt")
    assert found.problem == "TensorRT does not apply to a cpu" and found.latency is None


def test_the_fastest_is_in_use_and_answers_as_the_model_does_for_any_batch(
    made: InferenceModel, net: Net
) -> None:
    timed = {result.engine: result.latency[0.5] for result in made.results if result.latency}
    assert timed[made.engine] == min(timed.values())
    assert made.latency[0.5] == timed[made.engine]
    net.eval()
    for rows in (2, 4, 9):
        inputs = torch.randn(rows, 6)
        got = made(inputs)
        assert list(got) == ["mean", "scale"] and not got["mean"].requires_grad
        torch.testing.assert_close(got, dict(net(inputs)), rtol=1e-3, atol=1e-4, check_stride=False)
    assert made.fallbacks == 0
    net.train()


def test_the_files_are_kept_where_they_were_asked_for(made: InferenceModel) -> None:
    assert {path.name for path in made.folder.iterdir()} >= {"model.pt2", "model.onnx", "model.ts"}


def test_inputs_of_another_form_go_to_the_model_itself_counted_and_logged_once(
    made: InferenceModel, net: Net, caplog: pytest.LogCaptureFixture
) -> None:
    before = made.fallbacks
    inputs = torch.randn(1, 6)  # a graph exported for several rows is not one for a single one
    with caplog.at_level(logging.WARNING, "obsinfra.performance"):
        got, again = made(inputs), made(inputs)
    net.eval()
    assert torch.equal(got["mean"], net(inputs)["mean"]) and torch.equal(got["mean"], again["mean"])
    net.train()
    assert made.fallbacks == before + 2
    assert caplog.text.count("inference_fell_back") == (1 if before == 0 else 0)


def test_everything_measured_is_exported_and_every_call_timed(made: InferenceModel) -> None:
    monitor = TrainingMonitor("m", metrics_port=0)
    made.watch(monitor)
    for _ in range(3):
        made(torch.randn(4, 6))
    shown = {
        (sample.labels["engine"], sample.labels["quantile"]): sample.value
        for sample in monitor.samples()
        if sample.metric is catalog.INFERENCE_ENGINE_LATENCY_SECONDS
    }
    assert {engine for engine, _ in shown} == {"eager", "aot_inductor", "onnx_runtime", "torchscript"}
    assert {quantile for _, quantile in shown} == {"0.5", "0.95", "0.99"}
    (histogram,) = [
        value
        for metric, _, value in monitor.instruments.histograms()
        if metric is catalog.INFERENCE_LATENCY_SECONDS
    ]
    assert sum(histogram.counts) == 3


def test_an_engine_that_computes_something_else_is_kept_out(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module, example: Any, shapes: Any, folder: Path) -> Any:
        return lambda x: {name: value * 1.01 for name, value in model(x).items()}

    def less(model: nn.Module, example: Any, shapes: Any, folder: Path) -> Any:
        return lambda x: {"mean": model(x)["mean"]}

    def nan(model: nn.Module, example: Any, shapes: Any, folder: Path) -> Any:
        return lambda x: {name: value * torch.nan for name, value in model(x).items()}

    monkeypatch.setattr(
        inference,
        "ENGINES",
        {"aot_inductor": wrong, "onnx_runtime": less, "tensorrt": nan, "torchscript": nan},
    )
    made = optimize_for_inference(net, torch.randn(4, 6), calls=10)
    assert made.engine == "eager"
    assert outcome(made, "aot_inductor").problem == "differs from eager by 0.01, more than 0.001"
    assert "inf" in str(outcome(made, "onnx_runtime").problem)
    assert "inf" in str(outcome(made, "tensorrt").problem)
    assert optimize_for_inference(net, torch.randn(4, 6), calls=10, tolerance=0.02).engine in (
        "eager", "aot_inductor",
    )  # fmt: skip


class Peeking(nn.Module):
    """Looks at a value, which no exported graph does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x


def test_masked_outputs_are_compared_by_what_is_not_masked() -> None:
    inf = float("inf")
    eager = torch.tensor([[1.0, -inf], [2.0, inf]])
    assert inference._difference(eager, eager.clone(), None)[0] == 0.0
    assert inference._difference(eager, eager + torch.tensor([0.2, 0.0]), None)[0] == pytest.approx(0.1)
    assert inference._difference(eager, torch.full_like(eager, 1.0), None)[0] == inf


def test_a_model_that_cannot_be_exported_runs_as_it_is_and_is_refused_to_a_named_engine() -> None:
    made = GPU.optimize_for_inference(Peeking(), torch.ones(2, 2), calls=10)
    assert made.engine == "eager" and torch.equal(made(torch.ones(2, 2)), torch.full((2, 2), 2.0))
    assert outcome(made, "aot_inductor").problem
    with pytest.raises(ConfigError, match=r"no engine takes Peeking \(onnx_runtime: .*\); expected a model"):
        GPU.optimize_for_inference(Peeking(), torch.ones(2, 2), engines=["onnx_runtime"])
    with pytest.raises(ConfigError, match="inference engine 'tflite'; expected one of aot_inductor"):
        GPU.optimize_for_inference(Peeking(), torch.ones(2, 2), engines=["tflite"])


def test_an_engine_that_is_not_installed_says_how_to_get_it(
    net: Net, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        inference_engines.importlib.util,
        "find_spec",
        lambda name: None if name == "onnxruntime" else object(),
    )
    with pytest.raises(inference_engines.EngineRefused, match=r"onnxruntime is not installed: pip install"):
        inference_engines.onnx_runtime(net.eval(), (torch.randn(4, 6),), None, tmp_path)
    net.train()


@pytest.mark.slow
def test_a_gpt_is_served_by_an_engine_that_agrees() -> None:
    torch.manual_seed(0)
    model = ByteGPT(SIZES["nano"])
    nn.init.normal_(model.head.weight, std=0.1)
    tokens = torch.randint(0, 256, (2, 64))
    made = GPU.optimize_for_inference(model, tokens, engines=["onnx_runtime"], calls=20)
    assert outcome(made, "onnx_runtime").problem is None
    torch.testing.assert_close(made(tokens), model.eval()(tokens), rtol=1e-3, atol=1e-3)
