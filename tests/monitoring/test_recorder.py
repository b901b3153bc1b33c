"""What the recorder makes of a loop: time by phase, lost time, step statistics, anomalies; by a set clock."""

from __future__ import annotations

import gc
import math
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import wait_for

from obsinfra.catalog.metrics import LOST_CAUSES, PHASES, PRODUCTIVE_PHASES, STEP_BUCKETS
from obsinfra.monitoring import recorder as recorder_module
from obsinfra.monitoring.recorder import RATE_SECONDS, RING_STEPS, WINDOW_SECONDS, Recorder

TICK = 1 / 1024
"""A duration whose multiples add up without rounding."""


class Clock:
    """Stands in for `perf_counter`; time passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@contextmanager
def set_clock() -> Iterator[Clock]:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder_module, "perf_counter", clock)
        yield clock


@pytest.fixture
def clock() -> Iterator[Clock]:
    with set_clock() as clock:
        yield clock


def take_steps(recorder: Recorder, clock: Clock, count: int, seconds: float, **values: float) -> None:
    for _ in range(count):
        with recorder.step_context():
            clock.pass_(seconds)
            recorder.record(**values)  # type: ignore[arg-type]


# ---- time ----------------------------------------------------------------------------------------


def test_phases_are_exclusive_and_nested_time_counts_for_the_inner_one(clock: Clock) -> None:
    recorder = Recorder()
    clock.pass_(1)
    with recorder.step_context():
        with recorder.phase("data"):
            clock.pass_(2)
        clock.pass_(4)
        with recorder.phase("forward"):
            clock.pass_(8)
            with recorder.phase("checkpoint"):
                clock.pass_(16)
            clock.pass_(32)
    clock.pass_(64)
    seconds = recorder.phase_seconds()
    assert {name: value for name, value in seconds.items() if value} == {
        "data": 2,
        "forward": 8 + 32,
        "checkpoint": 16,
        "other": 1 + 4 + 64,  # start-up, inside the step, after it
    }
    assert recorder.lost_seconds() == {
        "startup": 1,
        "data": 2,
        "checkpoint": 16,
        "validation": 0,
        "paused": 0,
        "outside_step": 64,
        "rework": 0,
    }
    assert recorder.goodput() == (4 + 8 + 32) / 127


def test_a_phase_still_running_is_counted_up_to_now(clock: Clock) -> None:
    recorder = Recorder()
    with recorder.phase("validation"):
        clock.pass_(5)
        assert recorder.phase_seconds()["validation"] == 5
        assert recorder.in_step_phase() == "validation"
    assert recorder.in_step_phase() == "startup"


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(KeyError):
        Recorder().phase("lunch")


Act = tuple[str, object]
durations = st.integers(0, 2000)
phase_body: st.SearchStrategy[list[Act]] = st.deferred(
    lambda: st.lists(
        st.one_of(
            st.tuples(st.just("pass"), durations),
            st.tuples(st.sampled_from(PHASES), phase_body),
        ),
        max_size=4,
    )
)
program = st.lists(
    st.one_of(
        st.tuples(st.just("pass"), durations),
        st.tuples(st.sampled_from(PHASES), phase_body),
        st.tuples(st.just("step"), phase_body),
        st.tuples(st.just("abandoned"), phase_body),
        st.tuples(st.just("look"), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(program=program, rework=st.integers(0, 6))
def test_every_second_is_accounted_once_whatever_the_loop_does(program: list[Act], rework: int) -> None:
    """Phases add up to the recorder's age, and productive plus lost time too; no counter ever falls."""
    with set_clock() as clock:
        recorder = Recorder()
        recorder.rework_until_step = rework
        born = clock.now
        expected = dict.fromkeys(PHASES, 0.0)
        seen = recorder.phase_seconds()
        finished = 0

        def run(body: list[Act], where: str) -> None:
            for name, what in body:
                if name == "pass":
                    clock.pass_(what * TICK)  # type: ignore[operator]
                    expected[where] += what * TICK  # type: ignore[operator]
                else:
                    with recorder.phase(name):
                        run(what, name)  # type: ignore[arg-type]

        for name, what in program:
            if name == "step":
                with recorder.step_context():
                    run(what, "other")  # type: ignore[arg-type]
                finished += 1
            elif name == "abandoned":
                with pytest.raises(RuntimeError), recorder.step_context():
                    run(what, "other")  # type: ignore[arg-type]
                    raise RuntimeError
            elif name == "look":
                now = recorder.phase_seconds()
                assert all(now[phase] >= seen[phase] for phase in PHASES)
                seen = now
            else:
                run([(name, what)], "other")
        age = clock.now - born
        recorder.fold()
        assert recorder.steps == finished == recorder.step
        assert recorder.phase_seconds() == expected
        assert sum(expected.values()) == age
        lost = recorder.lost_seconds()
        assert set(lost) == set(LOST_CAUSES)
        assert all(seconds >= 0 for seconds in lost.values())
        assert recorder.goodput() * age + sum(lost.values()) == pytest.approx(age)
        assert (
            recorder.goodput() * age <= sum(expected[name] for name in {*PRODUCTIVE_PHASES, "other"}) + 1e-9
        )


