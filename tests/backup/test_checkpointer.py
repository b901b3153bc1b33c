"""The checkpointer: snapshots that wait for nothing but a copy, commits that are neither lost nor skipped."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from crashing_writer import start
from same import same, small_state
from waiting import wait_for

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.checkpointer import Checkpointer, create_checkpointer, wait_for_heir
from obsinfra.backup.commit_queue import PendingCommit
from obsinfra.backup.committer import ATTEMPTS
from obsinfra.backup.retention import Retention
from obsinfra.backup.store import CheckpointStore
from obsinfra.errors import CheckpointError

SECONDS = 60.0


class Watched:
    """A checkpointer and the events it told."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.root = root
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        self.it = create_checkpointer(
            root, run="r", on_event=lambda event, facts: self.events.append((event, facts)), **options
        )

    def take(self, step: int, **more: Any) -> bool:
        return self.it.snapshot(small_state(step), step=step, epoch=0, **more)

    def told(self, event: str) -> list[Mapping[str, Any]]:
        return [facts for name, facts in self.events if name == event]

    def writer(self) -> int:
        return wait_for(lambda: self.it.writer_pid, "a writer")

    def committed(self) -> list[tuple[str, int]]:
        """Kind and step of every checkpoint in the order they were committed."""
        found = create_backup_system(self.root).list()
        found.sort(key=lambda info: info.created_at)
        for info in found:
            assert same(small_state(info.step), create_backup_system(self.root).load(info.path).state)
        return [(info.kind, info.step) for info in found]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    made = Watched(tmp_path / "store")
    yield made
    made.it.close(0)


@contextlib.contextmanager
def held_back(root: Path) -> Iterator[None]:
    """The writer's commit waits for the store's lock meanwhile."""
    with CheckpointStore(root).writing():
        yield


def waits_for_the_store(watched: Watched) -> None:
    inode = (watched.root / ".writer").stat().st_ino

    def waiting() -> bool:
        locks = Path("/proc/locks").read_text().splitlines()
        return any("->" in line and f":{inode} " in line for line in locks)

    wait_for(waiting, "the writer waits for the store")


# ---- what a snapshot is ----------------------------------------------------------------------------------


def test_a_step_taken_while_the_save_runs_does_not_leak_into_it(watched: Watched) -> None:
    """CPU tensors that `async_save` keeps by reference: PyTorch issue 144657."""
    state = small_state(1)
    with held_back(watched.root):
        assert watched.it.snapshot(state, step=1, epoch=0)
        pending = watched.it.commit("regular", "test")
        waits_for_the_store(watched)
        for tensor in (state["weight"], state["bias"], state["frozen"]):
            tensor.fill_(-1)
        state["seed"] = -1
    saved = pending.wait(SECONDS)
    assert (saved.kind, saved.step, saved.epoch) == ("regular", 1, 0)
    assert same(small_state(1), create_backup_system(watched.root).load(saved.path).state)


def test_the_manifest_says_what_was_asked(watched: Watched) -> None:
    watched.it.snapshot({"w": torch.ones(3)}, step=7, epoch=2, metrics={"loss": 0.25})
    saved = watched.it.commit("final", "the end", attributes={"note": [1]}).wait(SECONDS)
    info = create_backup_system(watched.root).load().info
    assert (info.path, info.id, info.run, info.kind, info.step, info.epoch) == (
        saved.path,
        saved.id,
        "r",
        "final",
        7,
        2,
    )
    assert (info.metrics, info.reason, info.attributes) == (
        {"loss": 0.25},
        "the end",
        {"resumable": True, "note": [1]},
    )
    assert info.versions["torch"] == torch.__version__
    assert (saved.bytes_total, saved.bytes_written) == (12, 12) and saved.duration_seconds > 0


