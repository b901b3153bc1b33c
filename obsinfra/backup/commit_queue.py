"""The queue of commits: which come next, of which snapshot each is, and which snapshot may be overwritten.

Filled by the checkpointer, emptied by the committer. Knows no process and no disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import astuple, dataclass, field
from typing import Any

from obsinfra.backup.backup_system import Kind, SavedCheckpoint
from obsinfra.backup.parts import Part
from obsinfra.backup.shared_snapshot import SharedSnapshots
from obsinfra.backup.writer import Order
from obsinfra.errors import CheckpointError


class PendingCommit:
    """A commit that was asked for."""

    def __init__(self, kind: Kind, reason: str) -> None:
        self.kind = kind
        self.reason = reason
        self._future: Future[SavedCheckpoint] = Future()

    @property
    def done(self) -> bool:
        """Whether it is durable or has failed."""
        return self._future.done()

    def wait(self, timeout: float | None = None) -> SavedCheckpoint:
        """Wait until it is durable.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            CheckpointError, OSError: it failed; the store is as it was.
            TimeoutError: it is still being worked on.
        """
        return self._future.result(timeout)

    def add_done_callback(self, callback: Callable[[PendingCommit], None]) -> None:
        """Call `callback(self)` when it is done: on the checkpointer's thread, or at once if it is."""
        self._future.add_done_callback(lambda _: callback(self))


@dataclass(slots=True)
class Request:
    """A commit in the queue. `slot` is None once a newer snapshot took the one it was asked for."""

    id: int
    kind: Kind
    reason: str
    attributes: Mapping[str, Any]
    sound: bool
    slot: int | None
    pending: PendingCommit
    asked_at: float = field(default_factory=time.perf_counter)
    attempts: int = 0
    sequence: int = 0
    part: Part | None = None

    def order(self) -> Order:
        """What the writer is told of it."""
        assert self.slot is not None
        return Order(
            self.id,
            self.slot,
            self.sequence,
            self.kind,
            self.reason,
            dict(self.attributes),
            astuple(self.part) if self.part is not None else None,
        )

    def fail(self, error: Exception) -> None:
        """Tell whoever waits for it that it will not be."""
        self.pending._future.set_exception(error)


class CommitQueue:
    """What waits to be committed, and what is being; everything here with `changed` held.

    Attributes:
        changed: notified when something changed.
        in_flight: what is being committed.
    """

    def __init__(self, snapshots: SharedSnapshots) -> None:
        self.changed = threading.Condition()
        self.in_flight: Request | None = None
        self._snapshots = snapshots
        self._waiting: list[Request] = []
        self._taking: int | None = None  # slot that is being overwritten
        self._ids = 0

    @property
    def first(self) -> Request | None:
        """What comes next."""
        return self._waiting[0] if self._waiting else None

    @property
    def idle(self) -> bool:
        """Whether all was committed that was asked for."""
        return not self._waiting and self.in_flight is None

    # ---- the loop's side ---------------------------------------------------------------------------

    def free_slot(self, urgent: bool) -> int | None:
        """The slot that the next snapshot goes to, None when it would overwrite what is wanted."""
        reading = self.in_flight.slot if self.in_flight is not None else None
        wanted = {request.slot for request in self._waiting}
        first = self._snapshots.next_slot()
        if first != reading and first not in wanted:
            return first
        kept = {request.slot for request in self._waiting if request.kind == "best"}
        for slot in (first, 1 - first) if urgent else ():
            if slot != reading and slot not in kept:
                return slot
        return None

    def overwrite(self, urgent: bool) -> int:
        """Begin a snapshot in a slot that is free; a commit of what was in it is of a newer one now."""
        slot = self._taking = self.free_slot(urgent)
        assert slot is not None
        for request in self._waiting:
            if request.slot == slot:
                request.slot = None
        return slot

    def overwritten(self) -> None:
        """The snapshot is taken, or it failed."""
        self._taking = None
        self.changed.notify_all()

    def add(
        self, kind: Kind, reason: str, attributes: Mapping[str, Any], sound: bool, part: Part | None
    ) -> PendingCommit:
        """Ask for a commit of the newest snapshot, or of the newest sound one.

        Raises:
            CheckpointError: there is none.
        """
        slot = self._snapshots.newest(sound=sound, besides=self._taking)
        if slot is None:
            raise CheckpointError(
                f"no {'sound ' if sound else ''}snapshot to commit", "one", "call snapshot() first"
            )
        self._ids += 1
        pending = PendingCommit(kind, reason)
        self._enqueue(Request(self._ids, kind, reason, attributes, sound, slot, pending, part=part))
        self.changed.notify_all()
        return pending

    def _enqueue(self, request: Request) -> None:
        """Emergencies before the others, else in the order they came."""
        others = [i for i, queued in enumerate(self._waiting) if queued.kind != "emergency"]
        place = others[0] if request.kind == "emergency" and others else len(self._waiting)
        self._waiting.insert(place, request)

    def clear(self) -> list[Request]:
        """Drop everything; what it was."""
        left = [*self._waiting, *([self.in_flight] if self.in_flight else [])]
        self._waiting.clear()
        self.in_flight = None
        return left

    # ---- the committer's side ----------------------------------------------------------------------

    def take(self) -> Request | None:
        """Take the next request from the queue, bound to a snapshot; those without one fail."""
        while self._waiting:
            request = self._waiting[0]
            if request.slot is None:
                if self._taking is not None:
                    return None  # the snapshot being taken is for this one
                request.slot = self._snapshots.newest(sound=request.sound)
            taken = self._snapshots.taken[request.slot] if request.slot is not None else None
            self._waiting.pop(0)
            if taken is None:
                self.changed.notify_all()
                request.fail(CheckpointError("its snapshot was lost to a newer one that failed", "one"))
                continue
            request.sequence = taken.sequence
            request.attempts += 1
            self.in_flight = request
            return request
        return None

    def put_back(self) -> None:
        """What was being committed is to be tried again, before everything else."""
        if self.in_flight is not None:
            self._waiting.insert(0, self.in_flight)
            self.in_flight = None
