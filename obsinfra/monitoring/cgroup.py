"""The memory limits that really apply: this process's cgroups, v2 or v1, from its own to the outermost.

For the host sampler and for checks of the machine. Linux's own files, nothing else:
https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

UNLIMITED = 1 << 60
"""cgroup v1 says "no limit" as 2^63 rounded down to a page; nothing real comes near this."""


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """One limited level.

    Attributes:
        used_bytes: working set: memory charged without inactive file cache, which is given back first.
        limit_bytes: what the level may use before the kernel kills.
        path: folder of the level.
    """

    used_bytes: int
    limit_bytes: int
    path: Path

    @property
    def ratio(self) -> float:
        """Used ÷ limit."""
        return self.used_bytes / self.limit_bytes


@dataclass(frozen=True, slots=True)
class _Files:
    """What a hierarchy calls its files."""

    used: str
    limit: str
    cache: str


_V2 = _Files("memory.current", "memory.max", "inactive_file")
_V1 = _Files("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file")


def memory_limit(root: Path = Path("/")) -> CgroupMemory | None:
    """The level with the smallest limit, the fullest of several equal ones; None when nothing limits.

    Args:
        root: where `proc` and `sys` are found; another one for tests.
    """
    return min(memory_limits(root), key=lambda level: (level.limit_bytes, -level.used_bytes), default=None)


def memory_limits(root: Path = Path("/")) -> list[CgroupMemory]:
    """Every limited level, innermost first. A wide one shared with others can be nearer than a narrow one."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return []
    found: list[CgroupMemory] = []
    for line in memberships:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            found += _levels(root, mounts, "cgroup", path, _V1)
        elif controllers == "":
            found += _levels(root, mounts, "cgroup2", path, _V2)
    return found


def _levels(root: Path, mounts: list[str], kind: str, path: str, files: _Files) -> list[CgroupMemory]:
    place = _mount(mounts, kind)
    if place is None:
        return []
    mounted_root, mount_point = place
    top = root / mount_point.lstrip("/")
    try:
        own = top / PurePosixPath(path).relative_to(mounted_root)
    except ValueError:
        own = (
            top  # a container without a cgroup namespace of its own: the host's path, but only its own level
        )
    if ".." in own.parts or not own.is_dir():
        own = top
    folders = [own, *(folder for folder in own.parents if folder == top or top in folder.parents)]
    levels = (_level(folder, files) for folder in folders)
    return [level for level in levels if level is not None]


def _mount(mounts: list[str], kind: str) -> tuple[str, str] | None:
    """Root within the hierarchy and mount point of the (memory) hierarchy of this kind."""
    for line in mounts:
        before, _, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if len(fields) < 5 or len(rest) < 3 or rest[0] != kind:
            continue
        if kind == "cgroup2" or "memory" in rest[2].split(","):
            return _unescape(fields[3]), _unescape(fields[4])
    return None


def _unescape(text: str) -> str:
    """mountinfo writes blanks and backslashes as octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _level(folder: Path, files: _Files) -> CgroupMemory | None:
    """This level, or None when it has no limit or cannot be read (the root of v2 has no such files)."""
    try:
        text = (folder / files.limit).read_text().strip()
        limit = UNLIMITED if text == "max" else int(text)
        used = int((folder / files.used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # v1 tells of the limits above, which a container cannot see.
        limit = min(limit, int(stat.get("hierarchical_memory_limit", UNLIMITED)))
        cache = int(stat.get(files.cache, 0))
    except (OSError, ValueError):
        return None
    if not 0 < limit < UNLIMITED:
        return None
    return CgroupMemory(max(0, used - cache), limit, folder)