def test_both_slots_in_use_means_no_snapshot_unless_it_may_wait(watched: Watched) -> None:
    with held_back(watched.root):
        assert watched.take(1)
        first = watched.it.commit("regular", "first")
        waits_for_the_store(watched)
        assert watched.take(2), "one is written, the other is free"
        assert not watched.take(3), "the older one is being written"
        second = watched.it.commit("regular", "second")
        assert not watched.take(3) and watched.it.newest_step == 2
    assert watched.take(3, wait=SECONDS) and watched.it.newest_step == 3
    assert [first.wait(SECONDS).step, second.wait(SECONDS).step] == [1, 2]
    assert watched.it.last_snapshot_seconds > 0


def test_an_emergency_takes_the_newest_state_and_is_committed_next(watched: Watched) -> None:
    """Not skipped because another save is in flight; a save that has not begun gets the newer state too."""
    with held_back(watched.root):
        watched.take(1)
        first = watched.it.commit("regular", "in flight")
        waits_for_the_store(watched)
        watched.take(2)
        queued = watched.it.commit("regular", "queued")
        assert not watched.take(3)
        assert watched.take(3, urgent=True)
        emergency = watched.it.commit("emergency", "gpu on fire")
    assert [pending.wait(SECONDS).step for pending in (first, emergency, queued)] == [1, 3, 3]
    assert watched.committed() == [("regular", 1), ("emergency", 3), ("regular", 3)]


def test_a_best_checkpoint_keeps_its_own_state(watched: Watched) -> None:
    with held_back(watched.root):
        watched.take(1)
        watched.it.commit("regular", "in flight")
        waits_for_the_store(watched)
        watched.take(2)
        best = watched.it.commit("best", "best so far")
        assert not watched.take(3, urgent=True)
    assert best.wait(SECONDS).step == 2
    assert watched.take(3, urgent=True, wait=SECONDS)


def test_an_urgent_snapshot_that_fails_fails_the_commit_whose_place_it_took(watched: Watched) -> None:
    with held_back(watched.root):
        watched.take(1)
        first = watched.it.commit("regular", "in flight")
        waits_for_the_store(watched)
        watched.take(2)
        queued = watched.it.commit("regular", "queued", sound=True)
        with pytest.raises(CheckpointError):
            watched.it.snapshot({"bad": object()}, step=3, epoch=0, urgent=True)
        assert watched.it.newest_step == 2, "nothing was copied, so nothing was lost"
    assert [first.wait(SECONDS).step, queued.wait(SECONDS).step] == [1, 2]


def test_the_newest_sound_one_is_kept_and_can_be_asked_for(watched: Watched) -> None:
    assert watched.take(1)
    for step in (2, 3, 4):
        assert watched.take(step, sound=False)
    assert watched.it.commit("emergency", "as it is").wait(SECONDS).step == 4
    assert watched.it.commit("emergency", "as it was", sound=True).wait(SECONDS).step == 1


@pytest.mark.parametrize("sound", [True, False])
def test_nothing_to_commit_is_an_error(watched: Watched, sound: bool) -> None:
    with pytest.raises(CheckpointError, match=r"no (sound )?snapshot"):
        watched.it.commit("regular", "too early", sound=sound)
    watched.take(1, sound=False)
    with pytest.raises(CheckpointError, match="no sound snapshot"):
        watched.it.commit("regular", "unsound", sound=True)


@pytest.mark.parametrize(("bad", "says"), [({"x": object()}, "not JSON"), ({"x": "y" * 70000}, "bytes")])
def test_attributes_that_cannot_be_stored_are_an_error_at_once(
    watched: Watched, bad: dict[str, Any], says: str
) -> None:
    watched.take(1)
    with pytest.raises(CheckpointError, match=says):
        watched.it.commit("regular", "test", attributes=bad)


# ---- commits from any thread -----------------------------------------------------------------------------