def test_steps_done_again_are_rework_without_the_time_that_is_lost_anyway(clock: Clock) -> None:
    recorder = Recorder()
    recorder.step, recorder.rework_until_step = 10, 12
    for _ in range(3):
        with recorder.step_context():
            with recorder.phase("data"):
                clock.pass_(1)
            with recorder.phase("forward"):
                clock.pass_(3)
    assert recorder.lost_seconds()["rework"] == 2 * 3
    assert recorder.lost_seconds()["data"] == 3
    assert recorder.goodput() == 3 / 12


def test_an_abandoned_step_costs_time_but_is_no_step(clock: Clock) -> None:
    recorder = Recorder()
    take_steps(recorder, clock, 1, 1, samples=8)
    recorder.begin_step()
    recorder.record(loss=3.0, samples=8)
    clock.pass_(2)
    recorder.abandon_step()
    take_steps(recorder, clock, 1, 1)
    recorder.fold()
    assert (recorder.steps, recorder.step, recorder.samples) == (2, 2, 8)
    assert recorder.phase_seconds()["other"] == 4
    assert recorder.step_seconds_sum == 2


def test_a_step_inside_a_phase_does_no_harm(clock: Clock) -> None:
    """Nobody means to write this; it must not end the training."""
    recorder = Recorder()
    with recorder.phase("rollout"):
        clock.pass_(1)
        take_steps(recorder, clock, 2, 2)
        with recorder.phase("data"):
            clock.pass_(4)
        clock.pass_(8)
    recorder.fold()
    assert recorder.steps == 2
    assert sum(recorder.phase_seconds().values()) == 17
    assert recorder.phase_seconds()["data"] == 4


def test_ending_a_step_that_did_not_begin_is_nothing(clock: Clock) -> None:
    recorder = Recorder()
    recorder.end_step()
    recorder.fold()
    assert (recorder.steps, recorder.step) == (0, 0)


def test_phases_without_steps_do_not_pile_up(clock: Clock) -> None:
    """A loop that only reports may enter millions of phases and no step."""
    recorder = Recorder(trace_every=1)
    for _ in range(1000):
        with recorder.phase("data"):
            clock.pass_(TICK)
    recorder.begin_step()
    with recorder.phase("forward"):
        clock.pass_(TICK)
    recorder.end_step()
    for _ in range(1000):
        with recorder.phase("data"):
            clock.pass_(TICK)
    recorder.fold()
    (step,) = recorder.traced_steps()
    assert [name for name, _, _ in step.phases] == ["forward"]
    assert len(recorder._phases) == 1


# ---- reported instead of timed -------------------------------------------------------------------


