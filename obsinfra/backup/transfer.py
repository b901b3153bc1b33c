"""Checkpoints under way between a store and a remote: push, pull, and fetch, which brings one to resume from.

Only what is missing on the other side is copied, a checkpoint's manifest last, and every hash is verified.
Knows no tensors and no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obsinfra.backup import tags
from obsinfra.backup.manifest import Manifest, parse_manifest
from obsinfra.backup.objects import digest_of
from obsinfra.backup.remote import DIGEST, MANIFEST_NAME, Remote, RemoteError
from obsinfra.backup.store import CheckpointStore
from obsinfra.errors import CheckpointError
from obsinfra.monitoring.logging_config import get_logger

Progress = Callable[[int, int], None]
"""Called with bytes dealt with so far and bytes in all."""

BATCH = 4
"""Chunks under way at a time: at most this many times 16 MiB of memory."""

_log = get_logger("system")


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
    named = last if MANIFEST_NAME.fullmatch(last) and head.endswith("/manifests") else None
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


def _pull_one(
    remote: Remote, store: CheckpointStore, manifest: Manifest, raw: bytes, progress: Progress | None
) -> tuple[int, int]:
    """Bring one checkpoint here; how many chunks were missing, and their bytes."""
    if strange := [digest for digest in manifest.chunks() if not DIGEST.fullmatch(digest)]:
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