def test_many_threads_commit_and_each_hears_of_its_own(watched: Watched) -> None:
    watched.take(1)
    done: list[PendingCommit] = []

    def ask(number: int) -> None:
        pending = watched.it.commit("regular", f"from {number}")
        pending.add_done_callback(done.append)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: len(done) == 12, "every commit is done")
    assert sorted(pending.reason for pending in done) == sorted(f"from {n}" for n in range(12))
    assert len({pending.wait(0).path for pending in done}) == 12 and all(pending.done for pending in done)
    late: list[PendingCommit] = []
    done[0].add_done_callback(late.append)
    assert late == [done[0]]


def test_a_callback_may_commit_again_and_one_that_fails_harms_nobody(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "concurrent.futures")
    watched.take(1)
    again: list[PendingCommit] = []
    first = watched.it.commit("regular", "one")
    first.add_done_callback(lambda _: again.append(watched.it.commit("regular", "two")))
    first.add_done_callback(lambda _: 1 / 0)
    first.wait(SECONDS)
    assert wait_for(lambda: again, "the callback ran")[0].wait(SECONDS).step == 1


def test_an_event_sink_that_fails_is_logged_and_harms_nobody(tmp_path: Path) -> None:
    checkpointer = create_checkpointer(tmp_path, on_event=lambda event, facts: 1 / 0)
    checkpointer.snapshot(small_state(), step=1, epoch=0)
    assert checkpointer.commit("regular", "test").wait(SECONDS).step == 1
    assert checkpointer.close()


# ---- the writer's death ----------------------------------------------------------------------------------


def test_a_dead_writer_is_replaced_and_what_it_was_doing_is_done(watched: Watched) -> None:
    with held_back(watched.root):
        watched.take(1)
        pending = watched.it.commit("regular", "test")
        waits_for_the_store(watched)
        watched.take(2)
        queued = watched.it.commit("regular", "queued")
        killed = watched.writer()
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: watched.it.writer_pid not in (None, killed), "another writer")
    assert [pending.wait(SECONDS).step, queued.wait(SECONDS).step] == [1, 2]
    assert watched.it.writer_restarts == 1
    (facts,) = watched.told("writer_died")
    assert (facts["pid"], facts["exit_code"]) == (killed, -signal.SIGKILL)
    assert watched.committed() == [("regular", 1), ("regular", 2)]


def test_an_idle_writers_death_is_noticed(watched: Watched) -> None:
    """Else nobody would inherit a trainer that dies next."""
    watched.take(1)
    for restarts in (1, 2, 3, 4):
        killed = watched.writer()
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda pid=killed: watched.it.writer_pid not in (None, pid), "another writer")  # type: ignore[misc]
        assert watched.it.writer_restarts == restarts


