"""The step path: where a training loop leaves its timestamps and values, in plain attributes and a ring.

The loop's thread writes; `fold()` on any other thread turns what was written into counts, windows and
histogram buckets. Nothing here takes a lock, makes a system call or waits for a device on the loop's side.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from obsinfra.catalog.metrics import PHASES, PRODUCTIVE_PHASES, STEP_BUCKETS

if TYPE_CHECKING:
    from obsinfra.monitoring.readback import DeviceReadback
    from obsinfra.monitoring.tracing import StepReason

RING_STEPS = 65_536
"""Steps that may wait for a fold; at one fold a second this holds steps down to 15 µs."""

WINDOW_SECONDS = 15.0
"""Peaks look back this far, so that every scrape up to this interval sees every spike."""

RATE_SECONDS = 10.0
"""Throughput is an average over this long."""

_DATA = PHASES.index("data")
_ROLLOUT = PHASES.index("rollout")
_FORWARD = PHASES.index("forward")
_STEPLESS = (PHASES.index("validation"), PHASES.index("paused"))
_OTHER = PHASES.index("other")
_OUTSIDE = len(PHASES)
_STARTUP = len(PHASES) + 1
_PRODUCTIVE = (*(i for i, name in enumerate(PHASES) if name in PRODUCTIVE_PHASES), _OTHER)


class StepRecord(NamedTuple):
    """One finished step as it waits in the ring. Times are `time.perf_counter` seconds.

    A step of unknown duration starts when it ends. `own` is what of it waited for no other rank, in seconds.
    """

    step: int
    epoch: int
    started: float
    ended: float
    loss: float | None
    grad_norm: float | None
    samples: int
    phases: tuple[tuple[int, float, float], ...] | None
    own: float | None = None


class TracedStep(NamedTuple):
    """A step worth a trace; times in epoch nanoseconds."""

    step: int
    epoch: int
    reason: StepReason
    start_ns: int
    end_ns: int
    loss: float | None
    phases: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class Exemplar:
    """The latest traced step that fell into a bucket of the step histogram."""

    trace_id: str
    seconds: float
    at: float


class _Peak:
    """The largest value of a time, without looking through all of them: those that a later one exceeds can
    never be it again and go at once.
    """

    __slots__ = ("_falling",)

    def __init__(self) -> None:
        self._falling: deque[tuple[float, float]] = deque()

    def see(self, at: float, value: float) -> None:
        falling = self._falling
        while falling and falling[-1][1] <= value:
            falling.pop()
        falling.append((at, value))

    def forget(self, before: float) -> None:
        while self._falling and self._falling[0][0] < before:
            self._falling.popleft()

    @property
    def value(self) -> float | None:
        return self._falling[0][1] if self._falling else None


class _Phase:
    """Context manager of one phase; made once per name and reused, so entering it allocates nothing."""

    __slots__ = ("_index", "_recorder")

    def __init__(self, recorder: Recorder, index: int) -> None:
        self._recorder, self._index = recorder, index

    def __enter__(self) -> None:
        recorder = self._recorder
        now = perf_counter()
        current = recorder._current
        recorder._stack.append((current, now))
        # No call between these three: under the GIL another thread sees all of them or none.
        recorder._seconds[current] += now - recorder._mark
        recorder._mark = now
        recorder._current = self._index

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        recorder = self._recorder
        stack = recorder._stack
        if not stack:
            return  # a step that ended inside this phase has closed it
        outer, started = stack.pop()
        now = perf_counter()
        index = self._index
        recorder._seconds[index] += now - recorder._mark
        recorder._mark = now
        recorder._current = outer
        if recorder._step_started is not None:
            recorder._phases.append((index, started, now))


class _Step:
    """Context manager of one step. A step left by an exception is not counted."""

    __slots__ = ("_recorder",)

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __enter__(self) -> None:
        self._recorder.begin_step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._recorder.end_step()
        else:
            self._recorder.abandon_step()


class Recorder:
    """Collects what one loop does. One writer (the loop's thread), any number of readers.

    Args:
        trace_every: keep the phases of every Nth step for a trace; 0 keeps only anomalous ones.

    Attributes:
        step: global step, the number of the next step while none runs.
        epoch: current epoch.
        nonfinite: steps whose loss or gradient norm was NaN or infinite.
        rework_until_step: steps below this number were done before and count as rework.
        alarm_norm: a gradient norm above this, or a value that is not finite, calls `on_alarm` once its step
            is in the ring: what must not wait for the next round of housekeeping.
        on_alarm: called on the loop's thread; must return at once.
        own_time_known: whether the phases `data`, `rollout` and `forward` wait for no other rank and this
            process's clock sees them. Not so on a GPU, which works on after the call that started it has
            returned, nor where each block's parameters are gathered from all ranks.
        first_step_allowance: seconds that the first step of this process may take before it counts as slow:
            what a compiler works in it.
    """

    def __init__(self, *, trace_every: int = 100) -> None:
        self.step = 0
        self.epoch = 0
        self.nonfinite = 0
        self.last_loss: float | None = None
        self.last_grad_norm: float | None = None
        self.learning_rate: float | None = None
        self.loss_scale: float | None = None
        self.train_metrics: dict[str, Any] = {}
        self.rework_until_step = 0
        self.alarm_norm = math.inf
        self.on_alarm: Callable[[], None] | None = None
        self.own_time_known = True
        self.first_step_allowance = 0.0

        self._trace_every = trace_every
        self._slow_seconds = math.inf
        self._seconds = [0.0] * (len(PHASES) + 2)
        self._stack: list[tuple[int, float]] = []
        self._phases: list[tuple[int, float, float]] = []
        self._current = _STARTUP
        self._started = self._mark = perf_counter()
        self._epoch_offset = time.time() - self._started
        self._step_started: float | None = None
        self._own = self._own_before = self._forward_before = 0.0
        self._reported_at: float | None = None
        self._redone_from: float | None = None
        self._ended_steps = 0
        self._loss: float | None = None
        self._grad_norm: float | None = None
        self._samples = 0
        self._told_step = -1
        self._bad = False
        self._alarmed = False
        self._late_bad_step: int | None = None
        self._ring: deque[tuple[Any, ...]] = deque(maxlen=RING_STEPS)  # StepRecord fields, cheaply
        self._late: deque[tuple[float, float | None, float | None]] = deque(maxlen=RING_STEPS)
        self._readback: DeviceReadback | None = None
        self._phase_contexts = {name: _Phase(self, index) for index, name in enumerate(PHASES)}
        self._step_context = _Step(self)
        self.rework_seconds = 0.0
        self._shown_lock = threading.Lock()
        self._shown = [0.0] * len(self._seconds)

        # Written by fold() alone, under its lock.
        self._fold_lock = threading.Lock()
        self._folded_steps = 0
        self._dropped_steps = 0
        self._dropped_traces = 0
        self.steps = 0
        self.samples = 0
        self.step_seconds_sum = 0.0
        self.bucket_counts = [0] * (len(STEP_BUCKETS) + 1)
        self.exemplars: dict[int, Exemplar] = {}
        self.recent_seconds: deque[float] = deque(maxlen=4096)
        self._median_seconds = 0.0
        self._own_median_seconds: float | None = None
        self._slowest, self._peak_norm, self._peak_loss = _Peak(), _Peak(), _Peak()
        self._last_ended: float | None = None
        self._stepless_until_then = 0.0
        self._rate: deque[tuple[float, int]] = deque([(self._started, 0)])
        self._traced: deque[TracedStep] = deque(maxlen=1024)
        self._loss_sum = 0.0
        self._loss_count = 0
        self._largest_norm: float | None = None

    # ---- the loop's side -------------------------------------------------------------------------

    def phase(self, name: str) -> _Phase:
        """Context manager that accounts the time inside to `name`; nested time counts for the inner one.

        Raises:
            KeyError: `name` is not one of `catalog.metrics.PHASES`.
        """
        return self._phase_contexts[name]

    def step_context(self) -> _Step:
        """Context manager of one step."""
        return self._step_context

    def begin_step(self) -> None:
        """A step starts now."""
        now = perf_counter()
        self._seconds[self._current] += now - self._mark
        self._mark = self._step_started = now
        self._current = _OTHER
        if self._phases:
            self._phases.clear()
        seconds = self._seconds
        self._forward_before = forward = seconds[_FORWARD]
        self._own_before = seconds[_DATA] + seconds[_ROLLOUT] + forward
        self._own = 0.0
        if self.step < self.rework_until_step:
            self._redone_from = self._productive()

    def end_step(self) -> None:
        """The step is done; its record goes into the ring."""
        started = self._step_started
        if started is None:
            return
        now = perf_counter()
        self._seconds[self._current] += now - self._mark
        self._mark = now
        self._current = _OUTSIDE
        self._stack.clear()
        self._step_started = None
        if self._redone_from is not None:
            self.rework_seconds += self._productive() - self._redone_from
            self._redone_from = None
        seconds = self._seconds
        forward = seconds[_FORWARD]
        own = None  # where no forward pass is seen, the data alone would say too little
        if forward > self._forward_before:
            own = seconds[_DATA] + seconds[_ROLLOUT] + forward - self._own_before + self._own
        step = self.step
        keep = now - started > self._slow_seconds or (self._trace_every and step % self._trace_every == 0)
        phases = tuple(self._phases) if keep else None
        self._ring.append(
            (step, self.epoch, started, now, self._loss, self._grad_norm, self._samples, phases, own)
        )
        self._ended_steps += 1
        self._loss = self._grad_norm = None
        self._samples = 0
        self._bad = False
        self.step = step + 1
        if self._alarmed:
            self._alarm()

    def abandon_step(self) -> None:
        """The step ended early (no more data, an exception); its time counts, the step does not."""
        now = perf_counter()
        self._seconds[self._current] += now - self._mark
        self._mark = now
        self._current = _OUTSIDE
        self._stack.clear()
        self._step_started = self._redone_from = None
        self._loss = self._grad_norm = None
        self._samples = 0
        self._bad = False

    def leave_step(self) -> bool:
        """The loop was left within a step, which counts if something was recorded of it. Whether it does."""
        done = self.end_recorded_step()
        if not done:
            self.abandon_step()
        return done

    def end_recorded_step(self) -> bool:
        """End the step under way if something was recorded of it. Whether it was."""
        done = self._step_started is not None and self._told_step == self.step
        if done:
            self.end_step()
        return done

    def finish_untimed_step(self, seconds: float | None) -> None:
        """Close a step that was reported rather than timed.

        `seconds` is its duration. Where that is not known, it lasted since the previous report; the first
        one's duration stays unknown. Time that no phase claims counts as inside the step up to `seconds`.
        """
        now = perf_counter()
        after = _OTHER if seconds is None else _OUTSIDE
        if seconds is None:
            seconds = 0.0 if self._reported_at is None else now - self._reported_at
        if not self._stack:
            elapsed = now - self._mark
            inside = min(seconds, elapsed)
            self._seconds[_OTHER] += inside
            self._seconds[self._current] += elapsed - inside
            self._mark = now
            self._current = after
        self._reported_at = now
        self._ring.append(
            (self.step, self.epoch, now - seconds, now, self._loss, self._grad_norm, self._samples, None)
        )
        self._ended_steps += 1
        self._loss = self._grad_norm = None
        self._samples = 0
        self._bad = False
        self.step += 1
        if self._alarmed:
            self._alarm()

    def add_own(self, seconds: float) -> None:
        """Count this much of the present step as work that waited for no other rank.

        The phases `data`, `rollout` and `forward` count by themselves. Add what of the backward pass is free
        of an exchange; negative seconds take off what of those phases was a wait for other ranks.
        """
        self._own += seconds

    def record(
        self,
        loss: Any = None,
        grad_norm: Any = None,
        samples: int = 0,
        learning_rate: float | None = None,
        **metrics: Any,
    ) -> None:
        """Values of the current step. Tensors on a device are read back a step later, without waiting.

        Args:
            loss, grad_norm: a number or a one-element tensor.
            samples: samples consumed; added up over several calls within a step.
            learning_rate: of the first parameter group.
            metrics: further values (numbers or one-element tensors); read when somebody looks.
        """
        if loss is not None or grad_norm is not None:
            if type(loss) is not float and loss is not None:
                loss = loss.item() if getattr(loss, "is_cpu", False) else self._number(loss)
            if type(grad_norm) is not float and grad_norm is not None:
                grad_norm = (
                    grad_norm.item() if getattr(grad_norm, "is_cpu", False) else self._number(grad_norm)
                )
            if type(loss) is _OnDevice or type(grad_norm) is _OnDevice:
                loss, grad_norm = self._read_later(loss, grad_norm)
            # x − x is 0 for every finite x and NaN for the others: one comparison, no call.
            if loss is not None:
                self._loss = self.last_loss = loss
                if loss - loss != 0.0 and not self._bad:
                    self._bad = self._alarmed = True
                    self.nonfinite += 1
            if grad_norm is not None:
                self._grad_norm = self.last_grad_norm = grad_norm
                if grad_norm > self.alarm_norm:
                    self._alarmed = True
                if grad_norm - grad_norm != 0.0 and not self._bad:
                    self._bad = self._alarmed = True
                    self.nonfinite += 1
        self._samples += samples
        self._told_step = self.step
        if learning_rate is not None:
            self.learning_rate = learning_rate
        if metrics:
            for name, value in metrics.items():
                self.train_metrics[name] = value.detach() if hasattr(value, "detach") else value

    def in_step_phase(self) -> str:
        """Name of the present phase: one of PHASES, `outside_step` or `startup`."""
        current = self._current
        return PHASES[current] if current < _OUTSIDE else ("outside_step", "startup")[current - _OUTSIDE]

    def _productive(self) -> float:
        return sum(self._seconds[i] for i in _PRODUCTIVE)

    # ---- anybody's side --------------------------------------------------------------------------

    def fold(self) -> None:
        """Turn what the loop wrote since the last fold into counts and windows. On any thread."""
        with self._fold_lock:
            if self._readback is not None:
                self._readback.collect()
            ring = self._ring
            ended = self._ended_steps  # read first: all of these are in the ring, folded or dropped
            durations: list[float] = []
            owned: list[float] = []
            for _ in range(len(ring)):
                record = StepRecord(*ring.popleft())
                seconds = record.ended - record.started
                if seconds > 0.0:
                    durations.append(seconds)
                    self.bucket_counts[bisect_left(STEP_BUCKETS, seconds)] += 1
                    self.step_seconds_sum += seconds
                if record.own is not None:
                    owned.append(record.own)
                self._folded_steps += 1
                self._last_ended = record.ended
                self.steps += 1
                self.samples += record.samples
                self._slowest.see(record.ended, self._beyond_allowance(seconds, first=self.steps == 1))
                self._see(record.ended, record.loss, record.grad_norm)
                bad = _nonfinite(record.loss) or _nonfinite(record.grad_norm)
                if record.phases is not None or bad:
                    self._keep_trace(record, "nonfinite" if bad else None)
            self._dropped_steps = max(self._dropped_steps, ended - self._folded_steps)
            for _ in range(len(self._late)):
                arrived, loss, grad_norm = self._late.popleft()
                self._see(arrived, loss, grad_norm)
            if durations:
                self._stepless_until_then = self._stepless()
            now = perf_counter()
            for peak in (self._slowest, self._peak_norm, self._peak_loss):
                peak.forget(now - WINDOW_SECONDS)
            self._rate.append((now, self.samples))
            while len(self._rate) > 2 and self._rate[1][0] < now - RATE_SECONDS:
                self._rate.popleft()
            if durations:
                self.recent_seconds.extend(durations)
                self._median_seconds = _smoothed(self._median_seconds or None, durations)
                self._slow_seconds = max(3.0 * self._median_seconds, 0.002)
            if owned:
                self._own_median_seconds = _smoothed(self._own_median_seconds, owned)

    @property
    def dropped(self) -> int:
        """Steps no fold has seen and traces nobody took, because their buffer was full."""
        return self._dropped_steps + self._dropped_traces

    def traced_steps(self) -> list[TracedStep]:
        """Take the steps that deserve a trace since the last call."""
        with self._fold_lock:
            taken = list(self._traced)
            self._traced.clear()
        return taken

    def attach_exemplar(self, seconds: float, trace_id: str, at: float) -> None:
        """Point the histogram bucket of a step of `seconds` at a trace. `at` is epoch seconds."""
        self.exemplars[bisect_left(STEP_BUCKETS, seconds)] = Exemplar(trace_id, seconds, at)

    def samples_per_second(self) -> float:
        """Average over the last `RATE_SECONDS`, up to now."""
        first_at, first = self._rate[0]
        last_at, last = self._rate[-1]
        return (last - first) / (last_at - first_at) if last_at > first_at else 0.0

    def peak_grad_norm(self) -> float | None:
        """Largest gradient norm of the last `WINDOW_SECONDS`; NaN never is, infinity is."""
        with self._fold_lock:
            return self._peak_norm.value

    def peak_loss(self) -> float | None:
        """Largest loss of the last `WINDOW_SECONDS`; NaN never is, infinity is."""
        with self._fold_lock:
            return self._peak_loss.value

    def seconds_since_step(self) -> float | None:
        """Seconds since the last step ended, without validation and pauses since; None before the first one.

        To within a fold: what of them began between the last step and the fold that saw it counts as time
        without a step up to that fold.
        """
        ended = self._last_ended
        if ended is None:
            return None
        stepless = self._stepless() - self._stepless_until_then
        return max(0.0, perf_counter() - ended - stepless)

    def _stepless(self) -> float:
        seconds = self._until_now()
        return sum(seconds[phase] for phase in _STEPLESS)

    def step_time(self) -> float | None:
        """Slowest step of the last `WINDOW_SECONDS`, counting the one still running."""
        with self._fold_lock:
            slowest = self._slowest.value
        started = self._step_started
        if started is not None:
            running = self._beyond_allowance(perf_counter() - started, first=self._ended_steps == 0)
            return running if slowest is None else max(slowest, running)
        return slowest

    def _beyond_allowance(self, seconds: float, *, first: bool) -> float:
        return max(0.0, seconds - self.first_step_allowance) if first else seconds

    def median_step_seconds(self) -> float:
        """Smoothed median of step durations; 0 before the first fold with steps."""
        return self._median_seconds

    def own_median_seconds(self) -> float | None:
        """Smoothed median of what of each step waited for no other rank; None where that is not known."""
        return self._own_median_seconds if self.own_time_known else None

    def seconds_in_step(self) -> float | None:
        """How long the present step has been running; None between steps."""
        started = self._step_started
        return None if started is None else perf_counter() - started

    def phase_seconds(self) -> dict[str, float]:
        """Wall seconds by phase up to this moment; they add up to the recorder's age."""
        seconds = self._until_now()
        out = dict(zip(PHASES, seconds, strict=False))
        out["other"] += seconds[_OUTSIDE] + seconds[_STARTUP]
        return out

    def lost_seconds(self) -> dict[str, float]:
        """Wall seconds that were not productive, by cause."""
        seconds = self._until_now()
        by_name = dict(zip(PHASES, seconds, strict=False))
        return {
            "startup": seconds[_STARTUP],
            "data": by_name["data"],
            "checkpoint": by_name["checkpoint"],
            "validation": by_name["validation"],
            "paused": by_name["paused"],
            "outside_step": seconds[_OUTSIDE],
            "rework": self.rework_seconds,
        }

    def goodput(self) -> float:
        """Productive seconds ÷ wall seconds, 0 to 1."""
        seconds = self._until_now()
        total = sum(seconds)
        productive = sum(seconds[i] for i in _PRODUCTIVE) - self.rework_seconds
        return max(0.0, productive) / total if total > 0 else 0.0

    def take_mean_loss(self) -> float | None:
        """Mean of the finite losses seen since the last call; None without any."""
        with self._fold_lock:
            mean = self._loss_sum / self._loss_count if self._loss_count else None
            self._loss_sum, self._loss_count = 0.0, 0
        return mean

    def take_peak_grad_norm(self) -> float | None:
        """Largest gradient norm seen since the last call; None without any. NaN never is, infinity is."""
        with self._fold_lock:
            peak, self._largest_norm = self._largest_norm, None
        return peak

    def train_metric_values(self) -> Mapping[str, float]:
        """Further metrics as numbers. Waits for the device if they are on one: not for the loop's thread."""
        out = {}
        for name, value in self.train_metrics.copy().items():  # a whole copy: the loop adds names
            try:
                out[name] = float(value)
            except (TypeError, ValueError, RuntimeError):
                continue
        return out

    def epoch_ns(self, moment: float) -> int:
        """A `perf_counter` moment as nanoseconds since the epoch."""
        return int((moment + self._epoch_offset) * 1e9)

    # ---- inside ------------------------------------------------------------------------------------

    def _until_now(self) -> list[float]:
        """Seconds by phase with the present one's so far; never less than an earlier call returned.

        They are counters: to Prometheus one that falls by a microsecond was reset and is counted all over.
        """
        with self._shown_lock:
            while True:
                mark = self._mark
                seconds, current = list(self._seconds), self._current
                now = perf_counter()
                if mark == self._mark:  # else the loop changed phases while we looked
                    break
            # The loop's thread may stand between reading the clock and noting it: then `now` is too much.
            seconds[current] += now - mark
            self._shown = [max(pair) for pair in zip(seconds, self._shown, strict=True)]
            return list(self._shown)

    def _see(self, at: float, loss: float | None, grad_norm: float | None) -> None:
        if loss is not None and loss == loss:
            self._peak_loss.see(at, loss)
            if loss - loss == 0.0:
                self._loss_sum += loss
                self._loss_count += 1
        if grad_norm is not None and grad_norm >= 0.0:
            self._peak_norm.see(at, grad_norm)
            if self._largest_norm is None or grad_norm > self._largest_norm:
                self._largest_norm = grad_norm

    def _alarm(self) -> None:
        self._alarmed = False
        if self.on_alarm is not None:
            self.on_alarm()

    def _keep_trace(self, record: StepRecord, reason: StepReason | None) -> None:
        sampled = self._trace_every and record.step % self._trace_every == 0
        self._dropped_traces += len(self._traced) == self._traced.maxlen
        self._traced.append(
            TracedStep(
                record.step,
                record.epoch,
                reason or ("sampled" if sampled else "slow"),
                self.epoch_ns(record.started),
                self.epoch_ns(record.ended),
                record.loss,
                tuple((PHASES[i], self.epoch_ns(a), self.epoch_ns(b)) for i, a, b in record.phases or ()),
            )
        )

    def _number(self, value: Any) -> Any:
        """A float now, or an `_OnDevice` to be read back later; CPU tensors never come here."""
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            return _OnDevice(value.detach())
        return float(value)

    def _read_later(self, loss: Any, grad_norm: Any) -> tuple[float | None, float | None]:
        """Start the copies of what is on a device and return what an earlier step's copies brought."""
        if self._readback is None:
            from obsinfra.monitoring.readback import DeviceReadback

            self._readback = DeviceReadback(self._arrived)
        loss_there = loss.tensor if type(loss) is _OnDevice else None
        norm_there = grad_norm.tensor if type(grad_norm) is _OnDevice else None
        self._readback.put(loss_there, norm_there, self.step)
        return (
            None if loss_there is not None else loss,
            None if norm_there is not None else grad_norm,
        )

    def _arrived(self, loss: float | None, grad_norm: float | None, step: int) -> None:
        if loss is not None:
            self.last_loss = loss
        if grad_norm is not None:
            self.last_grad_norm = grad_norm
        if step != self._late_bad_step and (_nonfinite(loss) or _nonfinite(grad_norm)):
            self._late_bad_step = step
            self.nonfinite += 1
        self._late.append((perf_counter(), loss, grad_norm))
        if _nonfinite(loss) or (grad_norm is not None and not grad_norm <= self.alarm_norm):
            self._alarm()


def _smoothed(before: float | None, seconds: list[float]) -> float:
    """A median that moves by a fifth towards that of `seconds`."""
    middle = sorted(seconds)[len(seconds) // 2]
    return middle if before is None else 0.8 * before + 0.2 * middle


def _nonfinite(value: float | None) -> bool:
    return value is not None and value - value != 0.0


class _OnDevice:
    """A tensor whose value is still on its device."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
