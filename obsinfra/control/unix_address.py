"""Addresses of Unix sockets that lie deeper than `sockaddr_un` has room for (108 bytes on Linux).

Used by both ends of the control channel.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

LONGEST = 100
"""Bytes of a path that every system with Unix sockets takes."""


@contextlib.contextmanager
def short_address(path: Path) -> Iterator[str]:
    """An address of `path` that fits, valid inside the block.

    A long path goes through this process's descriptor of its folder (`/proc/self/fd`, Linux).

    Raises:
        OSError: the folder does not exist, or the path is too long and there is no `/proc`.
    """
    text = str(path)
    if len(os.fsencode(text)) <= LONGEST:
        yield text
        return
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)
