"""Whatever fails, dies or loses power in a save or a prune: the store opens, and what it lists is sound."""

from __future__ import annotations

import errno
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from crashing_writer import CONTEXT, save_and_prune, save_until_killed, start
from faulty_files import FailingFiles, ForgetfulFiles, PowerCut, QuickFiles, WatchedFiles, tree
from same import same, small_state

from obsinfra.backup.backup_system import BackupSystem, create_backup_system

FAULTS = [errno.ENOSPC, errno.EIO]


def operations_of(
    action: Callable[[BackupSystem], object], root: Path, scratch: Path
) -> list[tuple[str, Path]]:
    """What `action` does to the disk, found out on a copy of the store."""
    if root.exists():
        shutil.copytree(root, scratch)
    files = WatchedFiles()
    action(create_backup_system(scratch, keep_last=1, files=files))
    shutil.rmtree(scratch)
    return files.operations


def save_second(backup: BackupSystem) -> None:
    backup.save(small_state(2), step=2, epoch=0)


def save_second_and_prune(backup: BackupSystem) -> None:
    save_second(backup)
    backup.prune()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A store with one checkpoint: `small_state(1)` at step 1."""
    root = tmp_path / "base"
    create_backup_system(root).save(small_state(1), step=1, epoch=0)
    return root


def check_opens_and_goes_on(root: Path) -> int:
    """Every listed checkpoint is sound, and the newest loads; then a new writer cleans up and saves.

    Returns:
        The newest step found, 0 when there was none.
    """
    backup = create_backup_system(root, keep_last=1, files=QuickFiles())
    assert [result.problem for result in backup.verify()] == [None] * len(backup.list())
    found = 0
    if backup.list():
        loaded = backup.load()
        found = loaded.info.step
        assert same(small_state(found), loaded.state)
        assert loaded.skipped == ()
    backup.save(small_state(found + 1), step=found + 1, epoch=0)
    backup.prune()
    assert same(small_state(found + 1), backup.load().state)
    (kept,) = backup.list()
    assert {name for name in tree(root) if name != ".writer"} == {
        f"manifests/{kept.path.name}",
        *(f"objects/{digest[:2]}/{digest}" for digest in kept.chunks()),
    }
    return found


@pytest.mark.parametrize("code", FAULTS, ids=errno.errorcode.get)
def test_a_save_that_fails_at_any_operation_leaves_the_store_as_it_was(
    tmp_path: Path, base: Path, code: int
) -> None:
    count = len(operations_of(save_second, base, tmp_path / "scratch"))
    assert count > 10
    before = tree(base)
    for at in range(1, count + 1):
        root = shutil.copytree(base, tmp_path / f"store-{at}")
        backup = create_backup_system(root, files=FailingFiles(at, code))
        with pytest.raises(OSError) as caught:
            save_second(backup)
        assert caught.value.errno == code
        assert tree(root) == before, f"operation {at} of {count}"
        assert same(small_state(1), backup.load().state)
        save_second(backup)
        assert same(small_state(2), backup.load().state)
        assert check_opens_and_goes_on(root) == 2


@pytest.mark.parametrize("code", FAULTS, ids=errno.errorcode.get)
def test_a_disk_that_fails_from_any_operation_on_cannot_harm_what_is_there(
    tmp_path: Path, base: Path, code: int
) -> None:
    """Cleaning up fails as well; the next writer does it."""
    count = len(operations_of(save_second, base, tmp_path / "scratch"))
    for at in range(1, count + 1):
        root = shutil.copytree(base, tmp_path / f"store-{at}")
        with pytest.raises(OSError):
            save_second(create_backup_system(root, files=FailingFiles(at, code, lasting=True)))
        found = check_opens_and_goes_on(root)
        # At the very last operation the manifest is in place, and could not be taken back.
        assert found == 1 or (at == count and found == 2), f"operation {at} of {count}"


def test_a_first_save_that_fails_at_any_operation_leaves_an_empty_store(tmp_path: Path) -> None:
    count = len(operations_of(save_second, tmp_path / "none", tmp_path / "scratch"))
    for at in range(1, count + 1):
        root = tmp_path / f"store-{at}"
        backup = create_backup_system(root, files=FailingFiles(at, errno.ENOSPC))
        with pytest.raises(OSError):
            save_second(backup)
        assert backup.list() == [] and set(tree(root)) == {".writer"}
        assert check_opens_and_goes_on(root) == 0


def test_a_prune_that_fails_at_any_operation_harms_nothing(tmp_path: Path, base: Path) -> None:
    save_second(create_backup_system(base))
    count = len(operations_of(BackupSystem.prune, base, tmp_path / "scratch"))
    assert count >= 3
    for at in range(1, count + 1):
        root = shutil.copytree(base, tmp_path / f"store-{at}")
        with pytest.raises(OSError):
            create_backup_system(root, keep_last=1, files=FailingFiles(at, errno.EIO)).prune()
        assert check_opens_and_goes_on(root) == 2


def test_a_failed_save_takes_back_only_what_it_wrote_itself(tmp_path: Path, base: Path) -> None:
    """A damaged chunk of an older checkpoint, written anew on the way, stays as it is needed there."""
    damaged = create_backup_system(base).list()[0].tensors[2].chunks[0]
    path = base / "objects" / damaged[:2] / damaged
    path.write_bytes(b"damaged")
    count = len(operations_of(save_second, base, tmp_path / "scratch"))
    backup = create_backup_system(base, files=FailingFiles(count, errno.EIO))
    with pytest.raises(OSError):
        save_second(backup)
    assert same(small_state(1), backup.load().state)


def test_what_cannot_be_taken_back_stays_whole(tmp_path: Path, base: Path) -> None:
    """The save fails after its commit, and then taking it back does too, at any of its removals."""
    removals = 0
    at = 0
    while at <= removals:
        root = shutil.copytree(base, tmp_path / f"store-{at}")
        removals = 0

        def fail(operation: str, path: Path, at: int = at) -> None:
            nonlocal removals
            removals += operation == "remove"
            if (operation, path.name) == ("sync", "manifests") or (operation == "remove" and removals > at):
                raise OSError(errno.EIO, "disk")

        with pytest.raises(OSError):
            save_second(create_backup_system(root, files=WatchedFiles(fail)))
        assert check_opens_and_goes_on(root) == (2 if at == 0 else 1)
        at += 1
    assert at > 4


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, base: Path) -> None:
    """Ctrl-C in the middle, and the loop's own process goes on."""

    def interrupt(operation: str, path: Path) -> None:
        if operation == "write half":
            raise KeyboardInterrupt

    before = tree(base)
    with pytest.raises(KeyboardInterrupt):
        save_second(create_backup_system(base, files=WatchedFiles(interrupt)))
    assert tree(base) == before


