"""The few file operations a commit is made of, behind a protocol, so that tests can fail each of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol


class FileLayer(Protocol):
    """What the store does to the disk when it writes."""

    def write(self, path: Path, data: memoryview) -> None:
        """Create `path` (0600) with `data` and make its content durable."""
        ...

    def rename(self, source: Path, target: Path) -> None:
        """Move within one file system, atomically."""
        ...

    def sync_folder(self, folder: Path) -> None:
        """Make the folder's entries durable."""
        ...

    def remove(self, path: Path) -> None:
        """Remove a file; absent is fine."""
        ...


class OperatingSystemFiles:
    """The real thing."""

    def write(self, path: Path, data: memoryview) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            while data:
                data = data[os.write(fd, data) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def sync_folder(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
