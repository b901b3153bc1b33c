"""The writer: the process that commits snapshots from shared memory, and outlives the trainer that took them.

`python -m obsinfra.backup.writer CONFIG`, started by the checkpointer and by nobody else. When the trainer is
gone without a goodbye, it commits the newest sound snapshot and ends. Never imports torch or NumPy.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from obsinfra.backup.compression import Compression
from obsinfra.backup.manifest import Head, Manifest
from obsinfra.backup.parts import Part, commit_part
from obsinfra.backup.retention import Retention, prune, with_room
from obsinfra.backup.slot import SlotReader
from obsinfra.backup.store import CheckpointStore
from obsinfra.errors import CheckpointError, UserError

MESSAGE_BYTES = 128 * 1024
"""Longest line on the socket; less than its buffer, so that sending never waits."""

HEIR_ATTEMPTS = 5
"""How often the last commit is tried when the disk fails."""

HEIR_PAUSE_SECONDS = 1.0
"""Between two of them: time for a disk to have room or to answer again. Nobody waits for this process."""


@dataclass(frozen=True, slots=True)
class WriterConfig:
    """What the writer is told when it starts.

    Attributes:
        directory: the checkpoint folder.
        socket, slots, lock: descriptors it inherits; the lock is held by having it open.
        trainer: process id, for messages.
        committed: sequence number of the newest snapshot that is durable already.
        nice: added to its niceness.
        threads: how many tensors it hashes and writes at a time.
        log_path: where its JSON lines go; empty for stderr.
        retention: the fields of a `Retention`; None removes nothing.
        compression: as for `CheckpointStore`.
    """

    directory: str
    socket: int
    slots: tuple[int, int]
    lock: int
    trainer: int
    committed: int = 0
    nice: int = 10
    threads: int = 2
    log_path: str = ""
    retention: Mapping[str, Any] | None = None
    compression: Compression = "off"


@dataclass(frozen=True, slots=True)
class Order:
    """One commit to make: of which slot, when it still holds that snapshot, and what to call it."""

    id: int
    slot: int
    sequence: int
    kind: str
    reason: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    part: tuple[str, int, int, int] | None = None
    """The fields of a `Part`: the slot has this rank's part of the state, and all ranks commit together."""


@dataclass(frozen=True, slots=True)
class Done:
    """A durable checkpoint. `resumable`: a sound snapshot that is meant for resuming."""

    path: str
    id: str
    kind: str
    step: int
    epoch: int
    bytes_total: int
    bytes_written: int
    seconds: float
    resumable: bool


def commit_slot(
    store: CheckpointStore,
    slot: SlotReader,
    order: Order,
    retention: Retention | None,
    last: Path | None = None,
    gone: Callable[[], bool] = lambda: False,
) -> Done:
    """Commit the snapshot that lies in a slot. Nobody may overwrite it meanwhile.

    Args:
        retention: where space is short, prune by it first.
        last: what this process committed last.
        gone: whether the trainer is; then a part does not wait long for the others.

    Raises:
        CheckpointError: the slot does not hold that snapshot, or there is too little free space.
        OSError: the disk failed; the store is as it was.
    """
    started = time.perf_counter()
    content = slot.read()
    if content is None or content.header.sequence != order.sequence:
        raise CheckpointError(
            f"slot {order.slot} does not hold snapshot {order.sequence}", "a complete snapshot"
        )
    snapshot = content.head
    head = Head(
        run=snapshot.run,
        kind=order.kind,
        step=snapshot.step,
        epoch=snapshot.epoch,
        metrics=snapshot.metrics,
        reason=order.reason,
        attributes={"resumable": True, **order.attributes},
        versions=snapshot.versions,
    )

    def commit() -> tuple[Manifest, int]:
        return store.commit(head, content.document, content.tensors)

    if order.part is not None:
        manifest, written = commit_part(store, content, head, Part(*order.part), gone)
    else:
        needed = sum(len(tensor.data) for tensor in content.tensors)
        with store.writing():
            manifest, written = (
                with_room(store, retention, needed, commit, last) if retention is not None else commit()
            )
    return Done(
        path=str(manifest.path),
        id=manifest.id,
        kind=manifest.kind,
        step=manifest.step,
        epoch=manifest.epoch,
        bytes_total=manifest.bytes_total,
        bytes_written=written,
        seconds=time.perf_counter() - started,
        resumable=content.header.sound and bool(head.attributes["resumable"]),
    )


