"""Out of memory in a step: free the caches, halve the micro-batch, rewind, and do the same step again.

The trainer hands every step to `run`; so may any loop (see docs/memory.md). Whether to recover at all is
decided once, by the object that is made: `OutOfMemoryRecovery` or `NoRecovery`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from obsinfra.catalog import metrics as catalog
from obsinfra.errors import ConfigError, MemoryExhaustedError, first_line
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.training_monitor import TrainingMonitor
from obsinfra.optimization.gc_schedule import all_objects
from obsinfra.optimization.micro_batching import (
    MicroBatching,
    Share,
    has_batch_norm,
    largest_share,
    rows_of_share,
)
from obsinfra.optimization.rewind import Rewind

Result = TypeVar("Result")

ROOM_RATIO = 0.9
"""A larger micro-batch is tried on a GPU only if what it is expected to need stays below this share of what
there is: fragmentation and workspaces take more than a straight line foresees."""

_optimizer_steps = 0
"""Of all optimizers of this process. Fused ones write to parameters without autograd's counting it."""

_OTHER_WORDINGS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What PyTorch says about memory in a plain RuntimeError."""


@runtime_checkable
class Agreement(Protocol):
    """How all ranks of a run come to the same decision."""

    def passed(self, failed: bool) -> bool:
        """The passes of a step have ended on this rank. Whether they have failed on any; if not, what the
        gradients need from other ranks is in them now. Once per attempt."""
        ...

    def agree(self, mine: bool) -> bool:
        """Whether any rank says yes. Every rank calls it at the same place; may wait for the others."""
        ...

    def largest(self, number: int) -> int:
        """The largest number any rank has. Called like `agree`, and as rarely."""
        ...


class Alone:
    """The agreement of a single process: with itself."""

    def passed(self, failed: bool) -> bool:
        return failed

    def agree(self, mine: bool) -> bool:
        return mine

    def largest(self, number: int) -> int:
        return number


@dataclass(frozen=True, slots=True)
class Recovered:
    """A step ran out of memory and was done again.

    Attributes:
        step: the global step.
        rows_before, rows: rows of a micro-batch that did not fit, and from now on.
        shares: micro-batches of the step now.
        freed_bytes: what the device allocator gave back; 0 on a CPU, whose allocator keeps nothing.
        seconds: from the failure until the step was done.
        problem: what the allocator said, first line.
        elsewhere: the failure was another rank's.
    """

    step: int
    rows_before: int
    rows: int
    shares: int
    freed_bytes: int
    seconds: float
    problem: str
    elsewhere: bool


@dataclass(frozen=True, slots=True)
class Grown:
    """A larger micro-batch is tried from the next step on; `rows` is None when batches are whole again."""

    step: int
    rows_before: int
    rows: int | None


class Telemetry(Protocol):
    """Hears what happens to the micro-batch."""

    def recovered(self, event: Recovered) -> None: ...

    def grown(self, event: Grown) -> None: ...


class LoggedTelemetry:
    """Log events alone, for loops without a monitor."""

    def __init__(self) -> None:
        self._log = get_logger("training")

    def recovered(self, event: Recovered) -> None:
        facts = asdict(event)
        self._log.warning("out_of_memory_recovered", at_step=facts.pop("step"), **facts)

    def grown(self, event: Grown) -> None:
        rows = event.rows or "whole batches"
        self._log.info("micro_batch_grown", at_step=event.step, rows_before=event.rows_before, rows=rows)


class MonitoredTelemetry(LoggedTelemetry):
    """Log events, metrics and a span.

    Args:
        monitor: of the loop.
        whole: rows of a batch that is not split.
        limit: rows of a micro-batch at the start, if they are limited.
    """

    def __init__(self, monitor: TrainingMonitor, whole: int, limit: int | None) -> None:
        super().__init__()
        self._monitor, self._whole = monitor, whole
        monitor.instruments.add(catalog.OOM_RECOVERIES, 0)
        monitor.instruments.add(catalog.MICRO_BATCH_GROWTHS, 0)
        self._show(limit)

    def recovered(self, event: Recovered) -> None:
        super().recovered(event)
        monitor, now = self._monitor, time.time()
        monitor.instruments.add(catalog.OOM_RECOVERIES)
        monitor.recorder.rework_seconds += event.seconds  # the step's time until then produced nothing
        self._show(event.rows)
        monitor.tracer.emit(
            "out of memory",
            int((now - event.seconds) * 1e9),
            int(now * 1e9),
            {
                "obsinfra.step": event.step,
                "obsinfra.rows_before": event.rows_before,
                "obsinfra.rows": event.rows,
                "obsinfra.freed_bytes": event.freed_bytes,
                "obsinfra.problem": event.problem,
            },
        )

    def grown(self, event: Grown) -> None:
        super().grown(event)
        self._monitor.instruments.add(catalog.MICRO_BATCH_GROWTHS)
        self._show(event.rows)

    def _show(self, rows: int | None) -> None:
        self._monitor.instruments.set(catalog.MICRO_BATCH_ROWS, rows or self._whole)


class StepRunner(Protocol):
    """How a step's forward and backward passes are run."""

    telemetry: Telemetry
    micro_batching: MicroBatching
    recovers: bool
    recoveries: int

    def run(
        self, step: int, batches: Sequence[Any], attempt: Callable[[Sequence[Share]], Result]
    ) -> Result: ...


