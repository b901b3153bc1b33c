"""Several writers and readers of one store, in threads, backup systems and processes."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crashing_writer import save_many, start
from faulty_files import QuickFiles, WatchedFiles
from same import same, small_state
from waiting import wait_for

from obsinfra.backup.backup_system import BackupSystem, create_backup_system
from obsinfra.errors import CheckpointError


@pytest.fixture
def _restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def check_all_sound(root: Path) -> None:
    backup = create_backup_system(root)
    assert [result.problem for result in backup.verify()] == [None] * len(backup.list())
    assert not list(root.rglob("*.tmp"))


@pytest.mark.usefixtures("_restless")
@pytest.mark.parametrize("shared", [True, False], ids=["one system", "a system each"])
def test_threads_save_one_after_the_other(tmp_path: Path, shared: bool) -> None:
    log: list[tuple[int, str, Path]] = []
    files = WatchedFiles(lambda operation, path: log.append((threading.get_ident(), operation, path)))
    systems = [create_backup_system(tmp_path / "store", files=files)] * 2
    if not shared:
        systems[1] = create_backup_system(tmp_path / "store", files=files)

    def save(backup: BackupSystem, steps: range) -> None:
        for step in steps:
            backup.save(small_state(step // 2), step=step, epoch=0)

    threads = [
        threading.Thread(target=save, args=(backup, range(first, 40, 2)))
        for first, backup in enumerate(systems)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    switches = [(before[1:], after[1:]) for before, after in itertools.pairwise(log) if before[0] != after[0]]
    ended = ("sync", tmp_path / "store" / "manifests")
    assert all(before == ended for before, _ in switches)
    check_all_sound(tmp_path / "store")
    backup = systems[0]
    assert [info.step for info in backup.list()] == list(range(40))
    for info in backup.list():
        assert same(small_state(info.step // 2), backup.load(info.path).state)
    assert len({info.parent for info in backup.list()}) > 1


def test_a_prune_waits_for_a_save_of_another_system_to_end(tmp_path: Path) -> None:
    """Else it would collect chunks that are written and not named by a manifest yet."""
    root = tmp_path / "store"
    for step in (1, 2):
        create_backup_system(root).save(small_state(step), step=step, epoch=0)
    pruner = create_backup_system(root, keep_last=1)
    thread = threading.Thread(target=pruner.prune)
    at_work = (root / ".writer").stat().st_ino

    def prune_meanwhile(operation: str, path: Path) -> None:
        if path.suffix == ".tmp" and path.parent.name == "manifests" and operation == "write":
            thread.start()
            wait_for(lambda: f":{at_work} " in waiting_locks(), "the prune waits for the lock")

    def waiting_locks() -> str:
        return "".join(line for line in Path("/proc/locks").open() if "->" in line)

    writer = create_backup_system(root, files=WatchedFiles(prune_meanwhile))
    writer.save(small_state(3), step=3, epoch=0)
    thread.join()
    assert [info.step for info in pruner.list()] == [3]
    assert same(small_state(3), pruner.load().state)


def test_a_child_forked_during_a_save_does_not_keep_the_store_locked(tmp_path: Path) -> None:
    """A data loader's worker, started while another thread saves."""
    children: list[tuple[int, int]] = []

    def fork(operation: str, path: Path) -> None:
        if not children:
            receiving, sending = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(sending)
                os.read(receiving, 1)  # until the parent closes its end
                os._exit(0)
            os.close(receiving)
            children.append((pid, sending))

    create_backup_system(tmp_path, files=WatchedFiles(fork)).save(small_state(1), step=1, epoch=0)
    ((pid, sending),) = children
    try:
        saving = threading.Thread(
            target=create_backup_system(tmp_path).save,
            args=(small_state(2),),
            kwargs={"step": 2, "epoch": 0},
            daemon=True,
        )
        saving.start()
        saving.join(20)
        assert not saving.is_alive()
    finally:
        os.close(sending)
        os.waitpid(pid, 0)


