"""Chunks of bytes under `objects/`, each a file named by the sha256 of its content.

The bottom of the checkpoint store: written once, verified at every read. A compressed chunk has the suffix
`.zst` and is still named by what is inside, so that it is one and the same chunk in either form. Knows no
tensors, no manifests and no torch, so that the writer process stays small.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

from obsinfra.backup.compression import SUFFIX, compress, decompress
from obsinfra.backup.file_layer import FileLayer
from obsinfra.errors import CheckpointError

CHUNK_BYTES = 16 * 2**20
"""Largest chunk; the last chunk of a tensor is shorter."""

_COMPARE_BYTES = 2**20
"""How much of a file is read at a time to compare it: stays in the processor's cache."""

_Mark = tuple[int, int, int, int]


class ObjectStore:
    """The folder of chunks. Any number of readers; one writer at a time, which the caller ensures.

    Args:
        root: the folder `objects/`.
        files: how writes reach the disk.
    """

    def __init__(self, root: Path, files: FileLayer) -> None:
        self.root = root
        self._files = files
        self._hashed: dict[str, _Mark] = {}

    def path(self, digest: str) -> Path:
        """Where a chunk lies, or would: the compressed file where there is no other."""
        plain, compressed = self._places(digest)
        return compressed if not plain.exists() and compressed.exists() else plain

    def is_compressed(self, digest: str) -> bool:
        """Whether there is a compressed file of it and no other."""
        return self.path(digest).name != digest

    def put(
        self,
        chunk: memoryview,
        made: list[Path],
        likely: str | None = None,
        worth_compressing: Callable[[], bool] = lambda: False,
        *,
        remember: bool = False,
    ) -> tuple[str, int]:
        """Write a chunk unless it is there whole, in whichever form; durable only after `sync` of its folder.

        Args:
            chunk: at most `CHUNK_BYTES`.
            made: gets every file that was not there before, for whoever takes a failed commit back.
            likely: digest of a chunk that may well be the same. Where its file was not touched since it was
                hashed here, comparing every byte proves that, and takes an eighth of the time of hashing.
            worth_compressing: asked only when it has to be written.
            remember: that it was hashed here, until `remember_only`, so that it can be `likely` later.

        Returns:
            Its digest, and the bytes written.

        Raises:
            OSError: the disk failed.
        """
        if likely is not None and self._holds(likely, chunk):
            return likely, 0
        digest = hashlib.sha256(chunk).hexdigest()
        if (sound := self._sound_file(digest, len(chunk))) is not None:
            if remember:
                self._hashed[sound[0]] = sound[1]
            return digest, 0
        name, data = digest, chunk
        # A damaged file is mended as it is: manifests that know of no compression may name it.
        if not self._places(digest)[0].exists() and worth_compressing():
            frame = compress(chunk)
            if len(frame) < len(chunk):
                name, data = digest + SUFFIX, memoryview(frame)
        target = self._write(name, data, made)
        if remember:
            self._hashed[name] = _mark(target.stat())
        return digest, len(data)

    def put_file(self, name: str, data: bytes, made: list[Path]) -> None:
        """Write a chunk's file as it is in another store; durable only after `sync` of its folder.

        Args:
            name: of the file there, see `read_file`.
            data: its content, verified by `content_of`.
            made: as for `put`.

        Raises:
            OSError: the disk failed.
        """
        self._write(name, memoryview(data), made)

    def expand(self, digest: str, made: list[Path]) -> None:
        """Write a compressed chunk as it is, too, for a manifest that knows of no compression.

        Args:
            made: as for `put`.

        Raises:
            CheckpointError: absent, unreadable or damaged.
            OSError: the disk failed.
        """
        self._write(digest, memoryview(self.read(digest, "a copied checkpoint")), made)

    def _write(self, name: str, data: memoryview, made: list[Path]) -> Path:
        target = self.root / name[:2] / name
        target.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = self.root / f"{name[:16]}-{secrets.token_hex(4)}.tmp"
        write_whole(self._files, temporary, target, data, made)
        return target

    def remember_only(self, digests: set[str]) -> None:
        """Forget what was hashed here of all other chunks."""
        kept = list(self._hashed.items())
        self._hashed = {name: mark for name, mark in kept if digest_of(name) in digests}

    def _places(self, digest: str) -> tuple[Path, Path]:
        """Where its file is as it is, and where compressed."""
        folder = self.root / digest[:2]
        return folder / digest, folder / f"{digest}{SUFFIX}"

    def sync(self, digests: set[str]) -> None:
        """Make the names of these chunks durable, also of those another writer may not have come to."""
        for folder in (*sorted({self.root / digest[:2] for digest in digests}), self.root):
            self._files.sync_folder(folder)

    def is_sound(self, digest: str, size: int | None = None) -> bool:
        """Whether the chunk is there whole. It is read, not trusted: a damaged one gets written anew.

        Args:
            size: of its content where that is known; spares reading what cannot be it.
        """
        return self._sound_file(digest, size) is not None

    def _sound_file(self, digest: str, size: int | None) -> tuple[str, _Mark] | None:
        """As `is_sound`; the name of its file, and the file's mark from before it was read."""
        plain, compressed = self._places(digest)
        with contextlib.suppress(OSError), plain.open("rb") as file:
            found = os.fstat(file.fileno())
            fits = size is None or found.st_size == size
            if fits and hashlib.file_digest(file, "sha256").hexdigest() == digest:
                return plain.name, _mark(found)
        with contextlib.suppress(OSError, ValueError):
            found = compressed.stat()
            if size in (None, len(content_of(compressed.name, _read(compressed)))):
                return compressed.name, _mark(found)
        return None

    def _holds(self, digest: str, chunk: memoryview) -> bool:
        """Whether the chunk of that name has exactly these bytes, all of them read.

        Only of a file that was hashed here and is still the same one: what a damaged file holds may by chance
        be what is to be written now, as zeros are, but it would not go by that name.
        """
        plain, compressed = self._places(digest)
        try:
            if (mark := self._hashed.get(plain.name)) is not None:
                with plain.open("rb", buffering=0) as file:
                    found = os.fstat(file.fileno())
                    return _mark(found) == mark and found.st_size == len(chunk) and _equals(file, chunk)
            if (mark := self._hashed.get(compressed.name)) is not None:
                return _mark(compressed.stat()) == mark and decompress(_read(compressed), len(chunk)) == chunk
        except (OSError, ValueError):
            pass
        return False

    def read(self, digest: str, wanted_by: str) -> bytes:
        """A chunk's content, verified.

        Args:
            wanted_by: who needs it, for the message.

        Raises:
            CheckpointError: absent, unreadable or damaged.
        """
        return self._find(digest, wanted_by)[2]

    def read_file(self, digest: str, wanted_by: str) -> tuple[str, bytes]:
        """Name and bytes of a chunk's file as they are on disk, its content verified; for copies.

        Args:
            wanted_by: who needs it, for the message.

        Raises:
            CheckpointError: absent, unreadable or damaged.
        """
        return self._find(digest, wanted_by)[:2]

    def _find(self, digest: str, wanted_by: str) -> tuple[str, bytes, bytes]:
        """Name and bytes of the first sound file of a chunk, and its content."""
        problem: tuple[str, str, Exception] | None = None
        for path in self._places(digest):
            try:
                data = _read(path)
                return path.name, data, content_of(path.name, data)
            except FileNotFoundError as error:
                problem = problem or (f"cannot be read: {error.strerror}", "a whole store", error)
            except OSError as error:
                problem = (f"cannot be read: {error.strerror}", "a whole store", error)
            except ValueError as error:
                problem = ("is damaged", "its own content", error)
        assert problem is not None
        says, expected, cause = problem
        raise CheckpointError(f"{wanted_by}: chunk {digest[:12]} {says}", expected) from cause

    def all(self) -> Iterator[Path]:
        """Every chunk's file; of what chunk, says `digest_of`."""
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


