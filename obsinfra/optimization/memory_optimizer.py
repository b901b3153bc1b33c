"""The memory optimiser: recovery from a lack of memory, guard of host memory, garbage collection, and tools.

`create_memory_optimizer` makes one for any loop; the trainer uses the same. Each part lives in a module of
its own beside this one, and a part that is off is an object that does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from obsinfra.errors import ConfigError, UserError
from obsinfra.monitoring.instruments import Instruments
from obsinfra.monitoring.training_monitor import TrainingMonitor
from obsinfra.optimization.activation_checkpointing import checkpoint_activations
from obsinfra.optimization.data_loading import (
    create_memory_efficient_dataloader as create_memory_efficient_dataloader,
)
from obsinfra.optimization.gc_schedule import create_gc_schedule
from obsinfra.optimization.host_guard import HostGuard, NoGuard, host_memory
from obsinfra.optimization.leak_detection import Growing, LeakDetector, LeakWatch, NoLeakWatch
from obsinfra.optimization.memory_advice import Recommendation, memory_info, recommendations
from obsinfra.optimization.memory_profiler import MemoryProfile, MemoryProfiler
from obsinfra.optimization.micro_batching import MicroBatching, Share
from obsinfra.optimization.oom_recovery import (
    Agreement,
    LoggedTelemetry,
    MonitoredTelemetry,
    NoRecovery,
    OutOfMemoryRecovery,
    StepRunner,
)
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
    gc: Literal["boundary", "python"] = "boundary",
    gradient_checkpointing: bool = False,
    leak_check_steps: int = 0,
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
        splittable: False where a batch's loss is not the mean over its rows.
        gc: when Python's garbage is collected: between two steps, or anywhere.
        gradient_checkpointing: have `optimize_for_training` recompute activations block by block.
        leak_check_steps: look for tensors that become more, every so many steps; 0: never.
        profile: False makes every `memory_profiler` block free.
        device: whose allocator is meant; the model's by default.
        agreement: of all ranks about failures; None: this process alone.

    Raises:
        ConfigError: a value out of its range.
    """
    if not 0.0 <= max_memory_percent <= 100.0:
        raise ConfigError(f"max_memory_percent {max_memory_percent}", "0 to 100", "correct it; 85 is usual")
    if micro_batch is not None and not (isinstance(micro_batch, int) and micro_batch >= 1):
        raise ConfigError(
            f"micro_batch {micro_batch!r}", "a whole number of at least 1, or None", "correct it"
        )
    if gc not in ("boundary", "python"):
        raise ConfigError(f"gc {gc!r}", "boundary or python", "correct it")
    if leak_check_steps < 0:
        raise ConfigError(f"leak_check_steps {leak_check_steps}", "0 or more", "correct it")
    return MemoryOptimizer(
        max_memory_percent,
        MicroBatching(micro_batch, splittable=splittable),
        recovers=oom_recovery,
        gc=gc,
        gradient_checkpointing=gradient_checkpointing,
        leak_check_steps=leak_check_steps,
        profile=profile,
        device=None if device is None else torch.device(device),
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
        self._model: nn.Module | None = None
        self._device, self._agreement = device, agreement
        self._steps: StepRunner = NoRecovery(micro_batching)

    def optimize_for_training(self, model: nn.Module) -> nn.Module:
        """Prepare for training `model`: steps of `run` are for it from now on.

        Activations are recomputed from now on where that was asked for; gradients it may have are dropped.

        Returns:
            The model itself.

        Raises:
            ConfigError: its activations cannot be recomputed block by block.
        """
        if self._gradient_checkpointing:
            checkpoint_activations(model)
        model.zero_grad(set_to_none=True)
        self._model = model
        if self.recovers:
            first = next(iter(model.parameters()), None)
            device = self._device or (first.device if first is not None else torch.device("cpu"))
            self._steps = OutOfMemoryRecovery(model, self.micro_batching, device, self._agreement)
        return model

    def run(self, step: int, batches: Sequence[Any], attempt: Callable[[Sequence[Share]], Result]) -> Result:
        """The forward and backward passes of one step; see `OutOfMemoryRecovery.run`.

        Raises:
            MemoryExhaustedError: not even one row at a time fits.
            ConfigError: recovery is on and `optimize_for_training` was not called, so that nothing is known
                of what a step has to put back.
        """
        if self.recovers and self._model is None:
            raise ConfigError(
                "run of a memory optimizer that knows no model",
                "optimize_for_training(model) before the first step",
                "call it, or create the optimizer with oom_recovery=False",
            )
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
        """
        instruments = monitor.instruments if monitor is not None else Instruments()
        self.gc.instruments = self.leaks.instruments = instruments
        if monitor is not None:
            self._steps.telemetry = MonitoredTelemetry(monitor, batch_size, self.micro_batching.limit)
        if self.max_memory_percent:
            self.guard = HostGuard(self.max_memory_percent, instruments=instruments)
        self.guard.start()
        try:
            with self.gc:
                yield
        finally:
            self.guard.stop()
            self._steps.telemetry = LoggedTelemetry()

    def optimize_memory(self) -> dict[str, Any]:
        """Collect garbage and give caches back; bytes held before and after, and what was freed."""
        return free_memory()

    def memory_profiler(self, name: str, *, python_top: int = 0) -> AbstractContextManager[MemoryProfile]:
        """A context manager that measures what its block does to memory, for the log and `profiler.profiles`.

        Args:
            name: of the block; blocks nest, and an inner one is called `outer/inner`.
            python_top: lines of Python listed whose allocations grew most; slows the block down severalfold.
        """
        return self.profiler.block(name, python_top=python_top)

    def get_memory_info(self) -> dict[str, Any]:
        """Host, process, devices, model, micro-batch and what is foreseen; bytes where a name ends so."""
        forecasts = self.guard.forecasts if isinstance(self.guard, HostGuard) else {}
        return memory_info(host_memory(), forecasts, self.micro_batching, self._model, self._steps.recoveries)

    def get_memory_recommendations(self) -> list[Recommendation]:
        """What could be changed, the most pressing first, each with its numbers and its setting."""
        return recommendations(self.get_memory_info(), self.max_memory_percent)

    def leak_detector(self, *, looks: int = 4, least_bytes: int = 2**20) -> LeakDetector:
        """A detector to look with by hand; see `leak_check_steps` for one that looks by itself."""
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
            UserError: CUDA is not in use.
            OSError: the file cannot be written.
        """
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
