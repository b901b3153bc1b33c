"""inotify, as far as the watch over runs needs it: a run folder appeared, or its run.json was replaced.

Only hastens what polling finds anyway: it is absent off Linux, silent across most bind mounts and network
file systems, and may run out of watches. Knows paths, nothing of runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

_CREATE, _DELETE, _MOVED_FROM, _MOVED_TO = 0x100, 0x200, 0x40, 0x80
_IGNORED, _OVERFLOW, _ONLY_FOLDERS = 0x8000, 0x4000, 0x1000000
_HEADER = struct.Struct("iIII")  # struct inotify_event: watch, mask, cookie, length of the name that follows


class FolderEvents:
    """Waits until something changes in a folder of folders.

    Args:
        root: the outer folder; entries that come and go in it are reported.
        names: file names that are reported when they appear in one of the inner folders.
    """

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        self._root, self._names = root, frozenset(name.encode() for name in names)
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._watches: dict[str, int] = {}
        self._outer: int | None = None
        self._fd = -1
        self._library: ctypes.CDLL | None = None
        if sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):
                self._library = ctypes.CDLL(None, use_errno=True)
                self._fd = self._library.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)

    @property
    def works(self) -> bool:
        """Whether the outer folder is being watched."""
        return self._outer is not None

    def watch(self, inner: Iterable[str]) -> None:
        """Watch the outer folder and these entries of it, and no others."""
        if self._fd < 0:
            return
        if self._outer is None:
            self._outer = self._add(self._root, _CREATE | _DELETE | _MOVED_FROM | _MOVED_TO)
        wanted = set(inner)
        for name in wanted - self._watches.keys():
            if (watch := self._add(self._root / name, _MOVED_TO | _ONLY_FOLDERS)) is not None:
                self._watches[name] = watch
        for name in self._watches.keys() - wanted:
            watch = self._watches.pop(name)
            assert self._library is not None
            self._library.inotify_rm_watch(self._fd, watch)  # fails for a folder that is gone: nothing to do

    def wait(self, seconds: float) -> bool:
        """Wait for a change, `wake`, or the end of `seconds`; returns whether a change was seen."""
        read = [self._wake_reader] + ([self._fd] if self._fd >= 0 else [])
        ready, _, _ = select.select(read, [], [], seconds)
        if self._wake_reader in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_reader, 4096)
        return self._fd in ready and self._changed()

    def wake(self) -> None:
        """Let a wait under way return; any thread."""
        with contextlib.suppress(OSError):
            os.write(self._wake_writer, b"x")

    def close(self) -> None:
        """Give back every descriptor."""
        for fd in (self._wake_reader, self._wake_writer, self._fd):
            if fd >= 0:
                os.close(fd)
        self._fd = -1

    def _add(self, path: Path, mask: int) -> int | None:
        assert self._library is not None
        watch: int = self._library.inotify_add_watch(self._fd, os.fsencode(path), mask)
        return watch if watch >= 0 else None

    def _changed(self) -> bool:
        try:
            raw = os.read(self._fd, 1 << 16)
        except OSError:
            return False
        changed, at = False, 0
        while at + _HEADER.size <= len(raw):
            watch, mask, _, length = _HEADER.unpack_from(raw, at)
            name = raw[at + _HEADER.size : at + _HEADER.size + length].rstrip(b"\0")
            at += _HEADER.size + length
            if mask & _IGNORED:  # the folder is gone, and its watch with it
                if watch == self._outer:
                    self._outer = None
                self._watches = {known: number for known, number in self._watches.items() if number != watch}
                changed = True
            else:
                changed = changed or bool(mask & _OVERFLOW) or watch == self._outer or name in self._names
        return changed