class Lines:
    """JSON objects, one a line, over a stream socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = bytearray()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one.

        Raises:
            OSError: nobody is there.
        """
        self._connection.sendall(json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n")

    def ended(self) -> bool:
        """Whether the other side is gone; waits for nothing, and takes nothing that was sent."""
        try:
            return not self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def receive(self) -> dict[str, Any] | None:
        """The next one; None when the other side is gone."""
        while (end := self._received.find(b"\n")) < 0:
            try:
                data = self._connection.recv(65536)
            except ConnectionError:
                data = b""
            if not data:
                return None
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        message = json.loads(line)
        assert isinstance(message, dict)
        return message


class Writer:
    """The process's one object. `run` returns when the trainer has said goodbye or is dead and inherited."""

    def __init__(self, config: WriterConfig) -> None:
        self._config = config
        self._store = CheckpointStore(
            Path(config.directory), threads=config.threads, compression=config.compression
        )
        self._slots = [SlotReader(fd) for fd in config.slots]
        self._lines = Lines(socket.socket(fileno=config.socket))
        self._committed = config.committed
        self._retention = Retention(**config.retention) if config.retention is not None else None
        self._last: Path | None = None

    def run(self) -> None:
        """Serve the trainer to the end."""
        self._answer({"op": "hello", "pid": os.getpid()})
        while (message := self._lines.receive()) is not None:
            if message.pop("op") == "goodbye":
                return
            answer = self._obey(Order(**message))
            self._answer(answer)
            if answer["op"] == "committed":
                self._prune()
        self._inherit()

    def _obey(self, order: Order) -> dict[str, Any]:
        try:
            done = self._commit(order)
        except UserError as error:
            return {"op": "failed", "order": order.id, "user": [error.wrong, error.expected, error.fix]}
        except OSError as error:
            return {"op": "failed", "order": order.id, "os": [error.errno, error.strerror, error.filename]}
        except Exception as error:  # a bug of ours: the trainer is told, and the next commit may work
            self._log("commit_crashed", error=traceback.format_exc())
            return {"op": "failed", "order": order.id, "user": [f"the writer failed: {error!r}", "", ""]}
        return {"op": "committed", "order": order.id, "done": asdict(done)}

    def _commit(self, order: Order) -> Done:
        slot = self._slots[order.slot]
        done = commit_slot(self._store, slot, order, self._retention, self._last, self._lines.ended)
        self._last = Path(done.path)
        if done.resumable:
            self._committed = max(self._committed, order.sequence)
        return done

    def _prune(self) -> None:
        """After the trainer has its answer: it does not wait for this."""
        if self._retention is None:
            return
        try:
            paths = prune(self._store, self._retention, self._last)
        except OSError as error:
            self._answer({"op": "prune_failed", "error": str(error)})
        else:
            self._answer({"op": "pruned", "paths": [str(path) for path in paths]})

    def _answer(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the trainer is gone, as the next `receive` will say
            self._lines.send(message)

    def _inherit(self) -> None:
        """The trainer is gone without a goodbye: make its newest sound snapshot durable."""
        _set_io_priority(idle=False)  # nobody is left to be considerate of
        sound = sorted(
            (
                (content.header.sequence, slot)
                for slot, reader in enumerate(self._slots)
                if (content := reader.read()) is not None and content.header.sound
            ),
            reverse=True,
        )
        trainer = self._config.trainer
        if not sound:
            self._log("trainer_lost", trainer=trainer, committed=None, why="it left no sound snapshot")
        for sequence, slot in sound:
            if sequence <= self._committed:
                self._log("trainer_lost", trainer=trainer, committed=None, why="its newest is committed")
                return
            if self._commit_last(
                Order(
                    0,
                    slot,
                    sequence,
                    "emergency",
                    f"the trainer (process {trainer}) ended without closing its checkpoints",
                    {"committed_by": "writer"},
                )
            ):
                return

    def _commit_last(self, order: Order) -> bool:
        for attempt in range(1, HEIR_ATTEMPTS + 1):
            try:
                done = self._commit(order)
            except (OSError, CheckpointError) as error:
                self._log("last_commit_failed", attempt=attempt, error=str(error))
                if attempt < HEIR_ATTEMPTS:
                    time.sleep(HEIR_PAUSE_SECONDS)
                continue
            self._log(
                "trainer_lost",
                trainer=self._config.trainer,
                committed=done.path,
                step=done.step,
                bytes_written=done.bytes_written,
                seconds=round(done.seconds, 4),
            )
            self._prune()
            return True
        return False

    def _log(self, event: str, **facts: Any) -> None:
        log_line(self._config.log_path, event, writer=os.getpid(), **facts)


def log_line(log_path: str, event: str, **facts: Any) -> None:
    """Append one JSON line; where that is impossible it goes to stderr."""
    line = json.dumps({"timestamp": datetime.now(UTC).isoformat(), "event": event, **facts}) + "\n"
    try:
        if log_path:
            Path(log_path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(log_path, "a", encoding="utf-8") as file:
                file.write(line)
            return
    except OSError as error:
        print(f"cannot log to {log_path}: {error}", file=sys.stderr)
    print(line, end="", file=sys.stderr)


class _IntoLog(logging.Handler):
    """What the floors below say goes into the same file."""

    def __init__(self, log_path: str) -> None:
        super().__init__()
        self._log_path = log_path

    def emit(self, record: logging.LogRecord) -> None:
        log_line(self._log_path, record.getMessage(), level=record.levelname.lower(), writer=os.getpid())


def _set_io_priority(*, idle: bool) -> None:
    if hasattr(psutil, "IOPRIO_CLASS_IDLE"):
        level = psutil.IOPRIO_CLASS_IDLE if idle else psutil.IOPRIO_CLASS_BE
        with contextlib.suppress(psutil.Error, OSError):  # a nicety that a container may refuse
            psutil.Process().ionice(level)


def main(argv: list[str]) -> int:
    """Entry of the process; 1 and a line in the log when it crashed."""
    config = WriterConfig(**json.loads(argv[0]))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # the trainer's end, however it comes, is this one's sign
    with contextlib.suppress(OSError):
        os.nice(config.nice)
    _set_io_priority(idle=True)
    logging.getLogger("obsinfra").addHandler(_IntoLog(config.log_path))
    try:
        Writer(config).run()
    except Exception:  # whatever it is, it is logged; the trainer counts this end and starts another
        log_line(config.log_path, "writer_crashed", writer=os.getpid(), error=traceback.format_exc())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
