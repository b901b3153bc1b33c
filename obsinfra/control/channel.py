"""The control channel of one run: two doors, one queue, each command once.

The trainer makes one, looks at it between two steps, and acknowledges what it did. Knows commands and the run
folder; nothing of training.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal

from obsinfra.control.command import Ack, AckState, Command, RefusedError, parse_command
from obsinfra.control.doors import InboxDoor, SocketDoor
from obsinfra.control.ledger import AckLedger
from obsinfra.errors import CommandError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.run.folder import RunFolder

POLL_SECONDS = 0.2
"""How often the inbox is looked at; the socket is heard at once."""

PRUNE_SECONDS = 3600.0
"""How often acks too old to matter are removed."""

MAX_WAITING = 100
"""Commands that may wait for the loop."""


class ControlChannel:
    """Receives commands for one run until `stop`.

    Args:
        folder: the run; its folders exist.
        on_garbage: called with the door and what was wrong, for a message that is no command.
        on_outcome: called with a command the channel settled itself (rejected, expired, failed) and its ack.
        on_arrival: called after a command was put into the queue; must only set flags.
        rank: who acknowledges.

    The callbacks run on the thread that brought the message: the channel's own, or that of `submit`.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        on_garbage: Callable[[str, str], None],
        on_outcome: Callable[[Command, Ack], None],
        on_arrival: Callable[[], None],
        rank: int = 0,
    ) -> None:
        self._folder = folder
        self._on_garbage, self._on_outcome, self._on_arrival = on_garbage, on_outcome, on_arrival
        self._rank = rank
        self._ledger = AckLedger(folder.acks)
        self._lock = threading.Lock()
        self._waiting: deque[Command] = deque()
        self._open: dict[str, Ack] = {}
        self._ended = False
        self._stopping = threading.Event()
        self._socket: SocketDoor | None = None
        self._inbox = InboxDoor(folder.inbox, self.receive)
        self._thread: threading.Thread | None = None
        self._log = get_logger("system")

    # ---- life ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open both doors. A socket that cannot be made is logged; the inbox works without it."""
        if self._thread is not None:
            return
        self._ledger.prune(time.time())
        try:
            self._socket = SocketDoor(self._folder.socket, self.receive)
        except OSError as error:
            self._log.warning("control_socket_unavailable", path=str(self._folder.socket), error=str(error))
        self._thread = threading.Thread(target=self._serve, name="obsinfra-control", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close both doors; what still waits is rejected. May be called twice, and on any thread."""
        with self._lock:
            self._ended = True
            left = list(self._waiting)
            self._waiting.clear()
        for command in left:
            self._settle(command, "rejected", "the run has ended; expected a running one")
        self._stopping.set()
        if self._socket is not None:
            self._socket.wake()
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)
            self._thread = None

    def _serve(self) -> None:
        door = self._socket
        prune_due = time.monotonic() + PRUNE_SECONDS
        while not self._stopping.is_set():
            try:
                if time.monotonic() > prune_due:
                    prune_due = time.monotonic() + PRUNE_SECONDS
                    self._ledger.prune(time.time())
                if door is not None:
                    door.poll(POLL_SECONDS)
                else:
                    self._stopping.wait(POLL_SECONDS)
                self._inbox.poll()
            except Exception as error:  # whatever comes through a door must not close it
                self._log.error("control_channel_error", exc_info=error)
                self._stopping.wait(POLL_SECONDS)
        if door is not None:
            door.close()

    # ---- in ------------------------------------------------------------------------------------------

    def receive(self, raw: bytes, door: str) -> Ack | None:
        """Take in one message from a door; returns what to answer, None for garbage."""
        try:
            command = parse_command(raw, run=self._folder.id, now=time.time())
        except RefusedError as refused:
            known = self._known(refused.command.id)
            if known is not None:
                return known  # a replay hears what became of the first one
            return self._settle(refused.command, refused.state, str(refused))
        except CommandError as error:
            self._on_garbage(door, str(error))
            return None
        return self.submit(command)

    def submit(self, command: Command) -> Ack:
        """Queue a command that was checked already; returns `accepted`, or what is known of its id."""
        accepted = Ack(command.id, "accepted", self._rank, at=time.time())
        with self._lock:
            if (known := self._open.get(command.id)) is not None:
                return known
            full, ended = len(self._waiting) >= MAX_WAITING, self._ended
            if not full and not ended:
                self._open[command.id] = accepted
        earlier = self._ledger.last(command.id)
        if earlier is not None and earlier.final:
            with self._lock:
                self._open.pop(command.id, None)
            return earlier
        if ended:
            return self._settle(command, "rejected", "the run has ended; expected a running one")
        if full:
            return self._settle(command, "rejected", f"{MAX_WAITING} commands wait already; try again later")
        if earlier is not None and earlier.state == "running":
            # Twice is worse than once reported: a stop that took effect must not stop the resumed run.
            return self._settle(command, "failed", "the trainer ended while it executed this command")
        self._record(accepted)
        with self._lock:
            if not self._ended:
                self._waiting.append(command)
                ended = False
            else:
                ended = True
        if ended:
            return self._settle(command, "rejected", "the run has ended; expected a running one")
        self._on_arrival()
        return accepted

    # ---- out -----------------------------------------------------------------------------------------

    def take(self) -> list[Command]:
        """Everything that waits and is still valid, in order of arrival; what has expired is settled."""
        with self._lock:
            if not self._waiting:
                return []
            taken = list(self._waiting)
            self._waiting.clear()
        now, valid = time.time(), []
        for command in taken:
            if command.expires_at > now:
                valid.append(command)
            else:
                self._settle(command, "expired", f"expired {now - command.expires_at:.0f} s ago")
        return valid

    def ack(
        self,
        id: str,
        state: AckState,
        *,
        step: int | None = None,
        result: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """Say how far a command has come: durably, and to whoever listens. Never raises for a full disk."""
        ack = Ack(id, state, self._rank, step, result, error, time.time())
        with self._lock:
            if ack.final:
                self._open.pop(id, None)
            else:
                self._open[id] = ack
        self._record(ack)
        if self._socket is not None:
            self._socket.publish(ack)
        if ack.final:
            self._inbox.settled(id)

    def _settle(self, command: Command, state: Literal["rejected", "expired", "failed"], error: str) -> Ack:
        self.ack(command.id, state, error=error)
        ack = Ack(command.id, state, self._rank, error=error, at=time.time())
        self._on_outcome(command, ack)
        return ack

    def _known(self, id: str) -> Ack | None:
        with self._lock:
            known = self._open.get(id)
        return known or self._ledger.last(id)

    def _record(self, ack: Ack) -> None:
        try:
            self._ledger.record(ack)
        except OSError as error:  # the command still takes effect; only a restart could not know of it
            self._log.error("ack_not_written", id=ack.id, state=ack.state, error=str(error))
