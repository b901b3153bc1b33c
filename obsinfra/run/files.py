"""Writing files that others read: whole or not at all. Used wherever a file crosses a process boundary."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries (creations, renames) durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes | str, *, mode: int = 0o600, durable: bool = True) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new, never a part.

    Args:
        path: target; its folder must exist.
        data: bytes, or text written as UTF-8.
        mode: permission bits of the new file.
        durable: fsync the file and its folder, so the content survives a power cut. Off for heartbeats.

    Raises:
        OSError: disk full, no permission; the old file is untouched then.
    """
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            view = memoryview(raw)
            while view:
                view = view[os.write(fd, view) :]
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_folder(path.parent)


def write_json_atomic(path: Path, document: Any, *, mode: int = 0o600, durable: bool = True) -> None:
    """`write_atomic` of an indented JSON document."""
    write_atomic(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n", mode=mode, durable=durable)


def of_rank(path: Path, rank: int) -> Path:
    """The file that `rank` writes where rank 0 writes `path`: `NAME-rankN.EXT` beside it."""
    return path if rank == 0 else path.with_stem(f"{path.stem}-rank{rank}")
