"""Chunks of bytes under `objects/`, each a file named by the sha256 of its content.

The bottom of the checkpoint store: written once, verified at every read. Knows no tensors, no manifests and
no torch, so that the writer process stays small.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from obsinfra.backup.file_layer import FileLayer
from obsinfra.errors import CheckpointError

CHUNK_BYTES = 16 * 2**20
"""Largest chunk; the last chunk of a tensor is shorter."""

_COMPARE_BYTES = 2**20
"""How much of a file is read at a time to compare it: stays in the processor's cache."""


class ObjectStore:
    """The folder of chunks. Any number of readers; one writer at a time, which the caller ensures.

    Args:
        root: the folder `objects/`.
        files: how writes reach the disk.
    """

    def __init__(self, root: Path, files: FileLayer) -> None:
        self.root = root
        self._files = files

    def path(self, digest: str) -> Path:
        """Where a chunk lies, or would."""
        return self.root / digest[:2] / digest

    def put(self, chunk: memoryview, made: list[Path], likely: str | None = None) -> tuple[str, int]:
        """Write a chunk unless it is there whole; durable only after `sync` of its folder.

        Args:
            chunk: at most `CHUNK_BYTES`.
            made: gets every file that was not there before, for whoever takes a failed commit back.
            likely: digest of a chunk that may well be the same. Comparing it byte by byte proves that, and
                takes an eighth of the time of hashing.

        Returns:
            Its digest, and the bytes written.

        Raises:
            OSError: the disk failed.
        """
        if likely is not None and self.holds(likely, chunk):
            return likely, 0
        digest = hashlib.sha256(chunk).hexdigest()
        target = self.path(digest)
        if self.is_sound(digest, len(chunk)):
            return digest, 0
        target.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = self.root / f"{digest[:16]}-{secrets.token_hex(4)}.tmp"
        write_whole(self._files, temporary, target, chunk, made)
        return digest, len(chunk)

    def sync(self, digests: set[str]) -> None:
        """Make the names of these chunks durable, also of those another writer may not have come to."""
        for folder in (*sorted({self.path(digest).parent for digest in digests}), self.root):
            self._files.sync_folder(folder)

    def is_sound(self, digest: str, size: int) -> bool:
        """Whether the chunk is there whole. It is read, not trusted: a damaged one gets written anew."""
        path = self.path(digest)
        try:
            if path.stat().st_size != size:
                return False
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError:
            return False

    def holds(self, digest: str, chunk: memoryview) -> bool:
        """Whether the file of that name has exactly these bytes, all of them read."""
        try:
            with self.path(digest).open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != len(chunk):
                    return False
                buffer = bytearray(min(_COMPARE_BYTES, len(chunk)))
                start = 0
                while count := file.readinto(buffer):
                    # A bytearray on the left compares at memory speed, a view does not.
                    found = buffer if count == len(buffer) else buffer[:count]
                    if found != chunk[start : start + count]:
                        return False
                    start += count
                return start == len(chunk)
        except OSError:
            return False

    def read(self, digest: str, wanted_by: str) -> bytes:
        """A chunk's content, verified.

        Args:
            wanted_by: who needs it, for the message.

        Raises:
            CheckpointError: absent, unreadable or damaged.
        """
        try:
            data = self.path(digest).read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{wanted_by}: chunk {digest[:12]} cannot be read: {error.strerror}", "a whole store"
            ) from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(f"{wanted_by}: chunk {digest[:12]} is damaged", "its own content")
        return data

    def all(self) -> Iterator[Path]:
        """Every chunk's file."""
        for folder in self.root.iterdir():
            if folder.is_dir():
                yield from folder.iterdir()

    def remove(self, path: Path) -> None:
        """Remove one chunk's file."""
        self._files.remove(path)

    def touched_since(self, digest: str, moment_ns: int) -> bool:
        """Whether the chunk's file is absent or was written to at or after `moment_ns` of the epoch."""
        try:
            return self.path(digest).stat().st_mtime_ns >= moment_ns
        except OSError:
            return True


def write_whole(files: FileLayer, temporary: Path, target: Path, data: memoryview, made: list[Path]) -> None:
    """Write a file under a temporary name and rename it; `made` gets what was not there before."""
    made.append(temporary)
    if not os.path.exists(target):
        made.append(target)
    files.write(temporary, data)
    files.rename(temporary, target)
