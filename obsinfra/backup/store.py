"""The content-addressed checkpoint store: chunks under `objects/`, one manifest per checkpoint.

A chunk is named by the hash of its content, so unchanged data is written once and every read is verified.
The rename of the manifest is the commit. Knows bytes and files; tensors are `tensors`' business.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obsinfra.backup.file_layer import FileLayer, OperatingSystemFiles
from obsinfra.backup.manifest import (
    Head,
    Manifest,
    TensorEntry,
    file_name,
    manifest_of,
    parse_manifest,
    sealed,
)
from obsinfra.backup.objects import CHUNK_BYTES, ObjectStore, write_whole
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

    Args:
        root: the folder; created when first written.
        files: how writes reach the disk.
    """

    def __init__(self, root: Path, files: FileLayer | None = None) -> None:
        self.root = root
        self.manifests = root / "manifests"
        self._files = files or OperatingSystemFiles()
        self.objects = ObjectStore(root / "objects", self._files)

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
        for leftover in [*self.objects.root.glob("*.tmp"), *self.manifests.glob("*.tmp")]:
            self._files.remove(leftover)

    def commit(self, head: Head, document: Any, tensors: Sequence[RawTensor]) -> tuple[Manifest, int]:
        """Commit a checkpoint; when this returns it is durable, when it raises the store is as before.

        Args:
            head: what is known of it.
            document: the JSON document that refers to `tensors` by index.
            tensors: their bytes must not change meanwhile.

        Returns:
            The manifest and the bytes of new chunks.

        Raises:
            CheckpointError: too little free space.
            OSError: the disk failed.
        """
        self._check_space(sum(len(tensor.data) for tensor in tensors))
        made: list[Path] = []
        try:
            return self._commit(head, document, tensors, made)
        except BaseException:
            with contextlib.suppress(OSError):  # then the rest stays: harmless, and `collect` finds it
                for path in reversed(made):  # the manifest before the chunks it names
                    self._files.remove(path)
            raise

    def _commit(
        self, head: Head, document: Any, tensors: Sequence[RawTensor], made: list[Path]
    ) -> tuple[Manifest, int]:
        """Write chunks, then the manifest; `made` gets every file that was not there before."""
        written = 0
        entries = []
        for tensor in tensors:
            chunks = []
            for start in range(0, len(tensor.data), CHUNK_BYTES):
                digest, fresh = self.objects.put(tensor.data[start : start + CHUNK_BYTES], made)
                chunks.append(digest)
                written += fresh
            entries.append(TensorEntry(tensor.dtype, tensor.shape, len(tensor.data), tuple(chunks)))
        self.objects.sync({digest for entry in entries for digest in entry.chunks})
        body = head.body(self._latest_id(), document, entries)
        path = self.manifests / file_name(body)
        write_whole(self._files, path.with_suffix(".tmp"), path, memoryview(sealed(body)), made)
        self._files.sync_folder(self.manifests)
        return manifest_of(path, body), written

    def _latest_id(self) -> str | None:
        """Id of the checkpoint committed last, which need not be the one with the highest step."""
        paths = sorted(self.manifest_paths(), key=lambda path: path.stat().st_mtime_ns)
        return paths[-1].stem.rpartition("-")[2] if paths else None

    def _check_space(self, needed: int) -> None:
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

        A manifest that cannot be read keeps every chunk, since nobody knows what it names.

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
        for path in self.objects.all():
            if path.name not in wanted:
                self.objects.remove(path)
                removed += 1
        return removed
