"""optimize_for_inference: a trained model is given to several engines; the fastest that agrees is kept.

Called through `gpu_optimizer`, or alone. The engines themselves are in `inference_engines`.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from obsinfra.catalog import metrics as catalog
from obsinfra.errors import ConfigError, first_line
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.sample import Sample
from obsinfra.monitoring.training_monitor import TrainingMonitor
from obsinfra.optimization.arguments import number, shown, whole_number
from obsinfra.optimization.inference_engines import ENGINES, EngineRefused
from obsinfra.optimization.model_checks import copied
from obsinfra.optimization.timing import wait_for_device

EAGER = "eager"
DEFAULT_ENGINES = ("aot_inductor", "onnx_runtime", "tensorrt")
"""TorchScript, deprecated, is tried only when asked for."""

QUANTILES = (0.5, 0.95, 0.99)

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""How far an engine's output may be from eager's, relative to its largest value."""


@dataclass(frozen=True, slots=True)
class EngineResult:
    """What came of one engine.

    Attributes:
        engine: its name; `eager` is the model itself.
        problem: why it is not used; None where it could be.
        difference: largest distance of an output from eager's ÷ eager's largest value; None without a run.
        latency: seconds by quantile (0.5, 0.95, 0.99) on the example.
    """

    engine: str
    problem: str | None = None
    difference: float | None = None
    latency: Mapping[float, float] | None = None


