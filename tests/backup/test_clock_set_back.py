"""The clock is set back between two checkpoints: which is the last is still known, and damage still seen."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from same import same, small_state

from obsinfra.backup.backup_system import BackupSystem, create_backup_system

AN_HOUR = 3600 * 10**9


def set_clock_back(root: Path) -> None:
    """What is there now is of a time that is yet to come."""
    for path in root.rglob("*"):
        if path.is_file():
            found = path.stat()
            os.utime(path, ns=(found.st_atime_ns + AN_HOUR, found.st_mtime_ns + AN_HOUR))


def save(backup: BackupSystem, step: int) -> Path:
    return backup.save(small_state(step), step=step, epoch=0).path


def test_the_chain_of_parents_goes_on(tmp_path: Path) -> None:
    backup = create_backup_system(tmp_path)
    save(backup, 1)
    set_clock_back(tmp_path)
    for step in (2, 3):
        save(create_backup_system(tmp_path), step)
    first, second, third = backup.list()
    assert (second.parent, third.parent) == (first.id, second.id)
    assert first.path.stat().st_mtime_ns > time.time_ns(), "so the clock did go back"
    assert backup.load().info.step == 3


def test_what_was_committed_last_stays_though_its_step_is_lower(tmp_path: Path) -> None:
    """Training was rewound, and the clock set back: by neither can it be told from an old one."""
    for step in (10, 20, 30):
        save(create_backup_system(tmp_path), step)
    set_clock_back(tmp_path)
    last = save(create_backup_system(tmp_path), 12)
    backup = create_backup_system(tmp_path, keep_last=1)
    backup.prune()
    assert {info.step for info in backup.list()} == {12, 30} and last.exists()


@pytest.mark.parametrize("moment", [0, -1, 10**9], ids=["same", "before", "after"])
def test_times_in_order_are_left_alone(tmp_path: Path, moment: int) -> None:
    """Only a file that would be older than the one before it gets another time."""
    backup = create_backup_system(tmp_path)
    first = save(backup, 1)
    os.utime(first, ns=(time.time_ns(), time.time_ns() - 10**9 + moment))
    began = time.time_ns() - 10**8  # the kernel's clock for files ticks more coarsely
    second = save(backup, 2)
    assert began <= second.stat().st_mtime_ns <= time.time_ns() + 1


def test_damage_to_the_last_one_is_seen_by_the_prune(tmp_path: Path) -> None:
    """What this process wrote itself is read again if it was touched since: no time says that now."""
    backup = create_backup_system(tmp_path, keep_last=1)
    save(backup, 1)
    set_clock_back(tmp_path)
    save(backup, 2)
    newest = backup.list()[-1]
    for digest in newest.chunks() - backup.list()[0].chunks():
        path = backup.store.objects.path(digest)
        path.write_bytes(bytes(path.stat().st_size))
    backup.prune()
    loaded = backup.load()
    assert loaded.info.step == 1 and same(small_state(1), loaded.state)
    assert [passed.path for passed in loaded.skipped] == [newest.path]
