"""Real disks that are full or read-only under the writer: the commit fails clearly, the next one works."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.checkpointer import Checkpointer, create_checkpointer, wait_for_heir
from obsinfra.backup.retention import Retention
from obsinfra.backup.store import SPACE_MARGIN_BYTES
from obsinfra.errors import CheckpointError

SECONDS = 60.0
STATE_BYTES = 4_000_000


def state(seed: int) -> dict[str, torch.Tensor]:
    return {"w": torch.randn(STATE_BYTES // 4, generator=torch.Generator().manual_seed(seed))}


@contextlib.contextmanager
def mounted(tmp_path: Path, options: str) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two checkpoints and the margin."""
    with mounted(tmp_path, f"size={2 * STATE_BYTES + SPACE_MARGIN_BYTES + 2**20}") as folder:
        yield folder


def commit(checkpointer: Checkpointer, step: int) -> None:
    assert checkpointer.snapshot(state(step), step=step, epoch=0, wait=SECONDS)
    checkpointer.commit("regular", "test").wait(SECONDS)


def files_of(root: Path) -> dict[Path, bytes]:
    """Chunks and manifests; folders of chunks may be left over."""
    found = [*(root / "objects").rglob("*"), *(root / "manifests").rglob("*")]
    return {path: path.read_bytes() for path in found if path.is_file()}


def steps(folder: Path) -> list[int]:
    backup = create_backup_system(folder / "store")
    assert all(result.problem is None for result in backup.verify())
    return [info.step for info in backup.list()]


def test_a_full_disk_fails_the_commit_and_costs_nothing_else(disk: Path) -> None:
    checkpointer = create_checkpointer(disk / "store")
    try:
        commit(checkpointer, 1)
        commit(checkpointer, 2)
        with pytest.raises(CheckpointError, match="MB free in"):
            commit(checkpointer, 3)
        assert steps(disk) == [1, 2]
        backup = create_backup_system(disk / "store", keep_last=1)
        backup.prune()
        assert checkpointer.commit("regular", "again").wait(SECONDS).step == 3, "the snapshot is still there"
        assert steps(disk) == [2, 3] and checkpointer.writer_restarts == 0
    finally:
        checkpointer.close()


def test_a_disk_that_fills_up_during_the_write_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    """There is space when it is looked for; what runs out half way through are inodes."""
    with mounted(tmp_path, "size=64m,nr_inodes=60") as disk:
        checkpointer = create_checkpointer(disk / "store")
        try:
            commit(checkpointer, 1)
            many = {str(number): torch.full((9,), float(number)) for number in range(100)}
            checkpointer.snapshot(many, step=2, epoch=0)
            with pytest.raises(OSError, match="No space left on device"):
                checkpointer.commit("regular", "too many files").wait(SECONDS)
            assert steps(disk) == [1] and len(list((disk / "store" / "objects").rglob("*"))) < 60
            assert not [
                path for path in (disk / "store" / "objects").glob("*/*") if path.stat().st_size == 36
            ]
            assert not list(disk.rglob("*.tmp"))
            few = {str(number): torch.full((9,), float(number)) for number in range(10)}
            checkpointer.snapshot(few, step=3, epoch=0)
            assert checkpointer.commit("regular", "fewer").wait(SECONDS).step == 3
            assert steps(disk) == [1, 3]
        finally:
            checkpointer.close()


def test_a_disk_full_at_any_point_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ever one block less is free, from room for all of it to none, and nobody looks before writing."""
    monkeypatch.setattr("obsinfra.backup.store.SPACE_MARGIN_BYTES", -(2**30))
    small = {name: torch.full((3000,), float(number)) for number, name in enumerate("abcdef")}
    outcomes = []
    with mounted(tmp_path, "size=1m") as disk:
        backup = create_backup_system(disk / "store")
        backup.save(small, step=1, epoch=0)
        before = files_of(disk / "store")
        changed = {name: tensor + 100 for name, tensor in small.items()}
        # Its chunks take three blocks each, its manifest and new folders a few.
        for free in range(40, -1, -1):
            ballast = disk / "ballast"
            found = os.statvfs(disk)
            ballast.write_bytes(bytes((found.f_bavail - free) * found.f_frsize))
            try:
                backup.save(changed, step=2, epoch=0)
                outcomes.append("new")
            except OSError as error:
                assert error.errno == errno.ENOSPC, free
                assert files_of(disk / "store") == before, f"{free} blocks free"
                outcomes.append("old")
            assert all(result.problem is None for result in backup.verify())
            loaded = backup.load()
            expected = changed if outcomes[-1] == "new" else small
            assert loaded.skipped == () and all(
                torch.equal(loaded.state[name], expected[name]) for name in small
            )
            ballast.unlink()
            if outcomes[-1] == "new":
                backup.store.remove(loaded.info.path)
                backup.store.collect()
    turning = outcomes.index("old")
    assert 0 < turning < 40 and set(outcomes[turning:]) == {"old"}


def test_where_space_is_short_the_retention_makes_room(disk: Path) -> None:
    checkpointer = create_checkpointer(disk / "store", retention=Retention(keep_last=1))
    try:
        for step in range(1, 8):
            commit(checkpointer, step)
    finally:
        assert checkpointer.close()
    assert steps(disk) == [7]


@pytest.mark.parametrize("first", [True, False], ids=["from the start", "later"])
def test_a_read_only_disk_fails_the_commit_until_it_can_be_written_again(disk: Path, first: bool) -> None:
    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

    checkpointer = create_checkpointer(disk / "store")
    try:
        if not first:
            commit(checkpointer, 1)
        remount("ro")
        with pytest.raises(OSError, match="Read-only file system"):
            commit(checkpointer, 2)
        remount("rw")
        commit(checkpointer, 3)
        assert steps(disk) == ([3] if first else [1, 3])
    finally:
        checkpointer.close()
    assert wait_for_heir(disk / "store", 0)
