"""The content-addressed checkpoint store: chunks under `objects/`, one manifest per checkpoint.

A chunk is named by the hash of its content, so unchanged data is written once and every read is verified.
The rename of the manifest is the commit. Knows bytes and files; tensors are `tensors`' business.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat, zip_longest
from pathlib import Path
from typing import Any

from obsinfra.backup.compression import Compression, check_compression, judge
from obsinfra.backup.file_layer import FileLayer, OperatingSystemFiles
from obsinfra.backup.manifest import (
    SCHEMA,
    Head,
    Manifest,
    TensorEntry,
    file_name,
    manifest_of,
    parse_manifest,
    sealed,
)
from obsinfra.backup.objects import CHUNK_BYTES, ObjectStore, digest_of, write_whole
from obsinfra.errors import CheckpointError

SPACE_MARGIN_BYTES = 8 * 2**20
"""Left free beyond what a checkpoint needs, for manifests and logs."""


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as it is stored: dtype name (as `torch.<name>`), shape, and its bytes in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class CheckpointStore:
    """A folder of checkpoints. Any number of readers; whoever writes or removes does so inside `writing()`.

    Only chunks may also be written outside it, inside `sharing()`, by the ranks of one distributed save.

    Args:
        root: the folder; created when first written.
        files: how writes reach the disk.
        threads: how many tensors are hashed and written at a time; with 1, in order.
        compression: `auto` compresses the chunks of tensors for which a sample says that it pays (see
            `compression`), when they are written; what is read may be either, whatever this says.

    Raises:
        ValueError: no such compression.
    """

    def __init__(
        self,
        root: Path,
        files: FileLayer | None = None,
        *,
        threads: int = 1,
        compression: Compression = "off",
    ) -> None:
        check_compression(compression)
        self.root = root
        self._threads = threads
        self._compression: Compression = compression
        self._committed: Manifest | None = None
        self.manifests = root / "manifests"
        self._files = files or OperatingSystemFiles()
        self.objects = ObjectStore(root / "objects", self._files)

    @property
    def chunk_bytes(self) -> int:
        """Size of each chunk of a tensor but the last, as it is written now."""
        return CHUNK_BYTES

    # ---- writing -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """One writer at a time: among threads, backup systems and processes, by a lock on `.writer`."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.root / ".writer", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Not lockf: a record lock does not keep out other threads of this process.
            fcntl.flock(fd, fcntl.LOCK_EX)
            self._prepare()
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # a child forked meanwhile has this descriptor too
            os.close(fd)

    def _prepare(self) -> None:
        """Make the folders and remove what a crashed writer left half done."""
        for folder in (self.objects.root, self.manifests):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.manifest_paths():  # a manifest stands only in folders that are durable
            for folder in (self.root.parent, self.root):
                self._files.sync_folder(folder)
        with self._unshared() as alone:
            for leftover in [*self.objects.root.glob("*.tmp"), *self.manifests.glob("*.tmp")]:
                if alone or leftover.parent == self.manifests:
                    self._files.remove(leftover)

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Chunks may be written beside others who write: until this ends, nobody removes a chunk.

        Any number at a time; nobody waits for its end, `collect` leaves the chunks for another time. It ends
        with the process at the latest. The checkpoint is then committed with `commit_shared`.
        """
        if not (self.root / ".sharing").exists():
            with self.writing():  # so that it is nobody's to share until those have ended who saw it absent
                os.close(os.open(self.root / ".sharing", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        with self._share_lock(fcntl.LOCK_SH):
            yield

    @contextlib.contextmanager
    def _unshared(self) -> Iterator[bool]:
        """Inside `writing()`: whether nobody is `sharing`; then nobody begins before this ends."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._share_lock(fcntl.LOCK_EX | fcntl.LOCK_NB))
                alone = True
            except FileNotFoundError:
                alone = True
            except BlockingIOError:
                alone = False
            yield alone

    @contextlib.contextmanager
    def _share_lock(self, operation: int) -> Iterator[None]:
        fd = os.open(self.root / ".sharing", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, operation)
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # as in `writing`
            os.close(fd)

    def commit(self, head: Head, document: Any, tensors: Sequence[RawTensor]) -> tuple[Manifest, int]:
        """Commit a checkpoint; when this returns it is durable, when it raises the store is as before.

        Args:
            head: what is known of it.
            document: the JSON document that refers to `tensors` by index.
            tensors: their bytes must not change meanwhile.

        Returns:
            The manifest and the bytes of new chunks, as they lie on the disk.

        Raises:
            CheckpointError: too little free space.
            OSError: the disk failed.
        """
        self.check_space(sum(len(tensor.data) for tensor in tensors))
        made: list[Path] = []
        try:
            return self._commit(head, document, tensors, made)
        except BaseException:
            self._take_back(made)
            raise

    def commit_shared(self, head: Head, document: Any, entries: Sequence[TensorEntry]) -> Manifest:
        """Commit a checkpoint whose chunks were written and made durable inside `sharing()`.

        Call it inside `sharing()` and `writing()`.

        Args:
            head: what is known of it.
            document: the JSON document that refers to `entries` by index.

        Raises:
            CheckpointError: a chunk is not there; the store is as before.
            OSError: the disk failed; the store is as before.
        """
        for digest in sorted({digest for entry in entries for digest in entry.chunks}):
            if not self.objects.path(digest).exists():
                raise CheckpointError(
                    f"chunk {digest[:12]} went missing before the commit",
                    "every chunk that the ranks wrote",
                    "save again, and remove nothing from the store by hand meanwhile",
                )
        made: list[Path] = []
        try:
            return self._seal(head, document, entries, made)
        except BaseException:
            self._take_back(made)
            raise

    def adopt(self, raw: bytes, name: str) -> Manifest:
        """Commit a manifest that was made elsewhere, as it is; its chunks are durable here by now.

        Call it inside `sharing()` and `writing()`.

        Args:
            raw: the text of its file.
            name: of its file.

        Raises:
            CheckpointError: damaged, not of that name, or a chunk is not there; the store is as before.
            OSError: the disk failed; the store is as before.
        """
        path = self.manifests / name
        manifest = parse_manifest(raw, path)
        for digest in sorted(manifest.chunks()):
            if not self.objects.path(digest).exists():
                raise CheckpointError(f"{name}: chunk {digest[:12]} is not here", "every chunk it names")
        made: list[Path] = []
        try:
            if manifest.schema == SCHEMA:  # versions that know no compression would miss the chunk
                packed = {digest for digest in manifest.chunks() if self.objects.is_compressed(digest)}
                for digest in sorted(packed):
                    self.objects.expand(digest, made)
                if packed:
                    self.objects.sync(packed)
            write_whole(self._files, path.with_suffix(".tmp"), path, memoryview(raw), made)
            self._files.sync_folder(self.manifests)
        except BaseException:
            self._take_back(made)
            raise
        return manifest

    def _take_back(self, made: list[Path]) -> None:
        """Remove what a failed commit made; chunks only while nobody may have come to count on them."""
        # At an error the rest stays: harmless, and `collect` finds it.
        with contextlib.suppress(OSError), self._unshared() as alone:
            for path in reversed(made):  # the manifest before the chunks it names
                if alone or path.parent in (self.objects.root, self.manifests):
                    self._files.remove(path)

    def _commit(
        self, head: Head, document: Any, tensors: Sequence[RawTensor], made: list[Path]
    ) -> tuple[Manifest, int]:
        """Write chunks, then the manifest; `made` gets every file that was not there before."""
        parent = self._parent()
        likely = _counterparts(tensors, parent)
        if self._threads > 1:  # so that one thread hashes while another waits for the disk
            with ThreadPoolExecutor(self._threads, "obsinfra-chunks") as pool:  # ends all, whatever fails
                results = list(pool.map(self._write_tensor, tensors, repeat(made), likely, repeat(True)))
        else:
            results = list(map(self._write_tensor, tensors, repeat(made), likely, repeat(True)))
        entries = [entry for entry, _ in results]
        durable = parent.chunks() if parent is not None else set()  # before its manifest was there
        untouched = {digest for entry, fresh in results if not fresh for digest in entry.chunks}
        self.objects.sync({digest for entry in entries for digest in entry.chunks} - (durable & untouched))
        manifest = self._seal(head, document, entries, made)
        self._committed = manifest
        self.objects.remember_only(manifest.chunks())
        return manifest, sum(fresh for _, fresh in results)

    def write_tensor(self, tensor: RawTensor, made: list[Path]) -> tuple[TensorEntry, int]:
        """Write a tensor's chunks; durable after `objects.sync`.

        Args:
            made: gets every file that was not there before.

        Returns:
            What a manifest says of it, and the bytes of new chunks, as they lie on the disk.
        """
        return self._write_tensor(tensor, made, (), False)

    def _write_tensor(
        self, tensor: RawTensor, made: list[Path], likely: Sequence[str], remember: bool
    ) -> tuple[TensorEntry, int]:
        """As `write_tensor`; `likely` are its chunks of before, which were remembered."""
        written = 0
        chunks: list[str] = []
        worth_it = judge(self._compression, tensor.data)
        for start in range(0, len(tensor.data), CHUNK_BYTES):
            before = likely[len(chunks)] if len(chunks) < len(likely) else None
            chunk = tensor.data[start : start + CHUNK_BYTES]
            digest, fresh = self.objects.put(chunk, made, before, worth_it, remember=remember)
            chunks.append(digest)
            written += fresh
        return TensorEntry(tensor.dtype, tensor.shape, len(tensor.data), tuple(chunks)), written

    def _seal(self, head: Head, document: Any, entries: Sequence[TensorEntry], made: list[Path]) -> Manifest:
        """Write the manifest of chunks that are durable."""
        digests = {digest for entry in entries for digest in entry.chunks}
        compressed = any(map(self.objects.is_compressed, digests))
        before = self._latest_path()
        parent = before.stem.rpartition("-")[2] if before is not None else None
        body = head.body(parent, document, entries, compressed=compressed)
        path = self.manifests / file_name(body)
        write_whole(self._files, path.with_suffix(".tmp"), path, memoryview(sealed(body)), made)
        if before is not None:
            _date_after(path, before)
        self._files.sync_folder(self.manifests)
        return manifest_of(path, body)

    def _latest_path(self) -> Path | None:
        """The checkpoint committed last, which need not be the one with the highest step."""
        paths = sorted(self.manifest_paths(), key=lambda path: path.stat().st_mtime_ns)
        return paths[-1] if paths else None

    def _parent(self) -> Manifest | None:
        """What was committed last, when it can be read."""
        path = self._latest_path()
        if path is None or (self._committed is not None and self._committed.path == path):
            return self._committed if path is not None else None
        with contextlib.suppress(CheckpointError):
            return self.read_manifest(path)
        return None

    def check_space(self, needed: int) -> None:
        """Whether `needed` bytes fit.

        Raises:
            CheckpointError: too little free space.
        """
        found = os.statvfs(self.root)
        free = found.f_bavail * found.f_frsize
        if free < needed + SPACE_MARGIN_BYTES:
            raise CheckpointError(
                f"{free / 1e6:.0f} MB free in {self.root}",
                f"{(needed + SPACE_MARGIN_BYTES) / 1e6:.0f} MB for this checkpoint",
                "free space, or keep fewer checkpoints",
            )

    # ---- reading -----------------------------------------------------------------------------------

    def manifest_paths(self) -> list[Path]:
        """Committed manifests, by step and name; nothing is read."""
        return sorted(self.manifests.glob("*.json")) if self.manifests.is_dir() else []

    def read_manifest(self, path: Path) -> Manifest:
        """Read and check one manifest.

        Raises:
            CheckpointError: absent, damaged, or of another schema.
        """
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}", "a checkpoint manifest") from error
        return parse_manifest(raw, path)

    def read_tensor(self, entry: TensorEntry, manifest: Manifest) -> bytearray:
        """The bytes of one tensor, every chunk verified.

        Raises:
            CheckpointError: a chunk is absent or damaged, or they are not as many bytes as named.
        """
        data = bytearray()
        for digest in entry.chunks:
            data += self.objects.read(digest, manifest.path.name)
            if len(data) > entry.nbytes:
                break  # a false list of chunks must not fill the memory
        if len(data) != entry.nbytes:
            raise CheckpointError(
                f"a tensor of {manifest.path.name} has {len(data)} bytes", f"{entry.nbytes} bytes"
            )
        return data

    def verify(self, manifest: Manifest, *, only_touched: bool = False) -> None:
        """Read chunks and compare their hashes, without building tensors.

        Args:
            only_touched: leave out chunks not written to since the manifest was, when they were sound.

        Raises:
            CheckpointError: a chunk is absent or damaged.
        """
        committed_ns = 0
        if only_touched:
            with contextlib.suppress(OSError):
                committed_ns = manifest.path.stat().st_mtime_ns
            if committed_ns > time.time_ns():  # the clock was set back: no time says anything
                committed_ns = 0
        for digest in sorted(manifest.chunks()):
            if not committed_ns or self.objects.touched_since(digest, committed_ns):
                self.objects.read(digest, manifest.path.name)

    # ---- removing ----------------------------------------------------------------------------------

    def remove(self, path: Path) -> None:
        """Remove one checkpoint; its chunks stay until `collect`."""
        self._files.remove(path)
        self._files.sync_folder(self.manifests)

    def collect(self) -> int:
        """Remove chunks that no manifest names.

        A manifest that cannot be read keeps every chunk, since nobody knows what it names; so does somebody
        `sharing`, whose chunks no manifest names yet.

        Returns:
            How many chunks were removed.
        """
        wanted: set[str] = set()
        for path in self.manifest_paths():
            try:
                wanted |= self.read_manifest(path).chunks()
            except CheckpointError:
                return 0
        removed = 0
        with self._unshared() as alone:
            for path in self.objects.all() if alone else ():
                if digest_of(path.name) not in wanted:
                    self.objects.remove(path)
                    removed += 1
        return removed


def _date_after(path: Path, before: Path) -> None:
    """Let a file be younger than another: commits are ordered by that, also after the clock was set back."""
    moment = before.stat().st_mtime_ns
    if path.stat().st_mtime_ns <= moment:
        os.utime(path, ns=(moment + 1, moment + 1))


def _counterparts(tensors: Sequence[RawTensor], parent: Manifest | None) -> list[tuple[str, ...]]:
    """For each tensor the chunks of the parent's tensor in the same place, if it is of the same kind."""
    entries = parent.tensors if parent is not None else ()
    return [
        entry.chunks
        if entry is not None and (entry.dtype, entry.nbytes) == (tensor.dtype, len(tensor.data))
        else ()
        for tensor, entry in zip_longest(tensors, entries[: len(tensors)])
    ]