def test_a_reported_step_without_duration_lasted_since_the_previous_report(clock: Clock) -> None:
    """The first one's duration is unknown: it is a step, but no 0 s enter the histogram."""
    recorder = Recorder()
    clock.pass_(5)
    for _ in range(4):
        recorder.finish_untimed_step(None)
        clock.pass_(2)
    recorder.fold()
    assert recorder.steps == 4
    assert (sum(recorder.bucket_counts), recorder.step_seconds_sum) == (3, 6)
    assert recorder.lost_seconds()["startup"] == 5
    assert recorder.lost_seconds()["outside_step"] == 0
    assert recorder.goodput() == 8 / 13


def test_a_reported_duration_divides_the_time_between_reports(clock: Clock) -> None:
    recorder = Recorder()
    for _ in range(2):
        clock.pass_(4)
        recorder.finish_untimed_step(3.0)
    recorder.fold()
    assert recorder.step_seconds_sum == 6
    assert recorder.lost_seconds()["startup"] == 1
    assert recorder.lost_seconds()["outside_step"] == 1
    assert recorder.phase_seconds()["other"] == 8
    assert recorder.goodput() == 6 / 8


# ---- statistics ----------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 100_000), max_size=40))
def test_every_step_is_in_its_bucket(ticks: list[int]) -> None:
    with set_clock() as clock:
        recorder = Recorder()
        for count, tick in enumerate(ticks):
            take_steps(recorder, clock, 1, tick * TICK)
            if count % 7 == 0:
                recorder.fold()
        recorder.fold()
    expected = [0] * (len(STEP_BUCKETS) + 1)
    for tick in ticks:
        expected[bisect_left(STEP_BUCKETS, tick * TICK)] += 1
    assert recorder.bucket_counts == expected
    assert recorder.step_seconds_sum == sum(ticks) * TICK
    assert list(recorder.recent_seconds) == [tick * TICK for tick in ticks]


def test_steps_that_overflow_the_ring_are_counted_as_dropped(clock: Clock) -> None:
    recorder = Recorder(trace_every=0)
    take_steps(recorder, clock, RING_STEPS + 7, TICK)
    recorder.fold()
    assert (recorder.steps, recorder.dropped) == (RING_STEPS, 7)
    take_steps(recorder, clock, 5, TICK)
    recorder.fold()
    assert (recorder.steps, recorder.dropped) == (RING_STEPS + 5, 7)


def test_a_ring_that_is_just_full_has_dropped_nothing(clock: Clock) -> None:
    recorder = Recorder(trace_every=0)
    take_steps(recorder, clock, RING_STEPS, TICK)
    recorder.fold()
    assert (recorder.steps, recorder.dropped) == (RING_STEPS, 0)


def test_traces_that_nobody_takes_are_counted_as_dropped(clock: Clock) -> None:
    recorder = Recorder(trace_every=1)
    take_steps(recorder, clock, 1500, TICK)
    recorder.fold()
    assert len(recorder.traced_steps()) + recorder.dropped == 1500


def test_samples_per_second_is_an_average_over_the_last_ten_seconds(clock: Clock) -> None:
    recorder = Recorder()
    assert recorder.samples_per_second() == 0
    for _ in range(30):
        take_steps(recorder, clock, 1, 1.0, samples=32)
        recorder.fold()
    assert recorder.samples == 30 * 32
    assert recorder.samples_per_second() == 32
    for _ in range(int(RATE_SECONDS) + 2):
        clock.pass_(1.0)
        recorder.fold()
    assert recorder.samples_per_second() == 0


def test_samples_of_several_micro_batches_add_up_within_a_step(clock: Clock) -> None:
    recorder = Recorder()
    with recorder.step_context():
        recorder.record(samples=4)
        recorder.record(samples=6)
    recorder.fold()
    assert (recorder.samples, recorder.steps) == (10, 1)


def test_the_median_follows_the_steps_and_ignores_the_odd_one(clock: Clock) -> None:
    recorder = Recorder()
    assert recorder.median_step_seconds() == 0
    take_steps(recorder, clock, 9, 0.5)
    take_steps(recorder, clock, 1, 60.0)
    recorder.fold()
    assert recorder.median_step_seconds() == 0.5
    for _ in range(40):
        take_steps(recorder, clock, 3, 2.0)
        recorder.fold()
    assert recorder.median_step_seconds() == pytest.approx(2.0, rel=0.01)


