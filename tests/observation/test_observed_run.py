"""observe() around anybody's loop: any loader, any parts, resumed exactly, and nothing left when it ends."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from waiting import wait_for

from obsinfra.backup.compare import differences
from obsinfra.catalog import metrics as catalog
from obsinfra.config.settings import Settings
from obsinfra.control.client import send_command
from obsinfra.control.command import new_command
from obsinfra.control.history import events_of
from obsinfra.errors import CheckpointError, ConfigError, NonFiniteLossError, RunBusyError
from obsinfra.observation import ObservedRun, observe

QUIET = {"disable_monitoring": True}


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    present = set(threading.enumerate())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.excepthook
    yield
    assert [
        t.name for t in threading.enumerate() if t not in present and t.name.startswith("obsinfra-")
    ] == []
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert sys.excepthook is hook
    assert signal.set_wakeup_fd(-1) == -1


class Loop:
    """A plain loop over `loader`, from the same seed every time, with dropout and Python's own randomness."""

    def __init__(self, loader: Iterable[Any]) -> None:
        torch.manual_seed(7)
        random.seed(7)
        self.loader = loader
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.losses: list[float] = []

    def train(self, run: ObservedRun, epochs: int = 3, stop_at: int | None = None) -> None:
        for _ in run.epochs(epochs):
            for batch in run.steps(self.loader):
                self.step(run, batch[0] if isinstance(batch, (list, tuple)) else batch)
                if run.step + 1 == stop_at:
                    run.request_stop("enough")
        run.finish()

    def step(self, run: ObservedRun, inputs: Tensor) -> None:
        loss = (self.model(inputs) * random.uniform(0.5, 1.5) - 1).square().mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.losses.append(loss.item())
        run.record(loss=loss, samples=len(inputs))


def rows(count: int = 12) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(1))


def batches() -> list[Tensor]:
    return list(rows().split(3))


def a_list() -> Iterable[Any]:
    return batches()


class Generated:
    """A new generator for each epoch, which draws from the global generator as it goes."""

    def __iter__(self) -> Iterator[Tensor]:
        for batch in batches():
            yield batch + torch.randn(3)


def shuffled() -> Iterable[Any]:
    return DataLoader(TensorDataset(rows()), batch_size=3, shuffle=True)


def with_a_generator() -> Iterable[Any]:
    generator = torch.Generator().manual_seed(11)
    return DataLoader(TensorDataset(rows()), batch_size=3, shuffle=True, generator=generator)


def with_workers() -> Iterable[Any]:
    return DataLoader(TensorDataset(rows()), batch_size=3, shuffle=True, num_workers=2)


