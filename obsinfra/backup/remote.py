"""Copies of a store at any fsspec URL (`s3://`, `file://`, `memory://`): push, pull, fetch, and a mirror.

A copy is laid out as the store is, and its manifests are uploaded last. It lies at the URL itself, as `push`
leaves it, or below it under a run's name, as the trainer's mirror does. Knows no tensors and no torch.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.core import url_to_fs

from obsinfra.backup import tags
from obsinfra.backup.compression import SUFFIX
from obsinfra.backup.manifest import Manifest, parse_manifest
from obsinfra.backup.objects import content_of, digest_of
from obsinfra.backup.store import CheckpointStore
from obsinfra.errors import CheckpointError, ObsinfraError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.run.files import fsync_folder, write_atomic

Progress = Callable[[int, int], None]
"""Called with bytes dealt with so far and bytes in all."""

BATCH = 4
"""Chunks under way at a time: at most this many times 16 MiB of memory."""

_MANIFEST = re.compile(r"\d{12,}-[a-z]+-[0-9a-f]+\.json")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{2,254}")
_UNFIT = {
    "http": "cannot be written to",
    "https": "cannot be written to",
    "memory": "ends with its process",
}
_log = get_logger("system")


class RemoteError(CheckpointError):
    """The remote cannot be reached, refuses, or lacks something."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a push or pull did.

    Attributes:
        checkpoints: file names of the manifests that came to be there, in the order they did.
        objects, bytes: chunks that were missing there, and their size.
    """

    checkpoints: tuple[str, ...]
    objects: int
    bytes: int


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


class Remote:
    """A copy of a store at `url`.

    Args:
        url: any that fsspec knows.
        options: for its file system, e.g. `{"endpoint_url": …}` for S3.

    Raises:
        RemoteError: no such protocol, or its package is missing.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self.url = url.rstrip("/")
        given = dict(options or {})
        protocol = url.partition("://")[0]
        if protocol in ("file", "local"):
            given.setdefault("auto_mkdir", True)
        elif protocol == "s3":  # botocore's own limits let a dead server hang a transfer for many minutes
            limits = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2}}
            given["config_kwargs"] = {**limits, **given.get("config_kwargs", {})}
        try:
            self._files, root = url_to_fs(self.url, **given)
        except ImportError as error:
            raise _package_missing(protocol, error) from error
        except ValueError as error:
            raise RemoteError(
                f"URL {url!r}: {error}", "one that fsspec knows, e.g. s3://bucket/prefix"
            ) from error
        self._root = str(root).rstrip("/")

    def below(self, name: str) -> Remote:
        """The remote `<url>/<name>`."""
        found = copy.copy(self)
        found.url, found._root = f"{self.url}/{name}", f"{self._root}/{name}"
        return found

    def of_one_run(self, run: str | None = None) -> Remote:
        """Where the checkpoints are: here, or in a folder below that is a run's.

        Args:
            run: the folder to take if there are several.

        Raises:
            RemoteError: there are several, and none of that name.
        """
        if self.manifests():
            return self
        with self._reaching():
            try:
                found = self._files.ls(self._root, detail=True)
            except FileNotFoundError:
                return self
        paths = [str(info["name"]).rstrip("/") for info in found if info["type"] == "directory"]
        runs = sorted({path.rpartition("/")[2] for path in paths} - {"objects", "manifests"})
        if run in runs:
            return self.below(str(run))
        if len(runs) > 1:
            more = f" and {len(runs) - 5} more" if len(runs) > 5 else ""
            raise RemoteError(
                f"{self.url} holds several runs: {', '.join(runs[:5])}{more}",
                "the URL of one",
                f"name one, e.g. {self.url}/{runs[-1]}",
            )
        return self.below(runs[0]) if runs else self

    def manifests(self) -> dict[str, int]:
        """File names of the manifests there, and their sizes; oldest step first."""
        found = self._list("manifests")
        return {name: found[name] for name in sorted(found) if _MANIFEST.fullmatch(name)}

    def objects(self) -> dict[str, int]:
        """File names of the chunks there, and their sizes; what they contain is not looked at."""
        found = self._list("objects")
        return {name: size for name, size in found.items() if _DIGEST.fullmatch(digest_of(name))}

    def read_manifest(self, name: str) -> bytes:
        """The text of a manifest's file; not checked."""
        with self._reaching():
            return bytes(self._files.cat_file(f"{self._root}/manifests/{name}"))

    def read_objects(self, digests: Sequence[str]) -> dict[str, bytes]:
        """Chunks by the names of their files, compressed where they are, each one's content verified.

        Raises:
            CheckpointError: a chunk there is damaged.
            RemoteError: one is not there.
        """
        files: dict[str, bytes] = {}
        with self._reaching():
            missing = list(digests)
            for suffix in ("", SUFFIX):
                places = {self._place(digest + suffix): digest + suffix for digest in missing}
                found = self._files.cat(list(places), on_error="return") if places else {}
                for place, name in places.items():
                    if not isinstance(found[place], Exception):
                        files[name] = bytes(found[place])
                        missing.remove(digest_of(name))
                    elif suffix or not isinstance(found[place], FileNotFoundError):
                        raise found[place]
        for name, data in files.items():
            try:
                content_of(name, data)
            except ValueError as error:
                raise CheckpointError(
                    f"chunk {name[:12]} at {self.url} is damaged", "its own content"
                ) from error
        return files

    def write_objects(self, files: Mapping[str, bytes]) -> None:
        """Upload chunks by the names of their files."""
        with self._reaching():
            self._files.pipe({self._place(name): data for name, data in files.items()})

    def write_manifest(self, name: str, raw: bytes) -> None:
        """Upload a manifest, after all its chunks."""
        with self._reaching():
            self._files.pipe_file(f"{self._root}/manifests/{name}", raw)

    def _place(self, name: str) -> str:
        return f"{self._root}/objects/{name[:2]}/{name}"

    def _list(self, folder: str) -> dict[str, int]:
        with self._reaching():
            self._files.invalidate_cache()
            try:
                found = self._files.find(f"{self._root}/{folder}", detail=True)
            except FileNotFoundError:
                return {}
        return {str(path).rpartition("/")[2]: int(info["size"]) for path, info in found.items()}

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Whatever a file system raises becomes a `RemoteError`: each has exceptions of its own."""
        try:
            yield
        except ObsinfraError:
            raise
        except Exception as error:
            raise RemoteError(
                f"{self.url}: {type(error).__name__}: {error}", "a remote that answers", "try again later"
            ) from error


def push(
    store: CheckpointStore,
    url: str | Remote,
    checkpoint: Path | str | None = None,
    *,
    progress: Progress | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Transfer:
    """Copy checkpoints to a remote; only what is missing there, so that a broken push goes on where it was.

    The store may be written to and pruned meanwhile; what is pruned before its turn is left out.

    Args:
        checkpoint: which one, as `tags.find` takes it; None copies all, newest first.
        progress: called after each batch of chunks.
        stopping: asked between batches; when it says so, this returns early.

    Raises:
        RemoteError: the remote failed; what came there stays.
        CheckpointError: a checkpoint is damaged here; the others were copied.
    """
    remote = url if isinstance(url, Remote) else Remote(url)
    there = remote.manifests()
    if checkpoint is not None:
        paths = [checkpoint if isinstance(checkpoint, Path) else tags.find(store, checkpoint)]
        manifests = [store.read_manifest(paths[0])]
        damaged: dict[Path, str] = {}
    else:
        damaged = {}
        manifests = tags.readable(store, problems=damaged)[::-1]
    missing = [m for m in manifests if there.get(m.path.name) != _size(m.path)]
    if not missing:
        objects: dict[str, int] = {}
    else:
        objects = remote.objects()
    files = {name: size for manifest in missing for name, size in _files_here(store, manifest).items()}
    total = sum(size for name, size in files.items() if objects.get(name) != size)
    count = sent = 0
    copied: list[str] = []
    for manifest in missing:
        here = _files_here(store, manifest)
        wanted = [digest_of(name) for name, size in here.items() if objects.get(name, -1) != size]
        try:
            raw = manifest.path.read_bytes()
            for start in range(0, len(wanted), BATCH):
                if stopping():
                    return Transfer(tuple(copied), count, sent)
                batch = dict(
                    store.objects.read_file(digest, manifest.path.name)
                    for digest in wanted[start : start + BATCH]
                )
                remote.write_objects(batch)
                objects.update({name: len(data) for name, data in batch.items()})
                count += len(batch)
                sent += sum(map(len, batch.values()))
                if progress is not None:
                    progress(sent, total)
        except RemoteError:
            raise
        except (CheckpointError, OSError) as error:
            if manifest.path.exists():  # else it was pruned meanwhile
                damaged[manifest.path] = str(error)
            continue
        remote.write_manifest(manifest.path.name, raw)
        copied.append(manifest.path.name)
    damaged = {path: problem for path, problem in damaged.items() if path.exists()}
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} damaged and not copied: {next(iter(damaged.values()))}", "sound checkpoints"
        )
    return Transfer(tuple(copied), count, sent)


def pull(
    url: str | Remote,
    store: CheckpointStore,
    checkpoint: str | None = None,
    *,
    progress: Progress | None = None,
) -> Transfer:
    """Copy checkpoints from a remote into a store; only what is missing here, every hash verified.

    Others may write to the store meanwhile.

    Args:
        url: of the copy, or of a folder that has but one run's (see `Remote.of_one_run`).
        checkpoint: an id, a full name or `latest`; None copies all, oldest first.
        progress: called after each batch of chunks.

    Raises:
        RemoteError: the remote failed, or has no such checkpoint; what came here stays.
        CheckpointError: a checkpoint there is damaged.
        OSError: the disk failed.
    """
    remote = (url if isinstance(url, Remote) else Remote(url)).of_one_run()
    names = list(remote.manifests())
    if checkpoint is not None:
        names = [_choose(remote, names, checkpoint)]
    here = {path.name: path for path in store.manifest_paths()}
    done: list[str] = []
    count = received = 0
    for name in names:
        raw = remote.read_manifest(name)
        manifest = parse_manifest(raw, store.manifests / name)
        if name in here and here[name].read_bytes() == raw and not _absent(store, manifest):
            continue
        fresh, size = _pull_one(remote, store, manifest, raw, progress)
        done.append(name)
        count, received = count + fresh, received + size
    return Transfer(tuple(done), count, received)


def fetch(
    url: str,
    folder: Path,
    *,
    run: str | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Bring the newest sound resumable checkpoint of a remote into the store `folder`, to resume from it.

    Args:
        url: of the copy, or of a folder of runs' copies; or one manifest (`…/manifests/<name>.json`), and
            then that very checkpoint.
        folder: of the store; made when it is not there.
        run: whose copy, where `url` has several.
        options: as for `Remote`.
        progress: called after each batch of chunks.

    Returns:
        Its manifest here: `BackupSystem.load` takes it.

    Raises:
        RemoteError: the remote failed, or has no checkpoint.
        CheckpointError: none there is sound.
        OSError: the disk failed.
    """
    head, _, last = url.rpartition("/")
    named = last if _MANIFEST.fullmatch(last) and head.endswith("/manifests") else None
    remote = Remote(head.removesuffix("/manifests") if named else url, options)
    if named is None:
        remote = remote.of_one_run(run)
    store = CheckpointStore(folder)
    problems: list[str] = []
    names = [named] if named else list(reversed(remote.manifests()))
    for name in names:
        try:
            raw = remote.read_manifest(name)
            manifest = parse_manifest(raw, store.manifests / name)
            if named is None and not manifest.resumable:
                continue
            _pull_one(remote, store, manifest, raw, progress)
            return manifest.path
        except RemoteError as error:
            if named is not None or not isinstance(error.__cause__, FileNotFoundError):
                raise
            problems.append(str(error))
        except CheckpointError as error:
            if named is not None:
                raise
            problems.append(str(error))
        _log.warning("damaged_checkpoint_skipped", url=remote.url, checkpoint=name, problem=problems[-1])
    if not names:
        raise RemoteError(f"no checkpoint at {remote.url}", "a URL that checkpoints were pushed to")
    raise CheckpointError(
        f"no sound checkpoint at {remote.url}" + (f" ({problems[0]})" if problems else ""),
        "at least one that can be resumed",
        "start a new run",
    )


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
        self._guarded(self._recall)
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
            except Exception as error:  # whatever it is, training goes on and so does the mirror
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
        if self._on_status is not None:
            with contextlib.suppress(Exception):  # a metric that fails must not stop the copies
                self._on_status(self.status())

    def _guarded(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception as error:  # an unreadable outbox: go on with what comes
            self._failed(error)


def outbox_of(store: CheckpointStore, url: str) -> Path:
    """Where a mirror of `store` to `url` notes what waits to be copied."""
    return store.root / "outbox" / hashlib.sha256(url.encode()).hexdigest()[:16]


def check_url(url: str) -> None:
    """Whether a mirror can be kept at `url`; nothing is asked of it.

    Raises:
        RemoteError: it is malformed, holds credentials, is of a kind that cannot be used, or a package is
            missing. The message never shows what may be a secret.
    """
    protocol, mark, rest = url.partition("://")
    form = "s3://bucket/folder, file:///folder, or another URL that fsspec knows"
    if not mark or not protocol or not url.isprintable():
        shown = repr(url) if "@" not in url else "text with an '@' (not shown)"
        raise RemoteError(f"checkpoint_remote {shown} is no URL", form)
    try:
        parts = urlsplit(url)
        secret = "@" in parts.netloc or "?" in rest or "#" in rest
    except ValueError as error:
        raise RemoteError(f"checkpoint_remote: a malformed {protocol}:// URL: {error}", form) from error
    if secret:
        raise RemoteError(
            f"checkpoint_remote: the {protocol}:// URL holds a user, password, query or fragment (not shown)",
            form,
            "give credentials in the environment, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    if protocol in _UNFIT:
        raise RemoteError(f"checkpoint_remote {url!r}: {protocol}:// {_UNFIT[protocol]}", form)
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise _package_missing(protocol, error) from error
    except ValueError as error:
        raise RemoteError(f"checkpoint_remote {url!r}: {error}", form) from error
    local = protocol in ("file", "local")
    if local and not (parts.netloc == "" and parts.path.strip("/")):
        raise RemoteError(f"checkpoint_remote {url!r} names no folder", "file:///an/absolute/folder")
    if protocol in ("s3", "s3a") and not _BUCKET.fullmatch(parts.netloc):
        raise RemoteError(f"checkpoint_remote {url!r} names no bucket", "s3://bucket/folder")
    if not local and not rest.strip("/"):
        raise RemoteError(f"checkpoint_remote {url!r} names no place", form)


def _package_missing(protocol: str, error: ImportError) -> RemoteError:
    fix = "pip install 'obsinfra[s3]'" if protocol in ("s3", "s3a") else f"install what fsspec needs: {error}"
    return RemoteError(f"{protocol}:// cannot be used here", "its package installed", fix)


def is_url(text: str) -> bool:
    """Whether `text` names a remote rather than a run or a path."""
    protocol, mark, _ = text.partition("://")
    return bool(mark) and protocol in fsspec.available_protocols()


def _pull_one(
    remote: Remote, store: CheckpointStore, manifest: Manifest, raw: bytes, progress: Progress | None
) -> tuple[int, int]:
    """Bring one checkpoint here; how many chunks were missing, and their bytes."""
    if strange := [digest for digest in manifest.chunks() if not _DIGEST.fullmatch(digest)]:
        raise CheckpointError(f"{manifest.path.name} names a chunk {strange[0]!r}", "a sha256")
    made: list[Path] = []
    count = received = 0
    with store.sharing():
        wanted = _absent(store, manifest)
        files = _files_here(store, manifest)
        here = sum(size for name, size in files.items() if digest_of(name) not in wanted)
        total = max(0, manifest.bytes_total - here)  # at most: equal chunks are there once
        store.check_space(total)
        for start in range(0, len(wanted), BATCH):
            for name, data in remote.read_objects(wanted[start : start + BATCH]).items():
                store.objects.put_file(name, data, made)
                count, received = count + 1, received + len(data)
            if progress is not None:
                progress(received, max(received, total))
        store.objects.sync(manifest.chunks())
        with store.writing():
            store.adopt(raw, manifest.path.name)
    return count, received


def _absent(store: CheckpointStore, manifest: Manifest) -> list[str]:
    """Chunks that are not here whole."""
    return [digest for digest in sorted(manifest.chunks()) if not store.objects.is_sound(digest)]


def _files_here(store: CheckpointStore, manifest: Manifest) -> dict[str, int]:
    """Each chunk's file and its size; 0 where there is none, which no chunk has."""
    paths = (store.objects.path(digest) for digest in sorted(manifest.chunks()))
    return {path.name: max(0, _size(path)) for path in paths}


def _choose(remote: Remote, names: Sequence[str], wanted: str) -> str:
    if wanted == tags.LATEST and names:
        return names[-1]
    for name in names:
        stem = name.removesuffix(".json")
        if wanted in (name, stem, stem.rpartition("-")[2]):
            return name
    raise RemoteError(f"no checkpoint {wanted!r} at {remote.url}", "an id or a full name there, or 'latest'")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
