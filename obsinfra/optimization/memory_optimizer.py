"""The memory optimiser: recovery from a lack of memory, guard of host memory, garbage collection, and tools.

`create_memory_optimizer` makes one for any loop; the trainer uses the same. Each part lives in a module of
its own beside this one, and a part that is off is an object that does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from obsinfra.errors import ConfigError, UserError
from obsinfra.monitoring.instruments import Instruments
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.training_monitor import TrainingMonitor
from obsinfra.optimization.activation_checkpointing import checkpoint_activations
from obsinfra.optimization.arguments import flag, function, number, one_of, shown, whole_number
from obsinfra.optimization.data_loading import (
    create_memory_efficient_dataloader as create_memory_efficient_dataloader,
)
from obsinfra.optimization.gc_schedule import create_gc_schedule
from obsinfra.optimization.host_guard import HostGuard, NoGuard, host_memory
from obsinfra.optimization.kept_pages import WantedPages, keep_freed_pages
from obsinfra.optimization.leak_detection import Growing, LeakDetector, LeakWatch, NoLeakWatch
from obsinfra.optimization.memory_advice import Recommendation, memory_info, recommendations
from obsinfra.optimization.memory_profiler import MemoryProfile, MemoryProfiler
from obsinfra.optimization.micro_batching import MicroBatching, Share
from obsinfra.optimization.model_checks import check_module
from obsinfra.optimization.oom_recovery import (
    Agreement,
    LoggedTelemetry,
    MonitoredTelemetry,
    NoRecovery,
    OutOfMemoryRecovery,
    StepRunner,
    Telemetry,
)
from obsinfra.optimization.precision import choose_device
from obsinfra.optimization.reclaim import cuda_in_use, free_memory

Result = TypeVar("Result")

HISTORY_ENTRIES = 100_000
"""Allocations and frees kept for a snapshot of a CUDA device."""


def create_memory_optimizer(
    max_memory_percent: float = 85.0,
    *,
    oom_recovery: bool = True,
    micro_batch: int | None = None,
    splittable: bool = True,
    gc: Literal["python", "boundary"] = "python",
    gradient_checkpointing: bool = False,
    leak_check_steps: int = 0,
    keep_freed_pages: WantedPages = "auto",
    profile: bool = True,
    device: torch.device | str | None = None,
    agreement: Agreement | None = None,
) -> MemoryOptimizer:
    """A memory optimiser for one training loop.

    Args:
        max_memory_percent: host memory in use, against the container's limit if that is nearer, beyond which
            the guard gives memory back; 0: no guard.
        oom_recovery: do a step that ran out of memory again in smaller micro-batches.
        micro_batch: rows of one forward pass at most, from the start; None: whole batches.
        splittable: False where a batch's loss is not the mean over its rows; its batches are never cut.
        gc: when Python's garbage is collected: `python`: anywhere; `boundary`: between two steps.
        gradient_checkpointing: have `optimize_for_training` recompute activations block by block.
        leak_check_steps: look for tensors that become more, every so many steps; 0: never.
        keep_freed_pages: `optimize_for_training` has the C library keep the pages of freed memory for the
            next step, for the whole process and for good: `on`, `off`, or `auto`: where the model is on the
            CPU.
        profile: False makes every `memory_profiler` block free.
        device: whose allocator is meant; the model's by default.
        agreement: of all ranks about failures; None: this process alone.

    Raises:
        ConfigError: a value out of its range, or a device that is not there.
    """
    number("max_memory_percent", max_memory_percent, least=0, most=100)
    if micro_batch is not None:
        micro_batch = whole_number("micro_batch", micro_batch, least=1)
    one_of("gc", gc, ("python", "boundary"))
    whole_number("leak_check_steps", leak_check_steps, least=0)
    one_of("keep_freed_pages", keep_freed_pages, get_args(WantedPages))
    for name, value in (
        ("oom_recovery", oom_recovery),
        ("splittable", splittable),
        ("gradient_checkpointing", gradient_checkpointing),
        ("profile", profile),
    ):
        flag(name, value)
    if agreement is not None and not isinstance(agreement, Agreement):
        raise ConfigError(
            f"agreement {shown(agreement)}",
            "an object with passed, agree and largest (oom_recovery.Agreement)",
            "leave it out in a run of one process",
        )
    return MemoryOptimizer(
        max_memory_percent,
        MicroBatching(micro_batch, splittable=splittable),
        recovers=oom_recovery,
        gc=gc,
        gradient_checkpointing=gradient_checkpointing,
        leak_check_steps=leak_check_steps,
        keep_pages=keep_freed_pages,
        profile=profile,
        device=None if device is None else choose_device(device),
        agreement=agreement,
    )


class MemoryOptimizer:
    """Made by `create_memory_optimizer`.

    Attributes:
        micro_batching: the size of micro-batches in force; belongs into every checkpoint.
        recovers: whether a step that ran out of memory is done again.
        guard: of host memory; watches within `watching`.
        gc: when garbage is collected.
        leaks: what has been growing.
        profiler: of `memory_profiler`; has the profiles.
    """

    def __init__(
        self,
        max_memory_percent: float,
        micro_batching: MicroBatching,
        *,
        recovers: bool,
        gc: str,
        gradient_checkpointing: bool,
        leak_check_steps: int,
        keep_pages: WantedPages,
        profile: bool,
        device: torch.device | None,
        agreement: Agreement | None,
    ) -> None:
        self.micro_batching = micro_batching
        self.recovers = recovers
        self.max_memory_percent = max_memory_percent
        self.guard: HostGuard | NoGuard = NoGuard()
        self.gc = create_gc_schedule(gc)
        self.leaks = LeakWatch(leak_check_steps) if leak_check_steps else NoLeakWatch()
        self.profiler = MemoryProfiler(enabled=profile)
        self._gradient_checkpointing = gradient_checkpointing
        self._keep_pages = keep_pages
        self._model: nn.Module | None = None
        self._device, self._agreement = device, agreement
        self._steps: StepRunner = NoRecovery(micro_batching)
        self._telemetry: Telemetry = self._steps.telemetry
        self._watching = False

    def optimize_for_training(self, model: nn.Module) -> nn.Module:
        """Prepare for training `model`: steps of `run` are for it from now on.

        Activations are recomputed from now on where that was asked for, and pages kept; gradients it may have
        are dropped.

        Args:
            model: every module whose parameters get gradients in a step: of several, an `nn.ModuleList` of
                them. A step is taken back in these alone.

        Returns:
            The model itself.

        Raises:
            ConfigError: it is no module, has lazy buffers, its activations cannot be recomputed block by
                block, or pages cannot be kept.
        """
        check_module(model)
        if self.recovers and any(is_lazy(buffer) for buffer in model.buffers()):
            raise ConfigError(
                f"a {type(model).__name__} with lazy buffers, whose values before a step cannot be noted",
                "a model that knows its shapes",
                "call it once on a batch before",
            )
        if self._gradient_checkpointing:
            checkpoint_activations(model)
        model.zero_grad(set_to_none=True)
        self._model = model
        first = next(iter(model.parameters()), None)
        device = self._device or (first.device if first is not None else torch.device("cpu"))
        kept, reason = keep_freed_pages(self._keep_pages, device)
        get_logger("training").info("freed_pages", kept=kept, reason=reason, terminal=False)
        if self.recovers:
            self._steps = OutOfMemoryRecovery(model, self.micro_batching, device, self._agreement)
            self._steps.telemetry = self._telemetry
        return model

    def run(self, step: int, batches: Sequence[Any], attempt: Callable[[Sequence[Share]], Result]) -> Result:
        """The forward and backward passes of one step, done again in smaller shares if memory runs out.

        A repetition drops the gradients of the model given to `optimize_for_training` and puts its buffers
        and the random states back, so that one call must be all of a step's passes: give the batches that
        gradients are to be accumulated over together. What else `attempt` changes, it changes twice.

        Args:
            step: for what is reported.
            batches: of this step, a list; its gradient is the mean over all their rows, each batch's loss
                being the mean over its own.
            attempt: called with the shares of the batches: forward and backward pass of each, its loss times
                its weight. Called again with smaller ones after it ran out of memory.

        Returns:
            What `attempt` returned.

        Raises:
            MemoryExhaustedError: not even one row at a time fits, or a repetition would lose the gradients
                of an earlier call, which no optimizer step has used.
            ConfigError: recovery is on and `optimize_for_training` was not called, so that nothing is known
                of what a step has to put back; no list of batches; or, after a repetition, a parameter of
                another module than that model has the gradients of both attempts.
        """
        if not isinstance(batches, list) or not batches:  # of a tuple nobody knows whether it is one batch
            raise ConfigError(
                f"batches {shown(batches)}",
                "a list of one or more batches",
                "write run(step, [batch], passes)",
            )
        if self.recovers and self._model is None:
            raise ConfigError(
                "run of a memory optimizer that knows no model",
                "optimize_for_training(model) before the first step",
                "call it, or create the optimizer with oom_recovery=False",
            )
        if not callable(attempt):
            function("attempt", attempt, "a function of the shares, with their forward and backward passes")
        return self._steps.run(step, batches, attempt)

    def step_done(self) -> None:
        """Call it after each step, outside of what is timed as the step."""
        self.gc.step_done()
        self.leaks.step_done()

    @contextmanager
    def watching(self, monitor: TrainingMonitor | None = None, batch_size: int = 0) -> Iterator[None]:
        """Around the training: the guard watches, garbage is collected by schedule.

        Args:
            monitor: shows metrics and spans; None: log events alone.
            batch_size: rows of a batch that is not split, for the metric.

        Raises:
            ConfigError: it is watching already, or another optimizer of this process collects garbage.
        """
        if monitor is not None and not isinstance(monitor, TrainingMonitor):
            raise ConfigError(f"a monitor {shown(monitor)}", "a TrainingMonitor", "give run.monitor, or None")
        whole_number("batch_size", batch_size, least=0)
        if self._watching:
            raise ConfigError(
                "watching within watching", "one block around the whole training", "leave out the inner one"
            )
        with self.gc:
            self._watching = True
            try:
                with self._guarded(monitor, batch_size):
                    yield
            finally:
                self._watching = False

    @contextmanager
    def _guarded(self, monitor: TrainingMonitor | None, batch_size: int) -> Iterator[None]:
        instruments = monitor.instruments if monitor is not None else Instruments()
        self.gc.instruments = self.leaks.instruments = instruments
        if monitor is not None:
            self._telemetry = MonitoredTelemetry(monitor, batch_size, self.micro_batching.limit)
            self._steps.telemetry = self._telemetry
        if self.max_memory_percent:
            self.guard = HostGuard(self.max_memory_percent, instruments=instruments)
        self.guard.start()
        try:
            yield
        finally:
            self.guard.stop()
            self._telemetry = self._steps.telemetry = LoggedTelemetry()

    def optimize_memory(self) -> dict[str, Any]:
        """Collect garbage and give caches back; bytes held before and after, and what was freed."""
        return free_memory()

    def memory_profiler(self, name: str, *, python_top: int = 0) -> AbstractContextManager[MemoryProfile]:
        """A context manager that measures what its block does to memory, for the log and `profiler.profiles`.

        Args:
            name: of the block; blocks nest, and an inner one is called `outer/inner`.
            python_top: lines of Python listed whose allocations grew most; slows the block down severalfold.
        """
        whole_number("python_top", python_top, least=0)
        return self.profiler.block(str(name), python_top=python_top)

    def get_memory_info(self) -> dict[str, Any]:
        """Host, process, devices, model, micro-batch and what is foreseen; bytes where a name ends so."""
        forecasts = self.guard.forecasts if isinstance(self.guard, HostGuard) else {}
        return memory_info(host_memory(), forecasts, self.micro_batching, self._model, self._steps.recoveries)

    def get_memory_recommendations(self) -> list[Recommendation]:
        """What could be changed, the most pressing first, each with its numbers and its setting."""
        return recommendations(self.get_memory_info(), self.max_memory_percent)

    def leak_detector(self, *, looks: int = 4, least_bytes: int = 2**20) -> LeakDetector:
        """A detector to look with by hand; see `leak_check_steps` for one that looks by itself.

        Raises:
            ConfigError: fewer than two looks, or a size below 0.
        """
        return LeakDetector(looks=looks, least_bytes=least_bytes)

    @property
    def growing(self) -> list[Growing]:
        """Kinds of tensors that grew at each of the last looks."""
        return self.leaks.growing

    @contextmanager
    def cuda_memory_snapshot(self, path: Path | str, *, entries: int = HISTORY_ENTRIES) -> Iterator[None]:
        """Record every allocation of the block and write them to `path`, for https://pytorch.org/memory_viz.

        Also when the block raises, so that running out of memory can be looked at.

        Raises:
            UserError: CUDA is not in use, or entries below 1.
            OSError: the file cannot be written.
        """
        whole_number("entries", entries, least=1)
        if not cuda_in_use():
            raise UserError(
                "a CUDA memory snapshot where CUDA is not in use",
                "a CUDA device that this process has used",
                "use get_memory_info; `obsinfra command RUN memory_snapshot` lists tensors of the host",
            )
        torch.cuda.memory._record_memory_history(max_entries=entries)
        try:
            yield
        finally:
            try:
                torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
            finally:
                torch.cuda.memory._record_memory_history(enabled=None)