class NoRecovery:
    """Splits as asked and leaves errors alone."""

    recovers = False
    recoveries = 0

    def __init__(self, micro_batching: MicroBatching) -> None:
        self.micro_batching = micro_batching
        self.telemetry: Telemetry = LoggedTelemetry()

    def run(self, step: int, batches: Sequence[Any], attempt: Callable[[Sequence[Share]], Result]) -> Result:
        """`attempt` on the shares of `batches`."""
        return attempt(self.micro_batching.split(batches))


class OutOfMemoryRecovery:
    """Repeats a step at half the micro-batch as often as it takes, and grows back.

    Args:
        model: its gradients are dropped and its buffers put back before a repetition.
        micro_batching: the size in force.
        device: whose allocator and random state are meant.
        agreement: of all ranks; alone by default. On many ranks the passes must not communicate before its
            `passed`.

    Attributes:
        telemetry: hears of every recovery and growth.
        recovers: True.
        recoveries: steps that were done again.
    """

    recovers = True

    def __init__(
        self,
        model: nn.Module,
        micro_batching: MicroBatching,
        device: torch.device,
        agreement: Agreement | None = None,
    ) -> None:
        self.micro_batching = micro_batching
        self.recoveries = 0
        self.telemetry: Telemetry = LoggedTelemetry()
        self._model, self._device = model, device
        self._agreement = agreement or Alone()
        self._rewind = Rewind(model, device)
        self._batch_norm = has_batch_norm(model)
        self._parameters = [*model.parameters()]
        self._updates = -1  # of any optimizer, when the last step's passes were done

    def run(self, step: int, batches: Sequence[Any], attempt: Callable[[Sequence[Share]], Result]) -> Result:
        """`attempt` on the shares of `batches`, with smaller ones until it fits.

        Args:
            step: for what is reported.
            batches: of this step; the same ones are used again.
            attempt: forward and backward passes of every share; the model's gradients, its buffers and random
                states must be its only effects, since these are what can be taken back.

        Raises:
            MemoryExhaustedError: it does not fit with one row at a time, the batch cannot be split, or
                gradients of the call before, which no optimizer step has used, would be lost.
            ConfigError: after a repetition, a parameter outside the model has gradients of both attempts.
        """
        micro_batching, holds = self.micro_batching, self._holds_gradients()
        self._rewind.mark()
        shares = micro_batching.split(batches)
        result, problem = _try(attempt, shares)
        if self._agreement.passed(problem is not None):
            result = self._repeat(step, batches, shares, attempt, problem, holds=holds)
        self._rewind.passed()
        self._updates = _optimizer_steps
        if micro_batching.due_to_grow():
            self._grow(step)
        return result  # type: ignore[return-value]

    def _repeat(
        self,
        step: int,
        batches: Sequence[Any],
        shares: Sequence[Share],
        attempt: Callable[[Sequence[Share]], Result],
        problem: str | None,
        *,
        holds: bool,
    ) -> Result | None:
        micro_batching, agreement = self.micro_batching, self._agreement
        started, failed, elsewhere = time.perf_counter(), True, problem is None
        result: Result | None = None
        rows_before = freed = 0
        reported = problem or "another rank ran out of memory"
        while failed:
            stuck = problem is not None and not micro_batching.can_halve(shares)
            if agreement.agree(stuck or holds):
                raise self._exhausted(step, shares, reported, holds=holds)
            largest = agreement.largest(largest_share(shares))
            rows_before = rows_before or largest
            micro_batching.halve(largest)
            self._model.zero_grad(set_to_none=True)
            freed += release_device_caches(self._device)
            self._rewind.back()
            outside = self._outside_gradients()
            if self._device.type == "cuda":  # the peak is to be that of the new size, for `_room_for_twice`
                torch.cuda.reset_peak_memory_stats(self._device)
            shares = micro_batching.split(batches)
            result, problem = _try(attempt, shares)
            reported = problem or reported
            failed = agreement.passed(problem is not None)
        _check_not_twice(outside)
        if self._batch_norm:
            self._batch_norm = False  # said once
            get_logger("training").warning(
                "batch_norm_in_micro_batches",
                advice="its statistics are of fewer rows now; GroupNorm or LayerNorm would not notice",
            )
        assert micro_batching.limit is not None
        self.recoveries += 1
        self.telemetry.recovered(
            Recovered(
                step=step,
                rows_before=rows_before,
                rows=micro_batching.limit,
                shares=len(shares),
                freed_bytes=freed,
                seconds=time.perf_counter() - started,
                problem=reported,
                elsewhere=elsewhere,
            )
        )
        return result

    def _holds_gradients(self) -> bool:
        """Whether gradients of the passes before are still there, and no optimizer has used them."""
        if self._updates != _optimizer_steps:
            return False
        gradients = (parameter.grad for parameter in self._parameters)
        return any(
            gradient.layout is not torch.strided or bool(gradient.any())
            for gradient in gradients
            if gradient is not None
        )

    def _outside_gradients(self) -> list[tuple[Tensor, Tensor, int]]:
        """Parameters outside the model that have gradients, these, and how often they were written to."""
        mine = {id(parameter) for parameter in self._parameters}
        found = []
        for thing in all_objects():
            if not issubclass(type(thing), Tensor) or id(thing) in mine:  # not isinstance: proxies run code
                continue
            if thing.is_leaf and thing.requires_grad and thing.grad is not None:
                found.append((thing, thing.grad, thing.grad._version))
        return found

    def _grow(self, step: int) -> None:
        micro_batching = self.micro_batching
        if self._agreement.agree(not _room_for_twice(self._device)):
            micro_batching.put_off()
            return
        before = micro_batching.limit
        assert before is not None
        self.telemetry.grown(Grown(step, before, micro_batching.grow()))

    def _exhausted(
        self, step: int, shares: Sequence[Share], problem: str, *, holds: bool
    ) -> MemoryExhaustedError:
        if holds:
            return MemoryExhaustedError(
                f"out of memory in step {step}, and doing it again would lose the gradients of the run "
                f"before, which no optimizer step has used: {problem}; fix: accumulate within one run, "
                "as run(step, [batch, batch], passes)"
            )
        if not self.micro_batching.splittable or any(rows_of_share(share) is None for share in shares):
            what = "the batch cannot be split into rows (docs/memory.md)"
        else:
            what = "one row at a time does not fit"
        return MemoryExhaustedError(
            f"out of memory in step {step}, and {what}: {problem}; fix: --gradient-checkpointing, "
            "--precision bf16, a smaller model or shorter sequences"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(wording in str(error) for wording in _OTHER_WORDINGS)


def release_device_caches(device: torch.device) -> int:
    """Collect what only the collector can free, and give the device allocator's cache back.

    Returns:
        Bytes given back to the device.
    """
    gc.collect()  # a graph in a reference cycle holds its activations
    if device.type != "cuda":
        return 0
    before = int(torch.cuda.memory_reserved(device))
    torch.cuda.empty_cache()
    return before - int(torch.cuda.memory_reserved(device))


def _try(
    attempt: Callable[[Sequence[Share]], Result], shares: Sequence[Share]
) -> tuple[Result | None, str | None]:
    """The result, or what the allocator said. Not the exception: its frames hold the failed tensors."""
    try:
        return attempt(shares), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, first_line(error)


def _count_optimizer_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def _check_not_twice(outside: list[tuple[Tensor, Tensor, int]]) -> None:
    """Refuse a step whose repetition added to gradients that nobody has dropped.

    Raises:
        ConfigError: it did.
    """
    for parameter, gradient, version in outside:
        if parameter.grad is gradient and gradient._version != version:
            raise ConfigError(
                f"a parameter of shape {list(parameter.shape)} outside the model, with the gradients of both "
                "attempts at a step that ran out of memory",
                "every parameter of the step in the model that is prepared",
                "optimize_for_training(nn.ModuleList([model, other]))",
            )


def _room_for_twice(device: torch.device) -> bool:
    """Whether a micro-batch of twice the rows is expected to fit; unknown counts as yes.

    What the step needs beyond what stays allocated between steps is taken to double.
    """
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_allocated(device)
    peak = torch.cuda.max_memory_allocated(device)
    usable = free + torch.cuda.memory_reserved(device)
    return kept + 2 * (peak - kept) <= ROOM_RATIO * min(usable, total)
