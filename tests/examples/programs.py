"""Running an example as a user does, in a folder of its own, and what it left there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from waiting import wait_for

from obsinfra.backup.backup_system import LoadedCheckpoint, create_backup_system
from obsinfra.backup.heir import wait_for_heir

ROOT = Path(__file__).parents[2]


def start(folder: Path, example: str, *words: str) -> subprocess.Popen[str]:
    """`python examples/EXAMPLE WORDS` in `folder`; one thread, so that sums come out the same."""
    folder.mkdir(exist_ok=True)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OBSINFRA_METRICS_PORT": "0"}
    environ["OBSINFRA_SNAPSHOT_SECONDS"] = "0.1"  # so that a kill soon after the start finds a later one
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / example), *words],
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def stopped_by(
    signum: signal.Signals, process: subprocess.Popen[str], when: Callable[[], bool]
) -> tuple[int, str, str]:
    """Send a signal once `when` is true, and wait for the end; exit code, output and errors."""
    try:
        wait_for(lambda: when() or process.poll() is not None, "the moment to stop it", seconds=100)
        process.send_signal(signum)
        return ended(process)
    finally:
        process.kill()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    out, error = process.communicate(timeout=200)
    return process.returncode, out, error


def newest(store: Path) -> LoadedCheckpoint:
    """The newest sound checkpoint, once nobody can commit another."""
    assert wait_for_heir(store, timeout=60)
    return create_backup_system(store).load()