class Stateful:
    """Tells its own position, and would not give the used batches a second time."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.at < 4:
            self.at += 1
            yield batches()[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("stop_at", [1, 4, 6, 11])
@pytest.mark.parametrize("loader", [a_list, Generated, shuffled, with_a_generator, with_workers, Stateful])
def test_a_plain_loop_goes_on_exactly_where_it_was(tmp_path: Path, loader: Any, stop_at: int) -> None:
    """At the first step, at the end of an epoch, in the middle of one, and just before the last step."""
    whole = Loop(loader())
    whole.train(observe(whole.model, whole.optimizer, output_dir=tmp_path, run="whole", **QUIET))

    first = Loop(loader())
    first.train(
        observe(first.model, first.optimizer, output_dir=tmp_path, run="cut", **QUIET), stop_at=stop_at
    )
    torch.manual_seed(99)  # another process has other random states
    second = Loop(loader())
    torch.manual_seed(98)
    random.seed(97)
    run = observe(second.model, second.optimizer, output_dir=tmp_path, run="cut", resume="auto", **QUIET)
    assert run.step == stop_at
    second.train(run)

    assert len(first.losses) == stop_at and len(whole.losses) == 12
    assert first.losses + second.losses == whole.losses
    assert differences(second.model.state_dict(), whole.model.state_dict()) == []
    assert differences(second.optimizer.state_dict(), whole.optimizer.state_dict()) == []


def test_each_start_of_a_plain_loop_is_in_its_history(tmp_path: Path) -> None:
    for stop_at in (3, None):
        loop = Loop(a_list())
        run = observe(loop.model, loop.optimizer, output_dir=tmp_path, run="mine", resume="auto", **QUIET)
        loop.train(run, stop_at=stop_at)
    told = [(event.kind, event.what) for event in events_of(run.folder, None) if event.kind != "checkpoint"]
    assert told == [
        ("start", "training Sequential"),
        ("end", "stopped"),
        ("restart", "resumed from step 3"),
        ("end", "finished"),
    ]


def test_what_the_loop_does_not_tell_comes_from_the_optimizer_or_is_unknown_never_0(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with observe(model, optimizer, output_dir=tmp_path, run="mine", **QUIET) as run:
        shown = [run.monitor.live(0)["latest"]]
        for told in run.steps([{}, {"learning_rate": 0.5, "samples": 8}]):
            run.record(loss=1.0, **told)
            shown.append(run.monitor.live(0)["latest"])
        run.monitor.recorder.fold()
        shown.append(run.monitor.live(0)["latest"])
    assert [now["learning_rate"] for now in shown] == [0.25, 0.25, 0.5, 0.5]
    assert [now["samples_per_second"] is None for now in shown] == [True, True, True, False]


def test_prometheus_gets_no_throughput_of_a_loop_that_tells_no_samples(tmp_path: Path) -> None:
    def exported(run: ObservedRun) -> bool:
        run.monitor.recorder.fold()
        return any(sample.metric is catalog.SAMPLES_PER_SECOND for sample in run.monitor.samples())

    with observe(torch.nn.Linear(2, 1), output_dir=tmp_path, run="mine", **QUIET) as run:
        seen = [exported(run)]
        for told in run.steps([{}, {"samples": 8}]):
            run.record(loss=1.0, **told)
            seen.append(exported(run))
        seen.append(exported(run))
    assert seen == [False, False, False, True]


class StallsFirst(TensorDataset):
    """The worker that loads the first sample has the trainer terminated, and waits while `stall` is there."""

    def __init__(self, stall: Path) -> None:
        super().__init__(rows())
        self.stall = stall

    def __getitem__(self, index: int) -> Any:
        if self.stall.exists():
            os.kill(os.getppid(), signal.SIGTERM)
            threading.Event().wait()
        return super().__getitem__(index)


@pytest.mark.slow
def test_a_wait_for_the_very_first_batch_may_be_left_and_the_order_stays(tmp_path: Path) -> None:
    """The shuffle of the epoch was drawn already when the wait began."""
    stall = tmp_path / "stall"

    def loop() -> Loop:
        loader = DataLoader(StallsFirst(stall), batch_size=3, shuffle=True, num_workers=1)
        return Loop(loader)

    whole = loop()
    whole.train(observe(whole.model, whole.optimizer, output_dir=tmp_path, run="whole", **QUIET))
    first = loop()
    stall.touch()
    first.train(observe(first.model, first.optimizer, output_dir=tmp_path, run="cut", **QUIET))
    assert first.losses == []
    for worker in multiprocessing.active_children():
        worker.terminate()  # as the interpreter does when it ends; the run is over, so this is obeyed
        worker.join(20)
    assert multiprocessing.active_children() == []
    stall.unlink()
    second = loop()
    torch.manual_seed(98)
    run = observe(second.model, second.optimizer, output_dir=tmp_path, run="cut", resume="auto", **QUIET)
    assert run.resumed is not None and run.resumed.info.reason == "signal SIGTERM"
    second.train(run)
    assert second.losses == whole.losses


def test_without_epochs_each_call_of_steps_is_one_and_complete_ones_are_passed_over(tmp_path: Path) -> None:
    def train(run: ObservedRun, loop: Loop, stop_at: int | None = None) -> None:
        for _ in range(3):
            for batch in run.steps(loop.loader):
                loop.step(run, batch)
                if run.step + 1 == stop_at:
                    run.request_stop("enough")
        run.finish()

    whole = Loop(batches())
    train(observe(whole.model, whole.optimizer, output_dir=tmp_path, run="whole", **QUIET), whole)
    first = Loop(batches())
    train(observe(first.model, first.optimizer, output_dir=tmp_path, run="cut", **QUIET), first, 6)
    second = Loop(batches())
    run = observe(second.model, second.optimizer, output_dir=tmp_path, run="cut", resume="auto", **QUIET)
    assert run.position.epoch == 1
    train(run, second)
    assert first.losses + second.losses == whole.losses


def leave_early(run: ObservedRun, loop: Loop, stop_at: int | None = None) -> None:
    """Three of the four batches of each epoch."""
    for _ in range(3):
        for batch in run.steps(loop.loader):
            loop.step(run, batch)
            if run.step + 1 == stop_at:
                run.request_stop("enough")
            elif run.position.batches_done == 2:
                break
    run.finish()


@pytest.mark.parametrize("stop_at", [2, 5, 7])
def test_a_loop_that_leaves_its_data_early_begins_the_next_epoch_and_goes_on_where_it_was(
    tmp_path: Path, stop_at: int
) -> None:
    whole = Loop(Generated())
    run = observe(whole.model, whole.optimizer, output_dir=tmp_path, run="whole", **QUIET)
    leave_early(run, whole)
    assert (run.step, run.position.epoch, run.position.batches_done) == (9, 2, 3)
    first = Loop(Generated())
    leave_early(
        observe(first.model, first.optimizer, output_dir=tmp_path, run="cut", **QUIET), first, stop_at
    )
    second = Loop(Generated())
    random.seed(97)
    run = observe(second.model, second.optimizer, output_dir=tmp_path, run="cut", resume="auto", **QUIET)
    assert (run.step, run.position.batches_done) == (stop_at, stop_at % 3)
    leave_early(run, second)
    assert run.step == 9
    assert first.losses + second.losses == whole.losses


@pytest.mark.parametrize("stop_at", [3, 4, 6, 7, 11])
def test_several_passes_in_an_epoch_go_on_where_they_were(tmp_path: Path, stop_at: int) -> None:
    """A stop inside the first pass, at its end, and in the second, of either epoch."""

    def train(run: ObservedRun, loop: Loop, stop_at: int | None = None) -> None:
        for _ in run.epochs(2):
            for loader in (loop.loader, rows(6).split(3)):
                for batch in run.steps(loader):
                    loop.step(run, batch)
                    if run.step + 1 == stop_at:
                        run.request_stop("enough")
        run.finish()

    whole = Loop(Generated())
    train(observe(whole.model, whole.optimizer, output_dir=tmp_path, run="whole", **QUIET), whole)
    first = Loop(Generated())
    train(observe(first.model, first.optimizer, output_dir=tmp_path, run="cut", **QUIET), first, stop_at)
    second = Loop(Generated())
    random.seed(97)
    run = observe(second.model, second.optimizer, output_dir=tmp_path, run="cut", resume="auto", **QUIET)
    train(run, second)
    assert run.step == 12 and first.losses + second.losses == whole.losses


def test_a_step_that_is_left_counts_if_something_was_recorded_of_it(tmp_path: Path) -> None:
    loop = Loop(batches())
    with observe(loop.model, output_dir=tmp_path, **QUIET) as run:
        for _ in run.steps(loop.loader):
            break
        assert (run.step, run.position.batches_done) == (0, 0)
        for batch in run.steps(loop.loader):
            loop.step(run, batch)
            break
        assert (run.step, run.position.batches_done) == (1, 1)
        assert run.monitor.recorder.seconds_in_step() is None


@pytest.mark.parametrize("how", ["checkpoint", "validation"])
def test_what_is_saved_inside_a_loops_body_has_the_step_that_was_recorded(tmp_path: Path, how: str) -> None:
    def train(run: ObservedRun, loop: Loop, save_at: int | None = None) -> None:
        for _ in run.epochs(3):
            for batch in run.steps(loop.loader):
                step = run.step
                loop.step(run, batch)
                if step == save_at and how == "checkpoint":
                    run.checkpoint()
                    raise KeyError(step)  # what is saved of that is the last snapshot, of the first step
                if step == save_at:
                    with run.validation():
                        os.kill(os.getpid(), signal.SIGTERM)
                        threading.Event().wait(60)
        run.finish()

    whole = Loop(Generated())
    train(observe(whole.model, whole.optimizer, output_dir=tmp_path, run="whole", **QUIET), whole)
    first = Loop(Generated())
    run = observe(first.model, first.optimizer, output_dir=tmp_path, run="cut", **QUIET)
    with contextlib.suppress(KeyError), run:
        train(run, first, save_at=5)
    assert run.step == 6
    second = Loop(Generated())
    random.seed(97)
    run = observe(second.model, second.optimizer, output_dir=tmp_path, run="cut", resume="auto", **QUIET)
    assert run.step == 6
    train(run, second)
    assert first.losses + second.losses == whole.losses


def test_a_loop_inside_a_step_of_another_is_refused(tmp_path: Path) -> None:
    loop = Loop(batches())
    run = observe(loop.model, output_dir=tmp_path, **QUIET)
    with pytest.raises(ConfigError, match=r"steps\(\) was called again inside a step of its own"), run:
        for _ in run.steps(loop.loader):
            for batch in run.steps(loop.loader):
                loop.step(run, batch)


def test_a_loader_that_lost_data_is_refused(tmp_path: Path) -> None:
    first = Loop(batches())
    first.train(observe(first.model, output_dir=tmp_path, run="cut", **QUIET), stop_at=3)
    second = Loop(batches()[:2])
    run = observe(second.model, output_dir=tmp_path, run="cut", resume="auto", **QUIET)
    with (
        pytest.raises(CheckpointError, match="the data ended after 2 batches; 3 of this epoch were used"),
        run,
    ):
        second.train(run)


def test_a_model_alone_is_enough(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    with observe(model, output_dir=tmp_path, **QUIET) as run:
        assert run.folder.id.startswith("Linear-")
        for batch in run.steps(batches()):
            run.record(loss=model(batch).mean())
        assert (run.step, run.monitor.steps_per_epoch) == (4, 4)
    info = run.folder.read_info()
    assert (info.state, info.model, info.reason) == ("finished", "Linear", None)
    assert json.loads((run.folder.root / "progress.json").read_text())["step"] == 4


def test_settings_are_given_by_name_and_checked(tmp_path: Path) -> None:
    with observe(nn.Linear(1, 1), output_dir=tmp_path, keep_checkpoints=7, seed=3, **QUIET) as run:
        assert (run.settings.keep_checkpoints, run.settings.seed) == (7, 3)
    assert "keep_checkpoints = 7" in run.folder.config_toml.read_text()
    with pytest.raises(ConfigError, match="keep_checkpoints = 0"):
        observe(nn.Linear(1, 1), output_dir=tmp_path, keep_checkpoints=0)
    with pytest.raises(ConfigError, match="no_such"):
        observe(nn.Linear(1, 1), output_dir=tmp_path, no_such=1)


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_two_runs_of_a_process_obey_one_signal_and_end_in_any_order(
    tmp_path: Path, first_to_end: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    loops = [Loop(batches()), Loop(batches())]
    both = [observe(loop.model, output_dir=tmp_path, run=f"run{i}", **QUIET) for i, loop in enumerate(loops)]
    os.kill(os.getpid(), signal.SIGTERM)
    for run, loop in zip(both, loops, strict=True):
        loop.train(run) if run is both[first_to_end] else None
    both[1 - first_to_end].finish()
    assert signal.getsignal(signal.SIGTERM) == before and signal.set_wakeup_fd(-1) == -1
    assert [loop.losses for loop in loops] == [[], []]
    ended = both[first_to_end]
    assert ended.stop is not None and ended.stop.exit_code == 128 + signal.SIGTERM
    assert [run.folder.read_info().state for run in both] == [
        "stopped" if run is ended else "finished" for run in both
    ]


def test_what_no_checkpoint_can_hold_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"handle": object()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            """Nothing is ever loaded."""

    with pytest.raises(CheckpointError, match=r"handle is a builtins\.object; .*disable_backups") as caught:
        observe(nn.Linear(1, 1), output_dir=tmp_path, extra={"mine": Odd()}, **QUIET)
    assert caught.value.exit_code == 2 and list(tmp_path.iterdir()) == []
    unsaved = {**QUIET, "disable_backups": True}
    with observe(nn.Linear(1, 1), output_dir=tmp_path, extra={"mine": Odd()}, **unsaved) as run:
        assert list(run.steps(range(3))) == [0, 1, 2]


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"203\.0\.113\.7"):
        observe(nn.Linear(1, 1), output_dir=tmp_path, metrics_host="203.0.113.7")
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with observe(nn.Linear(1, 1), output_dir=tmp_path, run="r", **QUIET) as run:
        with pytest.raises(RunBusyError, match=f"in use by process {os.getpid()}"):
            observe(nn.Linear(1, 1), output_dir=tmp_path, run="r", resume="auto", **QUIET)
        assert run.folder.read_info().restarts == 0
        run.checkpoint()
    with observe(nn.Linear(1, 1), output_dir=tmp_path, run="r", resume="auto", **QUIET) as again:
        assert again.folder.read_info().restarts == 1


def test_an_error_of_the_loop_is_recorded_and_the_last_good_state_saved(tmp_path: Path) -> None:
    loop = Loop(batches())
    run = observe(loop.model, loop.optimizer, output_dir=tmp_path, run="r", snapshot_seconds=1e-9, **QUIET)
    with pytest.raises(ZeroDivisionError), run:
        for step, batch in enumerate(run.steps(loop.loader)):
            loop.step(run, batch)
            1 / (2 - step)
    assert run.keeper.backup is not None
    (emergency,) = run.keeper.backup.list()
    assert (emergency.kind, emergency.step) == ("emergency", 2)
    assert emergency.reason == "ZeroDivisionError: division by zero"
    assert (run.folder.read_info().state, run.folder.read_info().reason) == ("failed", emergency.reason)


def test_a_nan_loss_stops_a_plain_loop_with_the_state_before_it(tmp_path: Path) -> None:
    loop = Loop(batches())
    run = observe(loop.model, loop.optimizer, output_dir=tmp_path, snapshot_seconds=1e-9, **QUIET)
    with pytest.raises(NonFiniteLossError, match=r"before step 3: not finite; .* \(step 2\) was saved"), run:
        for batch in run.steps(loop.loader):
            loop.step(run, batch * (float("nan") if run.step == 2 else 1.0))
    assert run.keeper.backup is not None
    saved = run.keeper.backup.load()
    assert saved.info.step == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.state["model"].values())


def test_regular_checkpoints_are_not_made_of_a_spoiled_state(tmp_path: Path) -> None:
    loop = Loop(batches())
    options = {"checkpoint_seconds": 1e-9, "on_nonfinite": "continue", **QUIET}
    with observe(loop.model, loop.optimizer, output_dir=tmp_path, keep_checkpoints=9, **options) as run:
        for batch in run.steps(loop.loader):
            loop.step(run, batch * (float("nan") if run.step == 2 else 1.0))
    assert run.keeper.backup is not None
    assert [manifest.step for manifest in run.keeper.backup.list()] == [1, 2]


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_iteration_after_the_step_with_a_checkpoint(
    tmp_path: Path, name: str, code: int
) -> None:
    loop = Loop(batches())
    with observe(loop.model, loop.optimizer, output_dir=tmp_path, **QUIET) as run:
        for _ in run.epochs(3):
            for batch in run.steps(loop.loader):
                loop.step(run, batch)
                if run.step == 5:
                    signal.raise_signal(signal.Signals[name])
        assert run.stop is not None
        assert (run.step, run.stop.reason, run.stop.exit_code) == (6, f"signal {name}", code)
        assert run.keeper.backup is not None
        (emergency,) = run.keeper.backup.list()
        assert (emergency.kind, emergency.step, emergency.reason) == ("emergency", 6, f"signal {name}")
    assert run.folder.read_info().state == "stopped"


def test_a_signal_before_the_first_step_is_obeyed_before_it(tmp_path: Path) -> None:
    loop = Loop(batches())
    with observe(loop.model, loop.optimizer, output_dir=tmp_path, **QUIET) as run:
        signal.raise_signal(signal.SIGTERM)
        loop.train(run)
    assert loop.losses == []
    assert run.stop is not None and run.stop.exit_code == 143


def test_a_signal_leaves_a_validation_and_puts_its_randomness_back(tmp_path: Path) -> None:
    loop = Loop(batches())
    with observe(loop.model, loop.optimizer, output_dir=tmp_path, **QUIET) as run:
        for _ in run.epochs(3):
            for batch in run.steps(loop.loader):
                loop.step(run, batch)
            before = torch.get_rng_state()
            with run.validation():
                torch.rand(5)
                signal.raise_signal(signal.SIGTERM)
                raise AssertionError("the validation went on")
            assert torch.equal(torch.get_rng_state(), before)
        assert run.stop is not None and run.position.exhausted
        assert run.monitor.recorder.in_step_phase() == "outside_step"


def test_a_signal_just_before_a_validation_is_obeyed_first(tmp_path: Path) -> None:
    loop = Loop(batches())
    with observe(loop.model, loop.optimizer, output_dir=tmp_path, **QUIET) as run:
        for _ in run.epochs(3):
            for batch in run.steps(loop.loader):
                loop.step(run, batch)
            signal.raise_signal(signal.SIGTERM)
            with run.validation():
                assert run.stop is not None
        assert run.step == 4


def test_an_error_inside_a_validation_is_the_loops_to_see(tmp_path: Path) -> None:
    with observe(nn.Linear(1, 1), output_dir=tmp_path, **QUIET) as run:
        with pytest.raises(KeyError), run.validation():
            raise KeyError("x")
        assert run.monitor.recorder.in_step_phase() != "validation"


def test_a_command_is_obeyed_between_two_steps_and_a_failing_one_does_not_end_the_training(
    tmp_path: Path,
) -> None:
    loop = Loop(batches())
    acks: list[Any] = []

    def ask() -> None:
        for action in ("checkpoint", "emergency_checkpoint"):
            acks.append(send_command(run.folder, new_command("r", action, source="test")))

    with observe(loop.model, loop.optimizer, output_dir=tmp_path, run="r", **QUIET) as run:
        asking = threading.Thread(target=ask)
        for epoch in run.epochs(100_000):
            for batch in run.steps(loop.loader):
                loop.step(run, batch)
            if epoch == 0:
                asking.start()
            if not asking.is_alive() and epoch:
                break
        asking.join()
    assert [ack.state for ack in acks] == ["done", "done"]
    assert run.stop is None


def test_a_forked_child_neither_ends_the_run_nor_holds_its_doors(tmp_path: Path) -> None:
    """Not even one that ends like a program of its own, with everything that runs at exit."""
    with observe(nn.Linear(1, 1), output_dir=tmp_path, metrics_port=0) as run:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        child = context.Process(target=_look_around, args=(theirs, run), daemon=True)
        child.start()
        assert ours.poll(20)
        held = ours.recv()
        child.join(20)
        assert child.exitcode == 0
        assert held == []
        assert run.folder.read_info().state == "starting"
        with pytest.raises(RunBusyError):
            observe(nn.Linear(1, 1), output_dir=tmp_path, run=run.folder.id, resume=run.folder.id)


def _look_around(pipe: Any, run: ObservedRun) -> None:
    """In the child: sockets that listen, and an attempt to end the run."""
    import psutil

    listening = [
        str(c.laddr)
        for c in psutil.Process().net_connections("all")
        if c.status == "LISTEN" or c.laddr == str(run.folder.socket)
    ]
    run.finish()
    run.fail(RuntimeError("in the child"))
    pipe.send(listening)


def test_a_child_of_the_loop_can_be_terminated_and_a_loader_worker_goes_on(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with observe(nn.Linear(1, 1), output_dir=tmp_path, **QUIET) as run:
        child = context.Process(target=threading.Event().wait, daemon=True)
        child.start()
        child.terminate()
        child.join(20)
        assert child.exitcode == -signal.SIGTERM

        loader = DataLoader(TensorDataset(rows(300)), batch_size=1, num_workers=1)
        seen = 0
        for _ in run.steps(loader):
            if seen == 0:
                (worker,) = multiprocessing.active_children()
                os.kill(worker.pid or 0, signal.SIGTERM)
            seen += 1
        assert seen == 300


@pytest.mark.slow
def test_an_uncaught_error_and_the_end_of_the_program_are_recorded(tmp_path: Path) -> None:
    """Without a with statement: by sys.excepthook, and by atexit."""
    program = (
        "import sys, torch, obsinfra\n"
        "run = obsinfra.observe(torch.nn.Linear(1, 1), run=sys.argv[1], output_dir=sys.argv[2],\n"
        "    metrics_port=0)\n"
        "for batch in run.steps([1, 2, 3]):\n"
        "    if batch == 3 and sys.argv[1] == 'fails':\n"
        "        raise ValueError('of the loop')\n"
    )
    for name in ("fails", "ends"):
        done = subprocess.run(
            [sys.executable, "-c", program, name, str(tmp_path)], capture_output=True, text=True, check=False
        )
        info = json.loads((tmp_path / name / "run.json").read_text())
        if name == "fails":
            assert done.returncode == 1 and done.stderr.rstrip().endswith("ValueError: of the loop")
            assert (info["state"], info["reason"]) == ("failed", "ValueError: of the loop")
        else:
            assert done.returncode == 0 and done.stderr == ""
            assert (info["state"], info["reason"]) == ("finished", None)
        assert info["ended"]


def test_progress_is_noted_while_the_loop_runs(tmp_path: Path) -> None:
    with observe(nn.Linear(1, 1), output_dir=tmp_path, metrics_port=0, sample_seconds=0.1) as run:
        progress = run.folder.root / "progress.json"
        for _ in run.epochs():
            for _ in run.steps([1]):
                pass
            if progress.exists() and json.loads(progress.read_text())["step"] > 0:
                run.request_stop("seen")
        assert run.stop is not None
    wait_for(lambda: run.folder.read_info().state == "stopped", "the end")


def test_what_a_call_names_goes_on_top_of_settings_given_whole(tmp_path: Path) -> None:
    """`run` and others beside `settings` were left out once, without a word."""
    settings = Settings(output_dir=tmp_path, disable_monitoring=True, trace_every=7)
    model = nn.Linear(2, 1)
    with observe(model, run="named", settings=settings, trace_every=9) as run:
        assert (run.folder.id, run.settings.trace_every) == ("named", 9)
        assert run.settings.disable_monitoring
    assert settings.trace_every == 7 and settings.run is None
    with pytest.raises(ConfigError, match="trace_every = -1"):
        observe(model, settings=settings, trace_every=-1)
    with pytest.raises(ConfigError, match="trace_evry"):
        observe(model, settings=settings, trace_evry=1)
