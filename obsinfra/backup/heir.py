"""Who may still commit to a checkpoint folder: a trainer, or the writer that outlives it.

They hold a shared lock; whoever resumes, and whoever copies what is there, looks at it. Never imports torch.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

HEIR_LOCK = ".heir"
"""In the checkpoint folder; locked, shared, by every trainer and writer that may still commit there."""

_POLL_SECONDS = 0.02
"""Between two attempts: flock knows no time-out."""


def wait_for_heir(directory: Path | str, timeout: float) -> bool:
    """Wait until nobody is left who may still commit to `directory`: a trainer, or the writer it left behind.

    Call it before looking for the newest checkpoint to resume from.

    Args:
        timeout: seconds.

    Returns:
        False when somebody still may.
    """
    try:
        fd = os.open(Path(directory) / HEIR_LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    deadline = time.monotonic() + timeout
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
            time.sleep(_POLL_SECONDS)
    finally:
        os.close(fd)