def _mark(found: os.stat_result) -> _Mark:
    """What cannot stay the same when a file is replaced, renamed or written to."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _equals(file: FileIO, chunk: memoryview) -> bool:
    """Whether a file has exactly these bytes, from where it is to its end."""
    buffer = bytearray(min(_COMPARE_BYTES, len(chunk)))
    start = 0
    while count := file.readinto(buffer):
        # A bytearray on the left compares at memory speed, a view does not.
        found = buffer if count == len(buffer) else buffer[:count]
        if found != chunk[start : start + count]:
            return False
        start += count
    return start == len(chunk)


def digest_of(name: str) -> str:
    """The digest of the chunk whose file has this name, compressed or not."""
    return name.removesuffix(SUFFIX)


def content_of(name: str, data: bytes) -> bytes:
    """The content of a chunk whose file `name` holds `data`, verified.

    Raises:
        ValueError: damaged. No more memory is taken than for the largest chunk, whatever `data` says.
    """
    if name.endswith(SUFFIX):
        data = decompress(data, CHUNK_BYTES)
    if hashlib.sha256(data).hexdigest() != digest_of(name):
        raise ValueError("not what its name says")
    return data


def _read(path: Path) -> bytes:
    """A file that may be a chunk's.

    Raises:
        ValueError: it is too large for one.
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size > CHUNK_BYTES:
            raise ValueError("larger than any chunk")
        return file.readall()


def write_whole(files: FileLayer, temporary: Path, target: Path, data: memoryview, made: list[Path]) -> None:
    """Write a file under a temporary name and rename it; `made` gets what was not there before."""
    made.append(temporary)
    if not os.path.exists(target):
        made.append(target)
    files.write(temporary, data)
    files.rename(temporary, target)
