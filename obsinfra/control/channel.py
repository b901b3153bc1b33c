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

from obsinfra.control.command import Ack, AckState, Command, RefusedError, bounded, parse_command
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

_ENDED = "the run has ended; expected a running one"
_INTERRUPTED = "the trainer ended while it executed this command"


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
        self._admitting = threading.Lock()
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
            self._settle(command, "rejected", _ENDED)
        self._stopping.set()
        if self._socket is not None:
            self._socket.wake()
        thread = self._thread
        if thread is not None and threading.current_thread() is not thread:
            thread.join(timeout=5)

    def _serve(self) -> None:
        door = self._socket
        prune_due = time.monotonic() + PRUNE_SECONDS
        inbox_due = 0.0
        while not self._stopping.is_set():
            try:
                if time.monotonic() > prune_due:
                    prune_due = time.monotonic() + PRUNE_SECONDS
                    self._ledger.prune(time.time())
                if door is not None:
                    door.poll(max(0.0, min(POLL_SECONDS, inbox_due - time.monotonic())))
                else:
                    self._stopping.wait(POLL_SECONDS)
                if time.monotonic() >= inbox_due:  # not for each message at the socket
                    self._inbox.poll()
                    inbox_due = time.monotonic() + POLL_SECONDS
            except Exception as error:  # whatever comes through a door must not close it
                self._log.error("control_channel_error", exc_info=error)
                self._stopping.wait(POLL_SECONDS)
        try:
            self._inbox.poll()  # what came last is rejected, and does not lie there for a resumed run
        except Exception as error:  # likewise, and the socket must be closed
            self._log.error("control_channel_error", exc_info=error)
        finally:
            if door is not None:
                door.close()

    # ---- in ------------------------------------------------------------------------------------------

    def receive(self, raw: bytes, door: str) -> Ack | None:
        """Take in one message from a door; returns what to answer, None for garbage. Never raises."""
        try:
            return self._received(raw, door)
        except Exception as error:  # one message must not keep those behind it from being heard
            self._log.error("control_message_error", door=door, exc_info=error)
            return None

    def _received(self, raw: bytes, door: str) -> Ack | None:
        try:
            command = parse_command(raw, run=self._folder.id, now=time.time())
        except RefusedError as refused:
            known, present = self._known(refused.command.id)
            if known is not None and (known.final or present):
                return self._again(known, door)  # a replay hears what became of the first one
            if known is not None and known.state == "running":
                return self._settle(refused.command, "failed", _INTERRUPTED)
            return self._settle(refused.command, refused.state, str(refused))
        except CommandError as error:
            self._on_garbage(door, str(error))
            return None
        return self.submit(command, door=door)

    def submit(self, command: Command, *, door: str | None = None) -> Ack:
        """Queue a command that was checked already; returns `accepted`, or what is known of its id.

        `accepted` is written to `acks/` for who waits at the inbox alone: others are told, and to a later
        process it says no more than no ack.
        """
        accepted = Ack(command.id, "accepted", self._rank, at=time.time())
        with self._admitting:  # one at a time, so that of two with the same id the second finds the first
            known, present = self._known(command.id)
            if known is not None and (known.final or present):
                return self._again(known, door)
            with self._lock:
                full, ended = len(self._waiting) >= MAX_WAITING, self._ended
                self._open[command.id] = accepted
            refused: tuple[Literal["rejected", "failed"], str] | None = None
            if known is not None and known.state == "running":
                # Twice is worse than once reported: a stop that took effect must not stop the resumed run.
                refused = "failed", _INTERRUPTED
            elif full:
                refused = "rejected", f"{MAX_WAITING} commands wait already; try again later"
            elif not ended:
                if door == "inbox":
                    self._record(accepted)
                with self._lock:
                    ended = self._ended  # while the disk wrote
                    if not ended:
                        self._waiting.append(command)
        if ended and refused is None:
            refused = "rejected", _ENDED
        if refused is not None:
            return self._settle(command, *refused)
        self._on_arrival()
        return accepted

    def _again(self, known: Ack, door: str | None) -> Ack:
        """A repetition through the inbox looks for its ack in `acks/`, where `accepted` may not be yet."""
        if door == "inbox" and known.state == "accepted":
            with self._lock:  # `running` is noted under it before it is written, so this cannot come later
                known = self._open.get(known.id, known)
                if known.state == "accepted":
                    self._record(known)
        return known

    # ---- out -----------------------------------------------------------------------------------------

    def waiting(self) -> list[Command]:
        """What nobody has taken yet, in order of arrival."""
        with self._lock:
            return list(self._waiting)

    def take(self, wanted: Callable[[Command], bool] = lambda command: True) -> list[Command]:
        """Everything `wanted` that waits and is still valid, in order of arrival; the rest goes on waiting.

        What has expired is settled, wanted or not.
        """
        now = time.time()
        valid, expired, left = [], [], []
        with self._lock:
            if not self._waiting:
                return []
            for command in self._waiting:
                if command.expires_at <= now:
                    expired.append(command)
                elif wanted(command):
                    valid.append(command)
                else:
                    left.append(command)
            self._waiting.clear()
            self._waiting.extend(left)
        for command in expired:
            self._settle(command, "expired", f"expired {now - command.expires_at:.0f} s ago")
        return valid

    def overdue(self, wanted: Callable[[Command], bool]) -> list[Command]:
        """`take`, for whoever acts because the loop does not come round."""
        return self.take(wanted)

    def ack(
        self,
        id: str,
        state: AckState,
        *,
        step: int | None = None,
        result: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """Say how far a command has come: durably, and to whoever listens.

        `running` is durable before this returns, so before the command takes effect: that keeps it from being
        executed again. A final ack is told first and written then, for who asks later.

        Never raises: not for a full disk, nor for a result or an error that is no JSON or very long.
        """
        self._say(Ack(id, state, self._rank, step, result, error, time.time()))

    def _say(self, ack: Ack) -> Ack:
        ack = bounded(ack)
        with self._lock:
            self._open[ack.id] = ack
        if not ack.final:
            self._record(ack)
        if self._socket is not None:
            self._socket.publish(ack)
        if ack.final:
            if self._record(ack):  # known by its file from here on
                with self._lock:
                    self._open.pop(ack.id, None)
            self._inbox.settled(ack.id)
        return ack

    def _settle(self, command: Command, state: Literal["rejected", "expired", "failed"], error: str) -> Ack:
        ack = self._say(Ack(command.id, state, self._rank, error=error, at=time.time()))
        self._on_outcome(command, ack)
        return ack

    def _known(self, id: str) -> tuple[Ack | None, bool]:
        """What was said last of `id`, and whether this process has it in hand; else one that is gone had."""
        with self._lock:
            known = self._open.get(id)
        return (known, True) if known is not None else (self._ledger.last(id), False)

    def _record(self, ack: Ack) -> bool:
        try:
            self._ledger.record(ack)
        except OSError as error:  # the command still takes effect; only a restart could not know of it
            self._log.error("ack_not_written", id=ack.id, state=ack.state, error=str(error))
            return False
        return True
