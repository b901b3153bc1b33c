"""A companion: a process beside the trainer that outlives it, the line to it, and its last words.

For the checkpointer's writer and the mirror; what they do is not known here. A child that the trainer forks
gives up its copy of every line, so that a companion hears of the trainer's own end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from obsinfra.backup.writer import Lines

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

spawning = threading.Lock()
"""Held while descriptors are made or given back that a forked child must know to close."""

_STDERR_BYTES = 4096

_lines: set[socket.socket] = set()


@dataclass(frozen=True, slots=True)
class Companion:
    """A running one: the process, our end of the line, and what it says before it dies."""

    process: subprocess.Popen[bytes]
    connection: socket.socket
    lines: Lines
    stderr: IO[bytes]

    def hang_up(self) -> None:
        """Close the line: to the process this is the trainer's end."""
        with spawning:
            _lines.discard(self.connection)
            self.connection.close()

    def bury(self) -> tuple[int, str]:
        """See to it that it ends, after its line broke. Its exit code, and the last it said to stderr."""
        try:
            code = self.process.wait(1)
        except subprocess.TimeoutExpired:  # it hung up; two of them must not work at the same time
            self.process.kill()
            code = self.process.wait()
        self.stderr.seek(0)
        said = self.stderr.read()[-_STDERR_BYTES:].decode(errors="replace").strip()
        self.stderr.close()
        return code, said


def start_companion(
    module: str, config: Callable[[int], DataclassInstance], inherited: Sequence[int] = ()
) -> Companion:
    """Start `python -m module CONFIG` in a session of its own.

    Args:
        config: what it is told, given the descriptor of its end of the line.
        inherited: further descriptors that it gets.

    Raises:
        OSError: it cannot be started.
    """
    if not sys.executable:
        raise OSError("this Python does not know its own executable")
    package_root = str(Path(__file__).absolute().parents[2])
    search_path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
    stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
    with spawning:
        ours, theirs = socket.socketpair()
        try:
            told = json.dumps(asdict(config(theirs.fileno())))
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, told],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "PYTHONPATH": search_path},
                pass_fds=(theirs.fileno(), *inherited),
                start_new_session=True,
            )
        except BaseException:  # given back whatever it was, and raised again
            ours.close()
            stderr.close()
            raise
        finally:
            theirs.close()
        _lines.add(ours)
    return Companion(process, ours, Lines(ours), stderr)


def _after_fork_in_child() -> None:
    spawning.release()
    for connection in _lines:
        with contextlib.suppress(OSError):
            os.close(connection.detach())
    _lines.clear()


os.register_at_fork(
    before=spawning.acquire, after_in_parent=spawning.release, after_in_child=_after_fork_in_child
)