def test_own_time_is_data_rollout_forward_and_what_is_added(clock: Clock) -> None:
    """Neither the exchange in backward, nor a checkpoint in a phase, nor a step without a forward pass."""
    recorder = Recorder()
    assert recorder.own_median_seconds() is None
    for forward in (0.0, 0.25):
        with recorder.step_context():
            for name, seconds in {"data": 0.5, "rollout": 1.0, "forward": forward, "backward": 8.0}.items():
                with recorder.phase(name):
                    clock.pass_(seconds)
            with recorder.phase("data"), recorder.phase("checkpoint"):
                clock.pass_(4.0)
            if forward:
                recorder.add_own(2.0)
                recorder.add_own(-0.125)
        recorder.fold()
        assert recorder.own_median_seconds() == (3.625 if forward else None)
    recorder.own_time_known = False
    assert recorder.own_median_seconds() is None


def test_peaks_are_those_of_the_window(clock: Clock) -> None:
    recorder = Recorder()
    assert (recorder.peak_grad_norm(), recorder.step_time()) == (None, None)
    take_steps(recorder, clock, 1, 5.0, grad_norm=100.0)
    take_steps(recorder, clock, 1, 1.0, grad_norm=2.0)
    take_steps(recorder, clock, 1, 1.0, grad_norm=math.nan)
    recorder.fold()
    assert (recorder.peak_grad_norm(), recorder.step_time()) == (100.0, 5.0)
    clock.pass_(WINDOW_SECONDS - 2.0)  # the spike ended 2 s before the newest step
    recorder.fold()
    assert recorder.peak_grad_norm() == 100.0
    clock.pass_(0.5)
    recorder.fold()
    assert (recorder.peak_grad_norm(), recorder.step_time()) == (2.0, 1.0)
    take_steps(recorder, clock, 1, 1.0, grad_norm=math.inf)
    recorder.fold()
    assert recorder.peak_grad_norm() == math.inf
    clock.pass_(WINDOW_SECONDS + 2)
    recorder.fold()
    assert (recorder.peak_grad_norm(), recorder.step_time()) == (None, None)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 8 * 15).map(lambda eighths: eighths / 8),
            st.sampled_from([None, math.nan, math.inf, 0.0, 1.0, 2.0, 3.0]),
            st.sampled_from([None, math.nan, -math.inf, -1.0, 0.5, 7.0]),
        ),
        max_size=30,
    )
)
def test_peaks_are_the_largest_of_what_a_look_at_every_step_finds(
    steps: list[tuple[float, float | None, float | None]],
) -> None:
    with set_clock() as clock:
        recorder = Recorder()
        seen: list[tuple[float, float, float | None, float | None]] = []
        for seconds, norm, loss in steps:
            values = {"grad_norm": norm, "loss": loss}
            take_steps(
                recorder, clock, 1, seconds, **{name: v for name, v in values.items() if v is not None}
            )
            recorder.fold()
            seen.append((clock.now, seconds, norm, loss))
            within = [one for one in seen if one[0] >= clock.now - WINDOW_SECONDS]
            assert recorder.step_time() == max(took for _, took, _, _ in within)
            norms = [n for *_, n, _ in within if n is not None and n >= 0.0]
            assert recorder.peak_grad_norm() == max(norms, default=None)
            losses = [x for *_, x in within if x is not None and x == x]
            assert recorder.peak_loss() == max(losses, default=None)


def test_a_hanging_step_is_the_slowest_while_it_hangs(clock: Clock) -> None:
    recorder = Recorder()
    take_steps(recorder, clock, 1, 1.0)
    recorder.fold()
    assert recorder.seconds_in_step() is None
    recorder.begin_step()
    clock.pass_(0.5)
    assert (recorder.step_time(), recorder.seconds_in_step()) == (1.0, 0.5)
    clock.pass_(40.0)
    assert (recorder.step_time(), recorder.seconds_in_step()) == (40.5, 40.5)