class InferenceModel:
    """A model for inference: called like the model it was made of, in the fastest engine that agrees with it.

    Inputs of another form than the example's go to the model itself; that is counted, and logged once.

    Attributes:
        engine: in use.
        results: what came of every engine, eager first.
        fallbacks: calls that went to the model itself instead.
        folder: where the engines' files are.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[..., Any],
        results: Sequence[EngineResult],
        engine: str,
        form: Callable[[tuple[Any, ...]], Any],
        example: tuple[Any, ...],
        folder: Path,
        keep: object,
    ) -> None:
        self.engine, self.results, self.folder = engine, tuple(results), folder
        self.fallbacks = 0
        self._model, self._run = model, run
        self._form, self._wanted = form, form(example)
        self._keep = keep  # a temporary folder lives as long as what was loaded from it
        self._lock = threading.Lock()
        self._timed: Callable[[], Any] = _Untimed
        self._log = get_logger("performance")

    def __call__(self, *args: Any) -> Any:
        """Outputs for these inputs; no gradients."""
        with torch.inference_mode(), self._timed():
            if self._form(args) == self._wanted:
                return self._run(*args)
            self._note_fallback(args)
            return self._model(*args)

    @property
    def latency(self) -> Mapping[float, float]:
        """Seconds by quantile of the engine in use, as measured on the example."""
        found = next(result.latency for result in self.results if result.engine == self.engine)
        assert found is not None
        return found

    def watch(self, monitor: TrainingMonitor) -> None:
        """Export what was measured, and the latency of every call from now on."""
        self._timed = monitor.inference
        monitor.add_source(self.samples)

    def samples(self) -> list[Sample]:
        """Metrics as of now."""
        out = [Sample(catalog.INFERENCE_FALLBACKS, {}, float(self.fallbacks))]
        for result in self.results:
            for quantile, seconds in (result.latency or {}).items():
                labels = {"engine": result.engine, "quantile": f"{quantile:g}"}
                out.append(Sample(catalog.INFERENCE_ENGINE_LATENCY_SECONDS, labels, seconds))
        return out

    def _note_fallback(self, args: tuple[Any, ...]) -> None:
        with self._lock:
            self.fallbacks += 1
            first = self.fallbacks == 1
        if first:
            self._log.warning(
                "inference_fell_back",
                engine=self.engine,
                made_for=str(self._wanted),
                got=str(self._form(args)),
                then="the model itself runs; such calls are counted",
            )


def optimize_for_inference(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    *,
    engines: Sequence[str] | None = None,
    dynamic_batch: bool = False,
    tolerance: float | None = None,
    calls: int = 200,
    seconds: float = 5.0,
    folder: Path | None = None,
) -> InferenceModel:
    """Give a model to every engine, check that each agrees with it, measure, and keep the fastest.

    Args:
        model: on its device, in its precision. Stays as it is; later changes to it do not reach the engine.
        example: its inputs, of the shapes that will come.
        engines: names of `inference_engines.ENGINES` to try; default: AOTInductor, ONNX Runtime, TensorRT.
        dynamic_batch: the first dimension of every tensor may be any size from 2 on; the example's is one.
        tolerance: largest difference allowed, relative to the largest value; default: by precision.
        calls: timed calls of each engine, in turns.
        seconds: all of these at most.
        folder: where the engines' files are kept (`model.pt2`, `model.onnx`, `model.ts`), for use elsewhere;
            default: they go with the returned object.

    Raises:
        ConfigError: an unknown engine, none of those named takes the model (it says why for each), the model
            does not run on the example, or a value out of its range.
    """
    whole_number("calls", calls, least=1)
    number("seconds", seconds, above=0)
    if tolerance is not None:
        number("tolerance", tolerance, least=0)
    if engines is not None and not (isinstance(engines, (list, tuple)) and engines):
        raise ConfigError(
            f"engines {shown(engines)}", f"a list of {', '.join(ENGINES)}, or None", "leave it out for all"
        )
    if folder is not None and not isinstance(folder, (str, Path)):
        raise ConfigError(f"folder {shown(folder)}", "a path, or None", "correct it")
    args = example if isinstance(example, tuple) else (example,)
    names = tuple(engines) if engines is not None else DEFAULT_ENGINES
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise ConfigError(f"inference engine {unknown[0]!r}", f"one of {', '.join(ENGINES)}", "correct it")
    temporary = tempfile.TemporaryDirectory(prefix="obsinfra-inference-") if folder is None else None
    place = Path(temporary.name) if temporary else Path(folder or ".")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"folder {str(place)!r}: {error.strerror}", "a folder, or None", "name another"
        ) from error
    original = copied(model).eval().requires_grad_(False)
    shapes = _dynamic(args) if dynamic_batch else None
    device = _device(original, args)
    expected = _eager(original, args)
    runs: dict[str, Callable[..., Any]] = {EAGER: original}
    results = {EAGER: EngineResult(EAGER, difference=0.0)}
    for name in names:
        results[name], run = _try(name, original, args, shapes, place, expected, tolerance)
        if run is not None:
            runs[name] = run
    with torch.inference_mode():
        for name, latency in _latencies(runs, args, device, calls, seconds).items():
            results[name] = replace(results[name], latency=latency)
    best = min(runs, key=lambda name: (results[name].latency or {})[0.5])
    log = get_logger("performance")
    for result in results.values():
        log.info(
            "inference_engine",
            engine=result.engine,
            chosen=result.engine == best,
            problem=result.problem,
            difference=result.difference,
            **{f"p{q * 100:g}_ms": round(s * 1e3, 4) for q, s in (result.latency or {}).items()},
        )
    if engines is not None and len(runs) == 1:
        said = "; ".join(f"{name}: {results[name].problem}" for name in names)
        raise ConfigError(
            f"no engine takes {type(model).__name__} ({said})",
            "a model that one of those named takes",
            "name others, or leave engines out to go on with the model itself where none does",
        )

    def form(given: tuple[Any, ...]) -> Any:
        return tuple(_form(leaf, dynamic_batch) for leaf in pytree.tree_leaves(given))

    return InferenceModel(original, runs[best], [*results.values()], best, form, args, place, temporary)


def _eager(model: nn.Module, args: tuple[Any, ...]) -> Any:
    """What the model itself says to the example."""
    try:
        with torch.inference_mode():
            return model(*args)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{type(model).__name__} does not run on the example: {first_line(error, 200)}",
            "inputs as the model takes them, a tuple of several",
            "correct the example",
        ) from error


def _try(
    name: str,
    model: nn.Module,
    args: tuple[Any, ...],
    shapes: Any,
    folder: Path,
    expected: Any,
    tolerance: float | None,
) -> tuple[EngineResult, Callable[..., Any] | None]:
    """One engine: built, run on the example, compared."""
    try:
        run = ENGINES[name](model, args, shapes, folder)
        with torch.inference_mode():
            got = run(*args)
    except EngineRefused as refused:
        return EngineResult(name, str(refused)), None
    except Exception as error:  # engines raise what they like; whatever it is, the model itself still works
        return EngineResult(name, f"{type(error).__name__}: {first_line(error, 200)}"), None
    difference, allowed = _difference(expected, got, tolerance)
    if not difference <= allowed:
        problem = f"differs from eager by {difference:.2g}, more than {allowed:g}"
        return EngineResult(name, problem, difference), None
    return EngineResult(name, None, difference), run


def _difference(expected: Any, got: Any, tolerance: float | None) -> tuple[float, float]:
    """Largest relative distance over all outputs, and what is allowed; infinite where their form differs."""
    mine, theirs = pytree.tree_leaves(expected), pytree.tree_leaves(got)
    worst, allowed = 0.0, tolerance if tolerance is not None else 0.0
    if len(mine) != len(theirs):
        return float("inf"), allowed
    for left, right in zip(mine, theirs, strict=True):
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            continue
        if tolerance is None:
            allowed = max(allowed, TOLERANCE.get(left.dtype, 0.0))
        if left.shape != right.shape:
            return float("inf"), allowed
        if left.numel():
            a, b = left.double(), right.to(left.device).double()
            # What is equal is no distance, infinities (of masked logits) included; they are no scale either.
            distance = float(torch.where(a == b, 0.0, (a - b).abs()).max())
            scale = max(float(torch.where(a.isfinite(), a.abs(), 0.0).max()), torch.finfo(torch.float32).tiny)
            worst = max(worst, distance / scale if distance == distance else float("inf"))
    return worst, allowed


def _latencies(
    runs: Mapping[str, Callable[..., Any]],
    args: tuple[Any, ...],
    device: torch.device,
    calls: int,
    seconds: float,
) -> dict[str, dict[float, float]]:
    """Quantiles of single calls, the engines in turns; at least ten calls of each."""
    for run in runs.values():
        for _ in range(3):
            run(*args)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for done in range(calls):
        if done >= 10 and time.perf_counter() - began > seconds:
            break
        for name, run in runs.items():
            wait_for_device(device)
            started = time.perf_counter()
            run(*args)
            wait_for_device(device)
            taken[name].append(time.perf_counter() - started)
    return {name: {q: _quantile(sorted(values), q) for q in QUANTILES} for name, values in taken.items()}


def _quantile(ordered: list[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def _dynamic(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """torch.export's word for: the first dimension of every tensor may vary."""
    varying = {0: torch.export.Dim.DYNAMIC}
    return tuple(
        pytree.tree_map(lambda leaf: varying if isinstance(leaf, Tensor) and leaf.dim() else None, arg)
        for arg in args
    )


def _form(leaf: Any, dynamic_batch: bool) -> Any:
    """What an engine's code depends on: shape, type and device of a tensor, or the value of anything else."""
    if not isinstance(leaf, Tensor):
        return leaf
    shape: tuple[Any, ...] = tuple(leaf.shape)
    if dynamic_batch and shape and shape[0] >= 2:  # an exported graph has sizes 0 and 1 apart
        shape = ("any", *shape[1:])
    return shape, str(leaf.dtype), str(leaf.device)


def _device(model: nn.Module, args: tuple[Any, ...]) -> torch.device:
    tensors = [*model.parameters(), *(leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor))]
    return tensors[0].device if tensors else torch.device("cpu")


class _Untimed:
    """Times nothing."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass
