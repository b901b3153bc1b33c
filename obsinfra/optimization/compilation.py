"""torch.compile that never costs a run: what cannot be compiled runs eagerly, counted, logged, and exported.

`gpu_optimizer` (and so the trainer) compiles through here. Knows no training loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from obsinfra.catalog import metrics as catalog
from obsinfra.errors import ConfigError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.sample import Sample
from obsinfra.optimization.oom_recovery import is_out_of_memory

Wanted = Literal["auto", "on", "off"]
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
Compiler = Callable[..., Any]

CAUSES = ("backend", "tracing", "variants")
"""Why something runs eagerly: the compiler failed on a graph, the tracer on Python code, or there were more
kinds of input than are kept compiled."""


class Compilation:
    """What became of compiling one module.

    Attributes:
        graphs: graphs compiled, recompilations included.
        seconds: time the loop waited for the compiler.
        recompiles: graphs compiled again because an input or the model was of another kind.
        fallbacks: by cause, how often eager execution was the way out.
        reason: why nothing is compiled, for the log; None where it is.
    """

    def __init__(self, reason: str | None = None) -> None:
        self.graphs = 0
        self.seconds = 0.0
        self.recompiles = 0
        self.fallbacks = dict.fromkeys(CAUSES, 0)
        self.reason = reason
        self._breaks_before = _graph_breaks() if reason is None else 0

    @property
    def graph_breaks(self) -> int:
        """Places at which the tracer had to go back to Python since this module was compiled, as torch counts
        them for the whole process."""
        return _graph_breaks() - self._breaks_before if self.reason is None else 0

    def samples(self) -> list[Sample]:
        """The counters of this module."""
        return [
            Sample(catalog.COMPILE_GRAPHS, {}, float(self.graphs)),
            Sample(catalog.COMPILE_SECONDS, {}, self.seconds),
            Sample(catalog.COMPILE_RECOMPILES, {}, float(self.recompiles)),
            Sample(catalog.COMPILE_GRAPH_BREAKS, {}, float(self.graph_breaks)),
            *(
                Sample(catalog.COMPILE_FALLBACKS, {"cause": cause}, float(count))
                for cause, count in self.fallbacks.items()
            ),
        ]


def compile_model(
    model: nn.Module,
    wanted: Wanted | bool,
    device: torch.device,
    *,
    mode: Mode = "default",
    backend: str | Compiler = "inductor",
) -> Compilation:
    """Compile `model` in place where `wanted` is `on`, or `auto` on a CUDA device.

    In place (`Module.compile`), so names of parameters and state_dict stay the user's. Compiling happens at
    the first calls. A graph on which the compiler fails runs as it was captured, uncompiled; a module that
    the tracer itself fails on runs as if nobody had compiled it. Both are counted and logged. With `on` the
    first graph must compile: whoever asked for it hears of it before the first step is over.

    Args:
        model: any module. A bare layer of `torch.nn` stays uncompiled: torch skips its own code.
        wanted: `True` means `on`, `False` means `off`.
        device: where it runs.
        mode: of torch.compile. `reduce-overhead` records CUDA graphs.
        backend: a name torch.compile knows, or a compiler of one's own.

    Raises:
        ConfigError: `mode` is none, or is asked of a backend without modes. At the first call with `on`: the
            model cannot be compiled.
    """
    if isinstance(wanted, bool):
        wanted = "on" if wanted else "off"
    if wanted == "off":
        return Compilation("off, as asked")
    if wanted == "auto" and device.type != "cuda":
        return Compilation(f"off: rarely pays on {device.type}; ask for it with on")
    compilation = Compilation()
    graphs = _Graphs(compilation, _compiler(backend, mode), required=wanted == "on", model=model)
    model.compile(backend=graphs)
    compiled = model._compiled_call_impl
    assert compiled is not None
    model._compiled_call_impl = _calls(model, compiled, compilation, required=wanted == "on")
    return compilation


class _Graphs:
    """The backend given to torch.compile: the real one, with a way out. Called once per captured graph."""

    compiler_name = "inductor"  # what torch's own messages call it

    def __init__(
        self, compilation: Compilation, compiler: Compiler, *, required: bool, model: nn.Module
    ) -> None:
        self._compilation, self._compiler = compilation, compiler
        self._required, self._name = required, type(model).__name__
        self._log = get_logger("training")

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        counts = self._compilation
        self._note_variant()
        started = time.perf_counter()
        try:
            with _backward_at_once():
                compiled: Callable[..., Any] = self._compiler(graph, inputs)
        except Exception as error:
            if is_out_of_memory(error) or _wants_another_attempt(error):
                raise
            if self._required and counts.graphs == 0:
                raise _refusal(self._name, error) from error
            counts.fallbacks["backend"] += 1
            self._log.warning(
                "compile_fell_back",
                model=self._name,
                cause="backend",
                then="this part of the model runs eagerly",
                problem=_first_line(error),
            )
            return graph.forward
        finally:
            counts.seconds += time.perf_counter() - started
        counts.graphs += 1
        return compiled

    def _note_variant(self) -> None:
        """Count a recompilation, and say so when torch will not compile a further kind of input."""
        here = torch._guards.CompileContext.current_compile_id()
        number = getattr(here, "frame_compile_id", None) or 0
        if number == 0:
            return
        self._compilation.recompiles += 1
        if number + 1 == torch._dynamo.config.recompile_limit:
            self._compilation.fallbacks["variants"] += 1
            self._log.warning(
                "compile_fell_back",
                model=self._name,
                cause="variants",
                then="further kinds of input run eagerly",
                problem=f"compiled for {number + 1} kinds of input, as many as torch keeps; pad them to "
                "fewer shapes, or raise torch._dynamo.config.recompile_limit",
            )

    def get_compiler_config(self) -> Any:
        """What the real backend was configured with, for torch's caches."""
        told = getattr(self._compiler, "get_compiler_config", None)
        return told() if told is not None else {}

    def reset(self) -> None:
        """`torch.compiler.reset()`."""
        forget = getattr(self._compiler, "reset", None)
        if forget is not None:
            forget()


def _calls(
    model: nn.Module, compiled: Callable[..., Any], compilation: Compilation, *, required: bool
) -> Callable[..., Any]:
    """The module's call: compiled until the tracer fails on it, eager from then on."""
    from torch._dynamo.exc import TorchDynamoException

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            root = _root(error)
            if isinstance(root, ConfigError) or is_out_of_memory(root):
                raise root from None
            if required and compilation.graphs == 0:
                raise _refusal(type(model).__name__, error) from error
            compilation.fallbacks["tracing"] += 1
            get_logger("training").warning(
                "compile_fell_back",
                model=type(model).__name__,
                cause="tracing",
                then="the model runs eagerly",
                problem=_first_line(error),
            )
        model._compiled_call_impl = None
        return model(*args, **kwargs)

    return call


def _compiler(backend: str | Compiler, mode: str) -> Compiler:
    """The compiler itself, with its mode."""
    if callable(backend):
        if mode != "default":
            raise ConfigError(f"compile mode {mode!r} for a backend of one's own", "default", "drop the mode")
        return backend
    if backend == "inductor":
        modes = list(torch._inductor.list_mode_options())
        if mode not in modes:
            raise ConfigError(f"compile mode {mode!r}", f"one of {', '.join(modes)}", "correct the mode")
        wrapper: Compiler = torch._TorchCompileInductorWrapper(mode, None, None)  # type: ignore[no-untyped-call]
        return wrapper
    if mode != "default":
        raise ConfigError(f"compile mode {mode!r} for the backend {backend}", "default", "drop the mode")
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.exc import InvalidBackend

    try:
        found: Compiler = lookup_backend(backend)
    except InvalidBackend:
        raise ConfigError(
            f"compile backend {backend!r}",
            f"one of {', '.join(torch._dynamo.list_backends())}",
            "correct the backend",
        ) from None
    return found


def _refusal(name: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"{name} cannot be compiled: {_first_line(error)}",
        "a model that torch.compile takes",
        "--compile off, or auto, which goes on eagerly",
    )


def _backward_at_once() -> AbstractContextManager[object]:
    """Have the backward graph compiled with the forward one: if it fails later, nobody can catch it.

    An older torch cannot be told; there some backward graphs are still compiled when first used.
    """
    from torch._functorch import config

    if not hasattr(config, "force_non_lazy_backward_lowering"):
        return nullcontext()
    patched: AbstractContextManager[object] = config.patch(force_non_lazy_backward_lowering=True)
    return patched


def _wants_another_attempt(error: Exception) -> bool:
    """Whether torch speaks to itself: it traces again, in another way."""
    from torch._dynamo.exc import RestartAnalysis

    return isinstance(error, RestartAnalysis)


def _graph_breaks() -> int:
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def _root(error: BaseException) -> BaseException:
    """What torch has wrapped."""
    inner = getattr(error, "inner_exception", None) or error.__cause__
    return inner if isinstance(inner, BaseException) else error


def _first_line(error: BaseException) -> str:
    """Class and message of what went wrong at the root, on one line."""
    root = _root(error)
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    return f"{type(root).__name__}: {lines[0] if lines else ''}"[:300]