def test_a_writer_that_cannot_be_started_is_replaced_by_the_trainer(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    watched.take(1)
    assert watched.it.commit("regular", "test").wait(SECONDS).step == 1
    assert "No such file" in watched.told("writer_unavailable")[0]["error"]
    assert watched.told("committing_in_trainer") and watched.it.writer_pid is None
    wait_for(lambda: len(watched.told("writer_unavailable")) >= ATTEMPTS, "it rests now")
    monkeypatch.undo()
    watched.take(2)
    assert watched.it.commit("regular", "test").wait(SECONDS).step == 2
    assert len(watched.told("writer_started")) == 1, "it is tried again when there is something to do"
    assert watched.committed() == [("regular", 1), ("regular", 2)]


def test_writers_that_die_one_after_the_other_are_replaced_by_the_trainer(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 3\n")
    broken.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(broken))
    watched.take(1)
    assert watched.it.commit("regular", "test").wait(SECONDS).step == 1
    died = watched.told("writer_died")
    assert {(facts["exit_code"], facts["stderr"]) for facts in died} == {(3, "it is broken")}
    assert watched.told("committing_in_trainer") and watched.committed() == [("regular", 1)]


# ---- errors of the disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("in_trainer", [False, True], ids=["writer", "trainer"])
def test_a_write_that_fails_is_an_error_and_the_next_one_works(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, in_trainer: bool
) -> None:
    if in_trainer:
        monkeypatch.setattr(sys, "executable", "")
        pid = 0
    watched.take(1)
    if not in_trainer:
        pid = watched.writer()
    watched.it.commit("regular", "before").wait(SECONDS)
    watched.take(2)
    limit = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        with pytest.raises(OSError, match="File too large"):
            watched.it.commit("regular", "during").wait(SECONDS)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
    (failed,) = watched.told("commit_failed")
    assert failed["kind"] == "regular" and "File too large" in failed["error"]
    assert watched.it.commit("regular", "after").wait(SECONDS).step == 2
    assert watched.committed() == [("regular", 1), ("regular", 2)] and watched.it.writer_restarts == 0
    assert not list(watched.root.rglob("*.tmp"))


@pytest.mark.parametrize("in_trainer", [False, True], ids=["writer", "trainer"])
def test_what_the_retention_does_not_keep_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_trainer: bool
) -> None:
    if in_trainer:
        monkeypatch.setattr(sys, "executable", "")
    watched = Watched(tmp_path / "store", retention=Retention(keep_last=2))
    for step in range(1, 6):
        watched.take(step)
        watched.it.commit("regular", "test").wait(SECONDS)
    assert watched.it.close()
    assert watched.committed() == [("regular", 4), ("regular", 5)]
    assert [Path(path).stem[:12] for facts in watched.told("pruned") for path in facts["paths"]] == [
        f"{step:012d}" for step in (1, 2, 3)
    ]


# ---- the end ---------------------------------------------------------------------------------------------


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_close_finishes_what_was_asked_and_leaves_nothing_behind(tmp_path: Path) -> None:
    before = open_descriptors()
    watched = Watched(tmp_path / "store")
    watched.take(1)
    pid = watched.writer()
    pending = [watched.it.commit("regular", str(n)) for n in range(3)]
    assert watched.it.close(SECONDS) and watched.it.close()
    assert all(commit.done for commit in pending) and len(watched.committed()) == 3
    assert not psutil.pid_exists(pid) and wait_for_heir(watched.root, 0)
    assert not [thread for thread in threading.enumerate() if thread.name == "obsinfra-checkpointer"]
    assert open_descriptors() == before
    with pytest.raises(CheckpointError, match="closed"):
        watched.take(2)
    with pytest.raises(CheckpointError, match="closed"):
        watched.it.commit("regular", "late")


def test_close_commits_no_snapshot_that_nobody_asked_for(watched: Watched) -> None:
    watched.take(1)
    assert watched.it.close() and watched.committed() == []


def test_close_before_anything_was_done(watched: Watched) -> None:
    assert watched.it.close(0) and not watched.root.exists()


def test_close_right_after_the_first_snapshot_finds_the_writer_wherever_it_is(tmp_path: Path) -> None:
    for number in range(5):
        watched = Watched(tmp_path / str(number))
        watched.take(1)
        assert watched.it.close(SECONDS)


def test_a_close_that_may_not_wait_leaves_the_rest_to_the_writer(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "store")
    with held_back(watched.root):
        watched.take(1)
        in_flight = watched.it.commit("regular", "in flight")
        waits_for_the_store(watched)
        watched.take(2)
        queued = watched.it.commit("regular", "queued")
        assert not watched.it.close(0)
        for pending in (in_flight, queued):
            with pytest.raises(CheckpointError, match="closed before"):
                pending.wait(0)
        assert not wait_for_heir(watched.root, 0)
    assert wait_for_heir(watched.root, SECONDS)
    assert watched.committed() == [("regular", 1), ("emergency", 2)]


def test_nobody_to_wait_for(tmp_path: Path) -> None:
    assert wait_for_heir(tmp_path / "never made", 0)


# ---- forks -----------------------------------------------------------------------------------------------