@pytest.mark.slow
def test_processes_save_and_prune_the_same_store(tmp_path: Path) -> None:
    """States share chunks, so that one's prune would remove what the other is about to name."""
    root = tmp_path / "store"
    processes = [
        start(save_many, root, list(range(0, 120, 2)), 100),
        start(save_many, root, list(range(1, 120, 2)), 1),
    ]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    check_all_sound(root)
    loaded = create_backup_system(root).load()
    assert loaded.info.step >= 118 and same(small_state(loaded.info.step // 4), loaded.state)


def test_processes_lose_none_of_their_checkpoints(tmp_path: Path) -> None:
    processes = [start(save_many, tmp_path, list(range(first, 60, 2)), 100) for first in (0, 1)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    check_all_sound(tmp_path)
    assert [info.step for info in create_backup_system(tmp_path).list()] == list(range(60))


# ---- readers beside a writer -------------------------------------------------------------------------------


class Overtaken:
    """A reader's store, and a writer that saves a newer state and prunes the older at a chosen call of it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, method: str, *, after: bool) -> None:
        self.writer = create_backup_system(root, keep_last=1, files=QuickFiles())
        self.writer.save(small_state(1), step=1, epoch=0)
        self.reader = create_backup_system(root)
        original = getattr(self.reader.store, method)
        self.calls = 0

        def call(*arguments: Any, **more: Any) -> Any:
            self.calls += 1
            found = original(*arguments, **more) if after else None
            if self.calls == 1:
                self.writer.save(small_state(2), step=2, epoch=0)
                assert len(self.writer.prune()) == 1
            return found if after else original(*arguments, **more)

        monkeypatch.setattr(self.reader.store, method, call)


MOMENTS = [
    ("manifest_paths", True),
    ("read_manifest", False),
    ("read_manifest", True),
    ("read_tensor", False),
]


@pytest.mark.parametrize(("method", "after"), MOMENTS)
def test_load_finds_the_newer_one_when_what_it_had_found_is_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, after: bool
) -> None:
    overtaken = Overtaken(tmp_path, monkeypatch, method, after=after)
    loaded = overtaken.reader.load()
    assert overtaken.calls >= 1
    assert same(small_state(2), loaded.state)
    assert loaded.skipped == (), "what was pruned was not damaged"


@pytest.mark.parametrize(("method", "after"), MOMENTS[:3])
def test_verify_and_list_leave_out_what_is_pruned_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, after: bool
) -> None:
    assert Overtaken(tmp_path / "a", monkeypatch, method, after=after).reader.verify() == []
    listed = Overtaken(tmp_path / "b", monkeypatch, method, after=after).reader.list()
    assert [info.step for info in listed] == ([1] if (method, after) == ("read_manifest", True) else [])


def test_a_named_checkpoint_that_is_pruned_meanwhile_is_an_honest_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overtaken = Overtaken(tmp_path, monkeypatch, "read_tensor", after=False)
    path = overtaken.reader.list()[0].path
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        overtaken.reader.load(path)


def test_readers_beside_a_writer_that_prunes_always_find_a_sound_state(tmp_path: Path) -> None:
    writer = create_backup_system(tmp_path, keep_last=1, files=QuickFiles())
    writer.save(small_state(1), step=1, epoch=0)
    ended = threading.Event()

    def write() -> None:
        for step in range(2, 80):
            writer.save(small_state(step), step=step, epoch=0)
            writer.prune()
        ended.set()

    thread = threading.Thread(target=write)
    thread.start()
    reader = create_backup_system(tmp_path)
    steps = []
    while not ended.is_set():
        loaded = reader.load()
        assert loaded.skipped == () and same(small_state(loaded.info.step), loaded.state)
        steps.append(loaded.info.step)
        assert all(result.problem is None for result in reader.verify())
        for info in reader.list():
            try:
                state = reader.load(info.path).state
            except CheckpointError:
                assert not info.path.exists()
            else:
                assert same(small_state(info.step), state)
    thread.join()
    assert steps == sorted(steps) and len(set(steps)) > 1
    assert reader.load().info.step == 79
