"""A file of lines that grows by whole records and is rotated by size. Logs and spans are written through it.

Not thread-safe: its one owner brings a lock or a thread. Knows nothing of what the lines mean.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path


class RotatingFile:
    """Appends records to `path`; when full, `path` becomes `path.1`, `path.1` becomes `path.2`, and so on.

    Each record is one `write` system call, so a reader, and a process killed in between, sees whole lines;
    only a full disk can tear one, and then the next record begins on a line of its own. What an earlier
    process left is kept and continued.

    Args:
        path: the file; its folder must exist. Opened at the first record.
        max_bytes: rotate before the file would grow beyond this.
        backups: old files kept; 0 starts over.
    """

    def __init__(self, path: Path, *, max_bytes: int, backups: int) -> None:
        if max_bytes < 1 or backups < 0:
            raise ValueError(f"max_bytes {max_bytes} and backups {backups}: expected at least 1 and 0")
        self.path = path
        self._max_bytes, self._backups = max_bytes, backups
        self._fd: int | None = None
        self._size = 0
        self._torn = False
        self._pid = os.getpid()

    def append(self, record: bytes) -> None:
        """Write `record` and a newline.

        Raises:
            OSError: not written, or only a part of it: disk full, folder gone, no permission.
        """
        self.open()
        # Rotation belongs to the process that made this object; a forked child only appends.
        if self._size and self._size + len(record) + 1 > self._max_bytes and os.getpid() == self._pid:
            self._rotate()
        assert self._fd is not None
        data = (b"\n" if self._torn else b"") + record + b"\n"
        written = os.write(self._fd, data)
        self._size += written
        self._torn = written < len(data)
        if self._torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self) -> None:
        """Close the file; a later record opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def open(self) -> None:
        """Open the file if it is not; `append` does it by itself.

        Raises:
            OSError: the folder is missing or not writable.
        """
        if self._fd is not None:
            return
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(fd).st_size
        self._torn = self._size > 0 and os.pread(fd, 1, self._size - 1) != b"\n"
        self._fd = fd

    def _rotate(self) -> None:
        self.close()
        if self._backups == 0:
            self.path.unlink(missing_ok=True)
        for number in range(self._backups, 0, -1):
            older = self.path if number == 1 else self.path.with_name(f"{self.path.name}.{number - 1}")
            if older.exists():
                older.replace(self.path.with_name(f"{self.path.name}.{number}"))
        self.open()