def fork_then_die(root: Path, pid_file: Path, leaving: bool) -> None:
    """A trainer whose data-loader worker outlives it."""
    checkpointer = create_checkpointer(root)
    checkpointer.snapshot(small_state(1), step=1, epoch=0)
    wait_for(lambda: checkpointer.writer_pid, "a writer")
    worker = os.fork()
    if worker == 0:
        try:
            checkpointer.snapshot(small_state(2), step=2, epoch=0)
        except CheckpointError:
            assert checkpointer.close()
            pid_file.with_suffix(".tmp").write_text(str(os.getpid()))
            pid_file.with_suffix(".tmp").rename(pid_file)
            signal.pause()
    wait_for(pid_file.exists, "the worker is there")
    if leaving:
        checkpointer.close()
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("leaving", [False, True], ids=["killed", "closed"])
def test_a_forked_worker_holds_nothing(tmp_path: Path, leaving: bool) -> None:
    root, pid_file = tmp_path / "store", tmp_path / "pid"
    process = start(fork_then_die, root, pid_file, leaving)
    process.join(SECONDS)
    assert process.exitcode == (0 if leaving else -signal.SIGKILL)
    worker = psutil.Process(int(pid_file.read_text()))
    try:
        assert wait_for_heir(root, SECONDS), "the worker neither holds the lock nor keeps the line open"
        assert worker.is_running()
    finally:
        worker.kill()
    steps = [info.step for info in create_backup_system(root).list()]
    assert steps == ([] if leaving else [1])


@pytest.mark.slow
def test_forks_while_writers_start_and_end_leak_nothing(tmp_path: Path) -> None:
    """The window in which a descriptor exists that the child would not know of."""
    stop = threading.Event()
    children: list[int] = []
    receiving, sending = os.pipe()

    def fork() -> None:
        while not stop.is_set() and len(children) < 100:
            pid = os.fork()
            if pid == 0:
                os.close(sending)
                os.read(receiving, 1)
                os._exit(0)
            children.append(pid)

    forking = threading.Thread(target=fork)
    forking.start()
    try:
        for number in range(6):
            root = tmp_path / str(number)
            checkpointer = create_checkpointer(root)
            checkpointer.snapshot(small_state(), step=1, epoch=0)
            checkpointer.commit("regular", "test").wait(SECONDS)
            assert checkpointer.close(SECONDS)
            assert wait_for_heir(root, SECONDS)
    finally:
        stop.set()
        forking.join()
        os.close(sending)
        os.close(receiving)
        for pid in children:
            os.waitpid(pid, 0)


# ---- memory ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_is_flat_over_300_saves(watched: Watched) -> None:
    """Host memory grew with every `async_save`: PyTorch issue 170163."""
    state = {f"w{i}": torch.randn(2**18) for i in range(4)}
    backup = create_backup_system(watched.root, keep_last=1)
    processes = [psutil.Process(), psutil.Process(wait_for_writer(watched.it, state))]

    def memory() -> int:
        return sum(process.memory_info().rss for process in processes)

    after: list[int] = []
    for step in range(300):
        state[f"w{step % 4}"].normal_()
        assert watched.it.snapshot(state, step=step, epoch=0, wait=SECONDS)
        watched.it.commit("regular", "test").wait(SECONDS)
        if step % 10 == 9:
            backup.prune()
            after.append(memory())
    assert watched.it.writer_restarts == 0
    size = sum(tensor.nbytes for tensor in state.values())
    assert max(after[20:]) - max(after[3:10]) < size, [value / 1e6 for value in after]


def wait_for_writer(checkpointer: Checkpointer, state: Mapping[str, Any]) -> int:
    checkpointer.snapshot(state, step=0, epoch=0)
    checkpointer.commit("regular", "warm up").wait(SECONDS)
    pid = checkpointer.writer_pid
    assert pid is not None
    return pid
