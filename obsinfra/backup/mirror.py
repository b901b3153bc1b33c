"""A mirror: a store's copy at a remote that is kept up in the background, whatever becomes of the remote.

Runs in the mirror's process. What is copied how is `transfer`'s. Knows no tensors and no torch.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from obsinfra.backup.remote import Remote, RemoteError
from obsinfra.backup.store import CheckpointStore
from obsinfra.backup.transfer import Transfer, push
from obsinfra.errors import CheckpointError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.run.files import fsync_folder, write_atomic

_log = get_logger("system")


@dataclass(frozen=True, slots=True)
class MirrorStatus:
    """How a mirror stands; for metrics and alerts.

    Attributes:
        pending: checkpoints here that wait to be copied.
        lag_seconds: how long the oldest that was not copied has been waiting, also when it was pruned here
            since; 0 when all is there.
        failures: attempts that failed since it was started.
        failing: attempts that failed since the last success; 0 when all is well.
        copied: checkpoints copied since it was started.
        copied_bytes: of chunks copied since it was started.
        error: of the last attempt, if it failed.
    """

    url: str
    pending: int = 0
    lag_seconds: float = 0.0
    failures: int = 0
    failing: int = 0
    copied: int = 0
    copied_bytes: int = 0
    error: str | None = None


class Mirror:
    """Copies a store to a remote in the background, on one thread, and never makes the caller wait.

    What waits to be copied is noted in the store's folder `outbox/`, so that another mirror goes on after a
    restart. While the remote is down it tries again, ever more rarely.

    Args:
        store: where the checkpoints are.
        url: where copies go.
        options: as for `Remote`.
        on_status: called on the mirror's thread at each change and attempt; for metrics.
        first_wait_seconds, longest_wait_seconds: between attempts while they fail; doubled each time.
    """

    def __init__(
        self,
        store: CheckpointStore,
        url: str,
        *,
        options: Mapping[str, Any] | None = None,
        on_status: Callable[[MirrorStatus], None] | None = None,
        first_wait_seconds: float = 1.0,
        longest_wait_seconds: float = 300.0,
    ) -> None:
        self._store = store
        self._options = options
        self._on_status = on_status
        self._waits = (first_wait_seconds, longest_wait_seconds)
        self._outbox = outbox_of(store, url)
        self._state = MirrorStatus(url)
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._idle = threading.Event()
        self._lock = threading.Lock()
        self._pending: dict[str, float] = {}
        self._thread: threading.Thread | None = None
        self._unheard = False

    def start(self) -> None:
        """Begin, with what was left over and what the store has that was never queued."""
        if self._thread is not None:
            raise RuntimeError("this mirror was started already")
        self._thread = threading.Thread(target=self._run, name="obsinfra-mirror", daemon=True)
        self._thread.start()

    def enqueue(self, checkpoint: Path) -> None:
        """A checkpoint was committed. Returns at once; the mirror's thread notes and copies it."""
        with self._lock:
            self._pending.setdefault(checkpoint.name, time.time())
            self._idle.clear()
        self._wake.set()

    def status(self) -> MirrorStatus:
        """How it stands now; any thread."""
        with self._lock:
            waiting, state = dict(self._pending), self._state
        oldest = min(waiting.values(), default=None)
        lag = 0.0 if oldest is None else max(0.0, time.time() - oldest)
        here = sum((self._store.manifests / name).exists() for name in waiting)
        return replace(state, pending=here, lag_seconds=lag)

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until nothing is pending; False when that did not come about in time."""
        return self._idle.wait(timeout_seconds)

    def stop(self, timeout_seconds: float = 10.0) -> bool:
        """End the thread after the batch under way; what is pending stays in the outbox.

        Returns:
            False when it is still waiting for the remote after that time; it ends with the process.
        """
        self._stopping.set()
        self._wake.set()
        if self._thread is None:
            return True
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    # ---- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._recall()
        except Exception as error:  # logged and counted; a thread that ended would copy nothing that comes
            self._failed(error)
        remote: Remote | None = None
        wait = self._waits[0]
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                self._note()
                if remote is None:
                    reached = Remote(self._state.url, self._options)
                    reached.manifests()  # so that one that is down is known before the first checkpoint
                    self._recovered()
                    remote = reached
                self._copy(remote)
            except Exception as error:  # logged and counted; what comes next may be copied again
                self._failed(error)
                self._stopping.wait(wait * random.uniform(0.75, 1.25))  # not all ranks and runs at once
                wait = min(wait * 2, self._waits[1])
                continue
            wait = self._waits[0]
            with self._lock:
                if not self._pending:
                    self._idle.set()
            self._report()
            self._wake.wait()

    def _recall(self) -> None:
        """Take up what is in the outbox, and all else that the store has: it may not be there any more."""
        found: dict[str, float] = {}
        for path in self._outbox.glob("*.json") if self._outbox.is_dir() else ():
            try:
                found[path.name] = float(json.loads(path.read_bytes())["queued_at"])
            except (OSError, ValueError, KeyError, TypeError):
                found[path.name] = time.time()
        for path in self._store.manifest_paths():
            found.setdefault(path.name, time.time())
        with self._lock:
            for name, moment in found.items():
                self._pending[name] = min(moment, self._pending.get(name, moment))

    def _note(self) -> None:
        """Write what is pending into the outbox."""
        with self._lock:
            pending = dict(self._pending)
        if not pending:
            return
        for folder in (self._outbox.parent, self._outbox):  # not the store's own: who removed it meant it
            folder.mkdir(mode=0o700, exist_ok=True)
        for name, moment in pending.items():
            if not (self._outbox / name).exists():
                write_atomic(self._outbox / name, json.dumps({"queued_at": moment}))

    def _copy(self, remote: Remote) -> None:
        """Copy all that is pending, newest first: that is the one that would be missed most."""
        while not self._stopping.is_set():
            with self._lock:
                name = max(self._pending, default=None)
            if name is None:
                return
            path = self._store.manifests / name
            before = self._state.copied_bytes
            try:
                done = push(
                    self._store,
                    remote,
                    path,
                    progress=lambda sent, _, before=before: self._sent(before + sent),  # type: ignore[misc]
                    stopping=self._stopping.is_set,
                )
            except RemoteError:
                raise
            except CheckpointError as error:
                # Damaged or pruned here: trying again would not help, and others are waiting.
                if path.exists():
                    self._failed(error)
                else:
                    _log.warning("checkpoint_pruned_before_copy", url=remote.url, checkpoint=path.stem)
                self._settle(name, None)
                continue
            if self._stopping.is_set() and not done.checkpoints:
                return
            self._settle(name, done)

    def _sent(self, copied_bytes: int) -> None:
        with self._lock:
            self._state = replace(self._state, copied_bytes=copied_bytes)
        self._report()

    def _recovered(self) -> None:
        with self._lock:
            self._state = replace(self._state, failing=0, error=None)

    def _settle(self, name: str, done: Transfer | None) -> None:
        (self._outbox / name).unlink(missing_ok=True)
        fsync_folder(self._outbox)
        with self._lock:
            self._pending.pop(name, None)
            if done is not None:
                self._state = replace(
                    self._state,
                    copied=self._state.copied + len(done.checkpoints),
                    failing=0,
                    error=None,
                )
        self._report()

    def _failed(self, error: Exception) -> None:
        with self._lock:
            first = self._state.failing == 0
            self._state = replace(
                self._state,
                failures=self._state.failures + 1,
                failing=self._state.failing + 1,
                error=f"{error}",
            )
        if first:  # once an outage, not once an attempt
            _log.warning("checkpoint_mirror_failing", url=self._state.url, error=str(error))
        self._report()

    def _report(self) -> None:
        if self._on_status is None:
            return
        try:
            self._on_status(self.status())
        except Exception as error:  # of somebody else, and a metric that fails must not stop the copies
            if not self._unheard:
                _log.error("mirror_status_not_taken", url=self._state.url, error=repr(error))
            self._unheard = True


def outbox_of(store: CheckpointStore, url: str) -> Path:
    """Where a mirror of `store` to `url` notes what waits to be copied."""
    return store.root / "outbox" / hashlib.sha256(url.encode()).hexdigest()[:16]