def test_leftovers_of_a_crashed_writer_are_removed_by_the_next(base: Path) -> None:
    leftovers = [base / "objects" / "0123-ab.tmp", base / "manifests" / "000000000009-regular-ab.tmp"]
    for path in leftovers:
        path.write_bytes(b"half")
    backup = create_backup_system(base)
    assert [info.step for info in backup.list()] == [1]
    assert all(path.exists() for path in leftovers), "a reader removes nothing"
    save_second(backup)
    assert not any(path.exists() for path in leftovers)


def test_a_writer_killed_before_any_operation_of_save_and_prune(tmp_path: Path, base: Path) -> None:
    operations = operations_of(save_second_and_prune, base, tmp_path / "scratch")
    commit = next(
        number
        for number, (operation, path) in enumerate(operations, 1)
        if operation == "rename" and path.parent.name == "manifests"
    )
    assert any(operation == "remove" for operation, _ in operations[commit:])
    for at in range(1, len(operations) + 1):
        root = shutil.copytree(base, tmp_path / f"store-{at}")
        process = start(save_and_prune, root, at)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found = check_opens_and_goes_on(root)
        assert found == (2 if at > commit else 1), f"operation {at}: {operations[at - 1]}"


def test_a_writer_killed_at_any_moment_loses_nothing_it_reported(tmp_path: Path) -> None:
    root = tmp_path / "store"
    chance = random.Random(0)
    newest = 0
    for _ in range(12):
        receiving, sending = CONTEXT.Pipe(duplex=False)
        process = start(save_until_killed, root, newest + 1, sending)
        sending.close()
        for _ in range(chance.randrange(1, 4)):
            newest = receiving.recv()
        assert process.pid is not None
        process.kill()
        process.join()
        receiving.close()
        assert process.exitcode == -signal.SIGKILL
        backup = create_backup_system(root)
        assert [result.problem for result in backup.verify()] == [None] * len(backup.list())
        loaded = backup.load()
        assert loaded.info.step >= newest and loaded.skipped == ()
        assert same(small_state(loaded.info.step), loaded.state)
        newest = loaded.info.step
    assert check_opens_and_goes_on(root) == newest


def forget_everything(entry: Path) -> bool:
    return True


def test_a_power_cut_before_any_operation_loses_no_committed_checkpoint(tmp_path: Path) -> None:
    """The disk forgets every name, or any of them, that was not made durable."""
    chance = random.Random(0)
    forgets = [forget_everything, *[lambda entry: chance.random() < 0.5] * 3]
    at = 0
    done = False
    while not done:
        at += 1
        for number, forget in enumerate(forgets):
            place = tmp_path / f"{at}-{number}"
            place.mkdir()
            files = ForgetfulFiles(place, at)
            backup = create_backup_system(place / "store", keep_last=1, files=files)
            saved = 0
            try:
                backup.save(small_state(1), step=1, epoch=0)
                saved = 1
                save_second(backup)
                saved = 2
                backup.prune()
                done = True
            except PowerCut:
                pass
            files.restart(forget)
            backup = create_backup_system(place / "store")
            assert [result.problem for result in backup.verify()] == [None] * len(backup.list())
            if saved:
                loaded = backup.load()
                assert loaded.info.step >= saved
                assert same(small_state(loaded.info.step), loaded.state)
    assert at > 20


def test_what_a_killed_writer_left_is_made_durable_by_the_next(tmp_path: Path) -> None:
    """The next save finds chunks that are there and need not be written, yet were never synced."""
    at = 0
    done = False
    while not done:
        at += 1
        place = tmp_path / str(at)
        place.mkdir()
        files = ForgetfulFiles(place, at)
        try:
            save_second(create_backup_system(place / "store", files=files))
            done = True
        except PowerCut:
            pass
        files.go_on()
        save_second(create_backup_system(place / "store", files=files))
        files.restart()
        assert same(small_state(2), create_backup_system(place / "store").load().state), at