def test_a_compiler_may_work_in_the_first_step_but_not_for_ever(clock: Clock) -> None:
    recorder = Recorder()
    recorder.first_step_allowance = 300.0
    recorder.begin_step()
    clock.pass_(200.0)
    assert (recorder.step_time(), recorder.seconds_in_step()) == (0.0, 200.0)
    clock.pass_(120.0)
    assert recorder.step_time() == 20.0
    recorder.end_step()
    recorder.fold()
    assert recorder.step_time() == 20.0
    take_steps(recorder, clock, 1, 30.0)
    assert recorder.bucket_counts and recorder.step_time() == 20.0  # until it is folded
    recorder.fold()
    assert recorder.step_time() == 30.0


def test_the_largest_loss_of_the_window_is_kept(clock: Clock) -> None:
    recorder = Recorder()
    recorder.fold()
    assert recorder.peak_loss() is None
    for loss in (1.0, 7.5, math.nan, 2.0):
        take_steps(recorder, clock, 1, 1.0, loss=loss)
    recorder.fold()
    assert recorder.peak_loss() == 7.5
    take_steps(recorder, clock, 1, WINDOW_SECONDS, loss=3.0)
    recorder.fold()
    assert recorder.peak_loss() == 3.0


def test_time_without_a_step_leaves_validation_out(clock: Clock) -> None:
    """A validation that takes an hour is no hang; the time before and after it counts."""
    recorder = Recorder()
    clock.pass_(100.0)
    recorder.fold()
    assert recorder.seconds_since_step() is None  # a first step may compile for long
    take_steps(recorder, clock, 3, 1.0)
    recorder.fold()
    clock.pass_(2.0)
    assert recorder.seconds_since_step() == 2.0
    with recorder.phase("validation"):
        clock.pass_(3600.0)
        assert recorder.seconds_since_step() == 2.0
    clock.pass_(5.0)
    recorder.fold()
    assert recorder.seconds_since_step() == 7.0
    with recorder.step_context():
        clock.pass_(50.0)
        assert recorder.seconds_since_step() == 57.0  # a step that hangs ends nothing
    recorder.fold()
    assert recorder.seconds_since_step() == 0.0


def test_the_mean_loss_is_of_the_finite_ones_since_the_last_look(clock: Clock) -> None:
    recorder = Recorder()
    assert recorder.take_mean_loss() is None
    for loss in (1.0, 2.0, math.nan, 6.0):
        take_steps(recorder, clock, 1, TICK, loss=loss)
    recorder.fold()
    assert recorder.take_mean_loss() == 3.0
    assert recorder.take_mean_loss() is None


def test_the_largest_norm_is_of_those_since_the_last_look(clock: Clock) -> None:
    recorder = Recorder()
    assert recorder.take_peak_grad_norm() is None
    for norm in (1.0, 7.0, math.nan, 2.0):
        take_steps(recorder, clock, 1, TICK, grad_norm=norm)
    recorder.fold()
    assert recorder.take_peak_grad_norm() == 7.0
    assert recorder.take_peak_grad_norm() is None
    take_steps(recorder, clock, 1, TICK, grad_norm=3.0)
    recorder.fold()
    assert recorder.take_peak_grad_norm() == 3.0
    assert recorder.peak_grad_norm() == 7.0, "over the window, as the alerts have it"


# ---- traced steps --------------------------------------------------------------------------------


