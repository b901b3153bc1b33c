"""The control channel of a group of ranks: rank 0 hears, all act at the boundary they agreed on.

The same face as `ControlChannel`, whose doors rank 0 opens. Made by `ranks.Group`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from obsinfra.catalog.actions import ACTIONS
from obsinfra.control.channel import ControlChannel
from obsinfra.control.command import Ack, AckState, Command
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.run.folder import RunFolder

_ENDED = "the run has ended; expected a running one"


class Channel(Protocol):
    """What a run needs of its control channel; see `ControlChannel`."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def submit(self, command: Command) -> Ack: ...
    def waiting(self) -> list[Command]: ...
    def take(self, wanted: Callable[[Command], bool] = ...) -> list[Command]: ...
    def overdue(self, wanted: Callable[[Command], bool]) -> list[Command]: ...
    def ack(
        self,
        id: str,
        state: AckState,
        *,
        step: int | None = None,
        result: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> None: ...


class SharedChannel:
    """Commands for one rank of a group.

    Args:
        folder: the run; only rank 0 opens its doors.
        rank: this one.
        post: asks all ranks to agree on when to act on a command.
        on_garbage, on_outcome, on_arrival: as for `ControlChannel`.

    Attributes:
        outcomes: command id → the last state and error it was acknowledged with here.
    """

    def __init__(
        self,
        folder: RunFolder,
        rank: int,
        post: Callable[[Command], None],
        *,
        on_garbage: Callable[[str, str], None],
        on_outcome: Callable[[Command, Ack], None],
        on_arrival: Callable[[], None],
    ) -> None:
        self._rank, self._post, self._on_arrival = rank, post, on_arrival
        self._lock = threading.Lock()
        self._posted: dict[str, Command] = {}
        self._ready: list[Command] = []
        self.outcomes: dict[str, tuple[AckState, str | None]] = {}
        self._log = get_logger("system")
        self._doors: ControlChannel | None = None
        if rank == 0:
            self._doors = ControlChannel(
                folder, on_garbage=on_garbage, on_outcome=on_outcome, on_arrival=self._arrived
            )

    def start(self) -> None:
        """Open the doors on rank 0."""
        if self._doors is not None:
            self._doors.start()

    def stop(self) -> None:
        """Close them; what still waits is rejected."""
        with self._lock:
            left = [*self._posted.values(), *self._ready]
            self._posted.clear()
            self._ready.clear()
        for command in left:
            self.ack(command.id, "rejected", error=_ENDED)
        if self._doors is not None:
            self._doors.stop()

    def submit(self, command: Command) -> Ack:
        """From the in-process evaluator; that of rank 0 acts for the group."""
        if self._doors is not None:
            return self._doors.submit(command)
        return Ack(command.id, "rejected", self._rank, error="rank 0 takes commands for all ranks")

    def agreed(self, command: Command) -> None:
        """The boundary for it has come; the loop's thread."""
        with self._lock:
            if self._rank == 0 and self._posted.pop(command.id, None) is None:
                return  # the watchdog has settled it
            self._ready.append(command)

    def at_once(self, command: Command, asked_by: int) -> bool:
        """Whether it needs no boundary; if so it is brought to the loop's helpers now, on any thread."""
        if not _any_time(command):
            return False
        if asked_by != self._rank:  # rank 0 did it when it arrived
            with self._lock:
                self._ready.append(command)
            self._on_arrival()
        return True

    def waiting(self) -> list[Command]:
        """What has arrived here and was not taken yet."""
        with self._lock:
            return [*self._posted.values(), *self._ready]

    def take(self, wanted: Callable[[Command], bool] = lambda command: True) -> list[Command]:
        """Everything `wanted` whose moment has come."""
        if not self._ready:
            return []
        with self._lock:
            taken = [command for command in self._ready if wanted(command)]
            self._ready = [command for command in self._ready if not wanted(command)]
        return taken

    def overdue(self, wanted: Callable[[Command], bool]) -> list[Command]:
        """Also what waits for a boundary that does not come; it will not be done there any more."""
        taken = self.take(wanted)
        with self._lock:
            late = [command for command in self._posted.values() if wanted(command)]
            for command in late:
                del self._posted[command.id]
        return [*taken, *late]

    def ack(
        self,
        id: str,
        state: AckState,
        *,
        step: int | None = None,
        result: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """Rank 0 answers whoever asked; what the others did is compared with it."""
        self.outcomes[id] = (state, error)
        if self._doors is not None:
            self._doors.ack(id, state, step=step, result=result, error=error)

    def _arrived(self) -> None:
        assert self._doors is not None
        for command in self._doors.take():
            with self._lock:
                if _any_time(command):
                    self._ready.append(command)
                else:
                    self._posted[command.id] = command
            try:
                self._post(command)
            except Exception as error:  # torch's stores raise errors of their own kinds
                self._log.error("command_not_shared", id=command.id, error=str(error)[:300])
                with self._lock:
                    self._posted.pop(command.id, None)
                self.ack(command.id, "failed", error=f"the other ranks could not be told: {error}")
        self._on_arrival()


def _any_time(command: Command) -> bool:
    row = ACTIONS.get(command.action)
    return row is not None and row.at == "any_time"
