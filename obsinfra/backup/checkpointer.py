"""The checkpointer: the loop pays for a memory copy; another process commits it and outlives the trainer.

For any training loop. What waits to be committed is in `commit_queue`, who commits it is `committer`. Knows
snapshots and what callers may ask; not when to save, nor why.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from obsinfra.backup.backup_system import Kind
from obsinfra.backup.commit_queue import CommitQueue, PendingCommit
from obsinfra.backup.committer import Committer, EventSink
from obsinfra.backup.compression import Compression, check_compression
from obsinfra.backup.heir import wait_for_heir as wait_for_heir  # for those who only know this module
from obsinfra.backup.parts import Part
from obsinfra.backup.retention import Retention
from obsinfra.backup.shared_snapshot import SharedSnapshots
from obsinfra.backup.slot import SnapshotHead
from obsinfra.backup.tensors import code_versions
from obsinfra.backup.writer import MESSAGE_BYTES
from obsinfra.errors import CheckpointError
from obsinfra.monitoring.logging_config import get_logger


def create_checkpointer(
    directory: Path | str,
    *,
    run: str = "",
    on_event: EventSink | None = None,
    log_path: Path | str | None = None,
    retention: Retention | None = None,
    nice: int = 10,
    threads: int = 2,
    compression: Compression = "off",
) -> Checkpointer:
    """A checkpointer over `directory`, which is created with the first snapshot.

    Args:
        run: run id written into manifests.
        on_event: told of what happens, on whatever thread; must not block.
        log_path: file of JSON lines in which the writer records how a trainer was lost and what it saved.
        retention: what stays; the writer prunes after every commit, and before one for which there is too
            little space. None: nothing is removed.
        nice: added to the writer's niceness.
        threads: how many tensors the writer hashes and writes at a time.
        compression: as for `create_backup_system`; it is the writer's work.

    Raises:
        OSError: no shared memory can be made.
        ValueError: no such compression.
    """
    return Checkpointer(
        Path(directory).absolute(),
        run=run,
        on_event=on_event,
        log_path=Path(log_path).absolute() if log_path is not None else None,
        retention=retention,
        nice=nice,
        threads=threads,
        compression=compression,
    )


class Checkpointer:
    """Snapshots and commits of one loop; made by `create_checkpointer`.

    Only the loop's thread takes snapshots; any thread commits. Without `close`, the writer takes the end of
    the process for a crash and commits the newest sound snapshot, if it is not yet.
    """

    def __init__(
        self,
        directory: Path,
        *,
        run: str,
        on_event: EventSink | None,
        log_path: Path | None,
        retention: Retention | None,
        nice: int,
        threads: int,
        compression: Compression,
    ) -> None:
        check_compression(compression)
        self.directory = directory
        self._run = run
        self._log = get_logger("system")
        self._versions = code_versions()
        self._snapshots = SharedSnapshots(directory)
        self._owner = os.getpid()
        self._queue = CommitQueue(self._snapshots)
        self._committer = Committer(
            directory,
            self._snapshots,
            self._queue,
            on_event=on_event,
            log_path=log_path,
            retention=retention,
            nice=nice,
            threads=threads,
            compression=compression,
        )
        self._closing = False

    # ---- the loop's side ---------------------------------------------------------------------------

    def snapshot(
        self,
        state: Mapping[str, Any],
        *,
        step: int,
        epoch: int,
        metrics: Mapping[str, float] | None = None,
        sound: bool = True,
        urgent: bool = False,
        wait: float = 0.0,
    ) -> bool:
        """Copy `state` (nested, as `state_tree.encode` takes; tensors on any device) into shared memory.

        The first one also allocates the memory and starts the writer.

        Args:
            metrics: values worth keeping with it.
            sound: nothing speaks against this state (finite loss and gradient norm). The writer commits no
                other one by itself, and the last sound one is not overwritten by one that is not.
            urgent: take the place of a snapshot whose commit has not begun; that commit gets this state
                instead (not if its kind is `best`).
            wait: seconds to wait for a slot when both are being committed.

        Returns:
            False when there was no slot: nothing was copied.

        Raises:
            CheckpointError: something in the state cannot be stored; it names the place.
            OSError: not enough memory.
        """
        queue = self._queue
        with queue.changed:
            self._check_usable()
            if not queue.changed.wait_for(lambda: self._closing or queue.free_slot(urgent) is not None, wait):
                return False
            self._check_usable()
            slot = queue.overwrite(urgent)
        head = SnapshotHead(self._run, step, epoch, time.time(), dict(metrics or {}), self._versions)
        try:
            self._snapshots.take(slot, state, head, sound=sound)
        finally:
            with queue.changed:
                queue.overwritten()
            self._committer.dispatch()
        self._committer.start()
        return True

    def commit(
        self,
        kind: Kind,
        reason: str,
        *,
        attributes: Mapping[str, Any] | None = None,
        sound: bool = False,
        part: Part | None = None,
    ) -> PendingCommit:
        """Have the newest snapshot committed. Any thread; returns at once.

        An emergency goes before everything that has not begun.

        Args:
            attributes: further JSON facts for the manifest; `resumable` is true unless said otherwise.
            sound: the newest sound snapshot instead.
            part: the snapshot is this rank's part (`dcp_state.part_of`), and is committed with all others.

        Raises:
            CheckpointError: there is no snapshot, or the attributes are not JSON or too large.
        """
        facts = dict(attributes or {})
        try:
            size = len(json.dumps([kind, reason, facts], allow_nan=False))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"attributes {facts!r} are not JSON: {error}", "plain JSON values"
            ) from error
        if size > MESSAGE_BYTES // 2:
            raise CheckpointError(f"reason and attributes take {size} bytes", f"at most {MESSAGE_BYTES // 2}")
        with self._queue.changed:
            self._check_usable()
            pending = self._queue.add(kind, reason, facts, sound, part)
        self._committer.dispatch()
        return pending

    def close(self, timeout: float = 60.0) -> bool:
        """Finish pending commits, say goodbye to the writer, wait for its end, give the memory back.

        Args:
            timeout: seconds. When they are over, pending commits fail here, and the writer goes on by
                itself: it ends what it is at and commits the newest sound snapshot.

        Returns:
            Whether everything was done in time.
        """
        if os.getpid() != self._owner:
            return True
        deadline = time.monotonic() + timeout
        queue = self._queue
        with queue.changed:
            if self._closing:
                return True
            self._closing = True
            idle = queue.changed.wait_for(lambda: queue.idle, timeout)
            left = queue.clear()
            writer = self._committer.dismiss(abandoned=not idle)
        if writer is not None:
            self._committer.say_goodbye(writer)
        for request in left:
            request.fail(CheckpointError("the checkpointer was closed before it was committed", "more time"))
        if not self._committer.join(max(1.0, deadline - time.monotonic())):
            # It still uses the descriptors; the process's end gives them back.
            self._log.warning("writer_left_alone", pid=self.writer_pid)
            return False
        self._committer.give_back()
        return idle

    @property
    def newest_step(self) -> int | None:
        """Step of the newest snapshot; None before the first."""
        slot = self._snapshots.newest()
        taken = self._snapshots.taken[slot] if slot is not None else None
        return taken.step if taken is not None else None

    @property
    def last_snapshot_seconds(self) -> float:
        """How long the loop waited for the last snapshot."""
        return self._snapshots.last_seconds

    @property
    def writer_pid(self) -> int | None:
        """Process id of the writer; None while there is none."""
        return self._committer.writer_pid

    @property
    def writer_restarts(self) -> int:
        """Writers that died and were replaced, or could not be."""
        return self._committer.restarts

    def _check_usable(self) -> None:
        if os.getpid() != self._owner:
            raise CheckpointError(f"this checkpointer belongs to process {self._owner}", "that process")
        if self._closing:
            raise CheckpointError("this checkpointer is closed", "an open one")
