"""The mirror process: copies what is committed to a remote, beside the trainer and for a while after it.

`python -m obsinfra.backup.mirror_process CONFIG`, started by `background_mirror` and by nobody else. It looks
for new checkpoints by itself, so that it also copies what a writer commits for a trainer that is dead. Never
imports torch or NumPy.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from obsinfra.backup.heir import wait_for_heir
from obsinfra.backup.mirror import Mirror, outbox_of
from obsinfra.backup.store import CheckpointStore
from obsinfra.backup.writer import Lines, log_line

LINGER_SECONDS = 600.0
"""How long it goes on after the trainer's end, at most, while there is something left to copy."""

TICK_SECONDS = 0.5
"""Between two looks at the store; as often it tells the trainer how it stands."""

STOP_SECONDS = 10.0
"""For the transfer that is under way when it ends."""

ERROR_CHARACTERS = 500
"""Of an error that the trainer is told."""

_LOCK = "lock"
_SUCCESSOR = "successor"


@dataclass(frozen=True, slots=True)
class MirrorConfig:
    """What the mirror process is told when it starts.

    Attributes:
        directory: the checkpoint folder.
        url: where its copy goes.
        socket: descriptor it inherits; nothing comes through it but its end, which is the trainer's.
        trainer: process id, for messages.
        nice: added to its niceness.
        log_path: where its JSON lines go; empty for stderr.
        first_wait_seconds, longest_wait_seconds, linger_seconds: as for `BackgroundMirror`.
    """

    directory: str
    url: str
    socket: int
    trainer: int
    nice: int = 10
    log_path: str = ""
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 300.0
    linger_seconds: float = LINGER_SECONDS


class MirrorProcess:
    """The process's one object. `run` returns when the trainer is gone and all is copied, or given up."""

    def __init__(self, config: MirrorConfig) -> None:
        self._config = config
        self._store = CheckpointStore(Path(config.directory))
        self._outbox = outbox_of(self._store, config.url)
        self._connection = socket.socket(fileno=config.socket)
        self._lines = Lines(self._connection)
        self._seen: set[str] = set()
        self._lingering = False
        self._told_to_end = False
        self._mirror = Mirror(
            self._store,
            config.url,
            first_wait_seconds=config.first_wait_seconds,
            longest_wait_seconds=config.longest_wait_seconds,
        )

    def run(self) -> None:
        """Copy until the end.

        Raises:
            OSError: the checkpoint folder is gone or cannot be written to.
        """
        with self._alone():
            self._mirror.start()
            try:
                while not self._trainer_gone(TICK_SECONDS):
                    self._look()
                    self._tell()
                self._linger()
            finally:
                self._mirror.stop(STOP_SECONDS)

    def terminate(self) -> None:
        """SIGTERM. While the trainer lives it is meant for that one, whose last checkpoint is yet to come."""
        self._told_to_end = self._lingering

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until the mirror of an earlier trainer of this folder has handed over."""
        for folder in (self._outbox.parent, self._outbox):
            folder.mkdir(mode=0o700, exist_ok=True)
        successor = self._outbox / _SUCCESSOR
        fd = os.open(self._outbox / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:  # not by a lock that waits: the other looks for this file in between
                    successor.touch(mode=0o600)
                    time.sleep(TICK_SECONDS)
            successor.unlink(missing_ok=True)
            yield
        finally:
            os.close(fd)

    def _trainer_gone(self, seconds: float) -> bool:
        """Wait for the trainer's end, at most so long."""
        if not select.select([self._connection], [], [], seconds)[0]:
            return False
        try:
            return not self._connection.recv(4096)
        except ConnectionError:
            return True

    def _look(self) -> None:
        """Queue what was committed since the last look."""
        self._looked_at = time.monotonic()  # the same clock in every process of a host
        names = {path.name for path in self._store.manifest_paths()}
        for name in sorted(names - self._seen):
            self._mirror.enqueue(self._store.manifests / name)
        self._seen = names

    def _tell(self) -> None:
        """Tell the trainer, unless it does not listen: then it hears the next one."""
        status = asdict(self._mirror.status())
        if status["error"] is not None:
            status["error"] = status["error"][:ERROR_CHARACTERS]
        if select.select([], [self._connection], [], 0)[1]:
            with contextlib.suppress(OSError):  # it is gone, as the next look at the line will say
                self._lines.send({"op": "status", "looked_at": self._looked_at, "status": status})

    def _linger(self) -> None:
        """The trainer is gone: go on until all is copied that it or its writer committed."""
        self._lingering = True
        end = time.monotonic() + self._config.linger_seconds
        while True:
            over = wait_for_heir(self._store.root, 0)  # before the look: after it nothing new comes
            self._look()
            if self._mirror.flush(TICK_SECONDS):
                if over:
                    self._log("all_copied")
                    return
                time.sleep(TICK_SECONDS)  # nothing tells when the writer has ended or has committed
            if not self._store.root.is_dir():
                return
            if (self._outbox / _SUCCESSOR).exists():
                self._log("handed_over")
                return
            if self._told_to_end or time.monotonic() >= end:
                self._log("given_up", why="SIGTERM" if self._told_to_end else "time is up")
                return

    def _log(self, event: str, **facts: Any) -> None:
        status = asdict(self._mirror.status())
        if self._store.root.is_dir():  # whoever removed the run does not want its folder back
            log_line(self._config.log_path, event, mirror=os.getpid(), **facts, **status)


class _IntoLog(logging.Handler):
    """What the floors below say goes into the same file."""

    def __init__(self, config: MirrorConfig) -> None:
        super().__init__()
        self._config = config

    def emit(self, record: logging.LogRecord) -> None:
        if Path(self._config.directory).is_dir():
            level = record.levelname.lower()
            log_line(self._config.log_path, record.getMessage(), level=level, mirror=os.getpid())


def _be_considerate(nice: int) -> None:
    with contextlib.suppress(OSError):
        os.nice(nice)
    if hasattr(psutil, "IOPRIO_CLASS_IDLE"):
        with contextlib.suppress(psutil.Error, OSError):  # a nicety that a container may refuse
            psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


def main(argv: list[str]) -> int:
    """Entry of the process; 1 and a message on stderr when it crashed."""
    config = MirrorConfig(**json.loads(argv[0]))
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    process = MirrorProcess(config)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    _be_considerate(config.nice)
    logging.getLogger("obsinfra").addHandler(_IntoLog(config))
    try:
        process.run()
    except Exception:  # whatever it is, the trainer logs what stands on stderr, counts it and starts another
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # a transfer that hangs must not keep it