def test_every_nth_step_is_traced_with_its_phases_at_their_times(clock: Clock) -> None:
    recorder = Recorder(trace_every=3)
    recorder.epoch = 4
    for _ in range(7):
        with recorder.step_context():
            with recorder.phase("data"):
                clock.pass_(0.25)
            with recorder.phase("forward"):
                clock.pass_(0.5)
            recorder.record(loss=1.5)
    recorder.fold()
    steps = recorder.traced_steps()
    assert [(step.step, step.reason, step.epoch, step.loss) for step in steps] == [
        (0, "sampled", 4, 1.5),
        (3, "sampled", 4, 1.5),
        (6, "sampled", 4, 1.5),
    ]
    last = steps[-1]
    assert last.end_ns == recorder.epoch_ns(clock.now)
    assert last.end_ns - last.start_ns == pytest.approx(0.75e9, abs=1e3)
    spans = [(name, end - start) for name, start, end in last.phases]
    assert spans == [("data", pytest.approx(0.25e9, abs=1e3)), ("forward", pytest.approx(0.5e9, abs=1e3))]
    assert last.phases[0][1] == last.start_ns
    assert recorder.traced_steps() == []


def test_a_step_three_times_slower_than_the_median_is_traced(clock: Clock) -> None:
    recorder = Recorder(trace_every=0)
    take_steps(recorder, clock, 20, 0.1)
    recorder.fold()
    take_steps(recorder, clock, 1, 0.29)
    take_steps(recorder, clock, 1, 0.31)
    recorder.fold()
    assert [(step.step, step.reason) for step in recorder.traced_steps()] == [(21, "slow")]


def test_jitter_of_a_tiny_step_is_not_slow(clock: Clock) -> None:
    recorder = Recorder(trace_every=0)
    take_steps(recorder, clock, 20, 0.0001)
    recorder.fold()
    take_steps(recorder, clock, 1, 0.0015)
    recorder.fold()
    assert recorder.traced_steps() == []


@pytest.mark.parametrize(
    "values", [{"loss": math.nan}, {"loss": 1.0, "grad_norm": math.inf}, {"grad_norm": math.nan}]
)
def test_a_nonfinite_step_is_traced(clock: Clock, values: dict[str, float]) -> None:
    recorder = Recorder(trace_every=0)
    take_steps(recorder, clock, 2, 0.1, loss=1.0, grad_norm=1.0)
    take_steps(recorder, clock, 1, 0.1, **values)
    recorder.fold()
    assert [(step.step, step.reason) for step in recorder.traced_steps()] == [(2, "nonfinite")]


def test_a_step_folded_in_the_next_epoch_keeps_its_own(clock: Clock) -> None:
    recorder = Recorder(trace_every=1)
    recorder.epoch = 1
    take_steps(recorder, clock, 1, 0.1)
    recorder.epoch = 2
    recorder.fold()
    assert [step.epoch for step in recorder.traced_steps()] == [1]


def test_an_exemplar_lands_in_the_bucket_of_its_step() -> None:
    recorder = Recorder()
    recorder.attach_exemplar(0.003, "a" * 32, 12.0)
    recorder.attach_exemplar(99.0, "b" * 32, 13.0)
    found = {index: exemplar.trace_id for index, exemplar in recorder.exemplars.items()}
    assert found == {STEP_BUCKETS.index(0.005): "a" * 32, len(STEP_BUCKETS): "b" * 32}


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "records",
    [
        [{"loss": math.nan}],
        [{"grad_norm": -math.inf}],
        [{"loss": math.inf, "grad_norm": math.nan}],
        [{"loss": math.nan}, {"grad_norm": math.nan}],
        [{"loss": math.nan}, {"loss": math.nan}, {"loss": math.nan}],
        [{"loss": torch.tensor(math.nan), "grad_norm": torch.tensor(math.inf)}],
    ],
    ids=str,
)
def test_a_nonfinite_step_is_counted_once_however_it_is_recorded(
    clock: Clock, records: list[dict[str, float]]
) -> None:
    recorder = Recorder()
    take_steps(recorder, clock, 1, TICK, loss=1.0, grad_norm=1.0)
    for expected in (1, 2):
        with recorder.step_context():
            for values in records:
                recorder.record(**values)  # type: ignore[arg-type]
            assert recorder.nonfinite == expected  # at once: the loop may want to stop
    take_steps(recorder, clock, 1, TICK, loss=1.0, grad_norm=1.0)
    assert recorder.nonfinite == 2


