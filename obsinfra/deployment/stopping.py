"""Stopping recorded processes, and only those. For the native stack."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping

import psutil

from obsinfra.run.process import ProcessId

POLL_SECONDS = 0.02
"""Between two looks: they are no children of this process, whose end it would be told."""


def signal_process(process: ProcessId, *, kill: bool) -> None:
    """Signal the very process that was recorded, never one that inherited its pid."""
    if process.alive():
        with contextlib.suppress(psutil.NoSuchProcess):
            target = psutil.Process(process.pid)
            if kill:
                target.kill()
            else:
                target.terminate()


def stop_processes(running: Mapping[str, ProcessId], seconds: float) -> None:
    """SIGTERM, and SIGKILL for what is left after half of `seconds`."""
    for process in running.values():
        signal_process(process, kill=False)
    for process in wait_gone(running, seconds / 2).values():
        signal_process(process, kill=True)
    wait_gone(running, seconds / 2)


def wait_gone(running: Mapping[str, ProcessId], seconds: float) -> dict[str, ProcessId]:
    """Wait until all are gone; returns what is left at the deadline."""
    deadline = time.monotonic() + seconds
    while left := {name: process for name, process in running.items() if process.alive()}:
        if time.monotonic() > deadline:
            return left
        time.sleep(POLL_SECONDS)
    return {}
