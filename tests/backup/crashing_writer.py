"""Processes that save into one store, and are killed or not. Forked from one server that has torch loaded."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from faulty_files import KillingFiles
from same import small_state

from obsinfra.backup.backup_system import create_backup_system

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["obsinfra.backup.backup_system"])


def start(target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """A process running `target`."""
    process = CONTEXT.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def save_and_prune(root: Path, at: int) -> None:
    """Killed right before operation number `at`."""
    backup = create_backup_system(root, keep_last=1, files=KillingFiles(at))
    backup.save(small_state(2), step=2, epoch=0)
    backup.prune()


def save_until_killed(root: Path, step: int, committed: Connection) -> None:
    """Save one state after the other, telling each step once it is committed."""
    backup = create_backup_system(root, keep_last=2)
    while True:
        backup.save(small_state(step), step=step, epoch=0)
        committed.send(step)
        backup.prune()
        step += 1


def save_many(root: Path, steps: list[int], keep_last: int) -> None:
    """Save states of which neighbours share most of their chunks, pruning after each."""
    backup = create_backup_system(root, keep_last=keep_last)
    for step in steps:
        backup.save(small_state(step // 4), step=step, epoch=0)
        backup.prune()