@pytest.mark.parametrize(
    "value",
    [
        2.5,
        torch.tensor(2.5),
        torch.tensor([2.5], requires_grad=True),
        torch.tensor(2.5, dtype=torch.bfloat16),
    ],
    ids=lambda value: str(value).replace("\n", ""),
)
def test_numbers_and_one_element_tensors_are_taken(value: object) -> None:
    recorder = Recorder()
    with recorder.step_context():
        recorder.record(loss=value, grad_norm=value, entropy=value)
    assert (recorder.last_loss, recorder.last_grad_norm) == (2.5, 2.5)
    assert type(recorder.last_loss) is float
    assert recorder.train_metric_values() == {"entropy": 2.5}


def test_integers_are_taken_and_values_that_are_no_number_are_left_out() -> None:
    recorder = Recorder()
    recorder.record(loss=3, entropy=1, wrong="text", many=torch.zeros(2))
    assert recorder.last_loss == 3.0
    assert recorder.train_metric_values() == {"entropy": 1.0}


def test_a_recorded_tensor_keeps_no_graph_alive() -> None:
    recorder = Recorder()
    weight = torch.ones(1, requires_grad=True)
    recorder.record(loss=(weight * 2).sum(), entropy=(weight * 3).sum())
    assert not recorder.train_metrics["entropy"].requires_grad


# ---- threads -------------------------------------------------------------------------------------


@pytest.fixture
def hurried_threads() -> Iterator[None]:
    """Threads take turns a thousand times more often than usual, inside garbage collections too."""
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(50, *threshold[1:])
    gc.callbacks.append(_some_python)
    yield
    gc.callbacks.remove(_some_python)
    gc.set_threshold(*threshold)
    sys.setswitchinterval(interval)


def _some_python(phase: str, info: dict[str, int]) -> None:
    """Runs within a garbage collection; threads may take turns here."""
    for _ in range(20):
        str(phase)


@contextmanager
def meanwhile(look: Callable[[], None]) -> Iterator[list[BaseException]]:
    """Call `look` over and over on another thread."""
    stop, failures, looked = threading.Event(), list[BaseException](), threading.Event()

    def run() -> None:
        try:
            while not stop.is_set():
                look()
                looked.set()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="meanwhile")
    thread.start()
    try:
        wait_for(lambda: looked.is_set() or failures, "the other thread's first look")
        yield failures
    finally:
        stop.set()
        thread.join()


def test_folding_while_the_loop_records_loses_nothing(hurried_threads: None) -> None:
    recorder = Recorder(trace_every=50)
    traced = 0

    def look() -> None:
        nonlocal traced
        recorder.fold()
        traced += len(recorder.traced_steps())
        recorder.peak_grad_norm()
        recorder.step_time()
        recorder.train_metric_values()

    steps = 20_000
    with meanwhile(look) as failures:
        for step in range(steps):
            with recorder.step_context():
                with recorder.phase("forward"):
                    pass
                recorder.record(loss=1.0, grad_norm=2.0, samples=3, **{f"m{step % 300}": 1.0})
    look()
    assert failures == []
    assert recorder.steps == sum(recorder.bucket_counts) == steps
    assert recorder.samples == 3 * steps
    assert recorder.dropped == 0
    assert traced >= steps // 50


def test_no_counter_of_seconds_falls_while_the_loop_changes_phases(hurried_threads: None) -> None:
    """Prometheus takes a fall for a restart and counts the whole value again."""
    recorder = Recorder()
    seen = {**recorder.phase_seconds(), **recorder.lost_seconds()}

    def look() -> None:
        nonlocal seen
        now = {**recorder.phase_seconds(), **recorder.lost_seconds()}
        fell = {name: (seen[name], now[name]) for name in seen if now[name] < seen[name]}
        assert not fell
        seen = now

    with meanwhile(look) as failures:
        for _ in range(20_000):
            with recorder.step_context():
                for name in ("data", "forward", "backward", "optimizer"):
                    with recorder.phase(name):
                        pass
    assert failures == []
