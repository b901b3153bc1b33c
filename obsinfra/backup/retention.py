"""Which checkpoints stay: the policy, the pruning by it, and making room when the disk is short.

Called by the backup system, the writer process and the CLI. Knows no tensors and no torch.
"""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Literal, TypeVar

from obsinfra.backup import tags
from obsinfra.backup.manifest import Manifest
from obsinfra.backup.store import CheckpointStore
from obsinfra.errors import CheckpointError
from obsinfra.monitoring.logging_config import get_logger

T = TypeVar("T")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_log = get_logger("system")


@dataclass(frozen=True, slots=True)
class Retention:
    """What `prune` keeps: everything that any of these rules names, and tagged checkpoints always.

    Attributes:
        keep_last: regular ones, and as many final ones, the newest. Confirmed emergencies count as regular.
        keep_every: also the first regular or final one at or after each multiple of so many steps. By steps
            and not by count, so that pruning again, or later, keeps the same ones. None: off.
        keep_best: `best` ones, the newest; with `best_metric` also so many of any kind with its best values.
        best_metric: name of a metric in the manifests.
        best_mode: whether less of it is better.
        keep_emergency: emergencies nobody has confirmed, the newest; None keeps all until confirmed. Only
            `with_room` takes older ones against this, when the disk is full and nothing else is left to go.

    Raises:
        ValueError: a count is less than one, or the mode unknown.
    """

    keep_last: int = 3
    keep_every: int | None = None
    keep_best: int = 1
    best_metric: str | None = None
    best_mode: Literal["min", "max"] = "min"
    keep_emergency: int | None = None

    def __post_init__(self) -> None:
        counts = {"regular": self.keep_last, "best": self.keep_best, "emergency": self.keep_emergency}
        for kind, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"at least one {kind} checkpoint must be kept, got {count}")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"keep_every is a number of steps from 1 on, got {self.keep_every}")
        if self.best_mode not in ("min", "max"):
            raise ValueError(f"best_mode is min or max, got {self.best_mode!r}")

    def kept(self, manifests: Sequence[Manifest], confirmed: set[str]) -> set[Path]:
        """Those of `manifests` (oldest first) that a rule names.

        Args:
            confirmed: file names of emergency ones that somebody has confirmed.
        """
        groups: dict[str, list[Manifest]] = {}
        for manifest in manifests:
            settled = manifest.kind == "emergency" and manifest.path.name in confirmed
            groups.setdefault("regular" if settled else manifest.kind, []).append(manifest)
        limits = {
            "regular": self.keep_last,
            "final": self.keep_last,
            "best": self.keep_best,
            "emergency": self.keep_emergency,
        }
        named = []
        for kind, group in groups.items():
            limit = limits.get(kind)  # of a kind that nobody here knows, all stay
            named += group if limit is None else group[-limit:]
        named += self._milestones(sorted(groups.get("regular", []) + groups.get("final", []), key=tags.age))
        named += self._best(manifests)
        return {manifest.path for manifest in named}

    def _milestones(self, manifests: Sequence[Manifest]) -> list[Manifest]:
        if self.keep_every is None:
            return []
        first: dict[int, Manifest] = {}
        for manifest in manifests:
            first.setdefault(manifest.step // self.keep_every, manifest)
        first.pop(0, None)
        return list(first.values())

    def _best(self, manifests: Sequence[Manifest]) -> list[Manifest]:
        name = self.best_metric
        if name is None:
            return []
        sign = 1 if self.best_mode == "min" else -1
        rated = [m for m in manifests if math.isfinite(m.metrics.get(name, math.nan))]
        rated.reverse()  # of equals the newest
        return sorted(rated, key=lambda manifest: sign * manifest.metrics[name])[: self.keep_best]


def prune(store: CheckpointStore, policy: Retention, last_saved: Path | None = None) -> list[Path]:
    """Remove what the policy does not keep, then chunks nobody needs. Takes `store.writing()`.

    See `doomed` for what stays whatever the policy says.

    Args:
        last_saved: what this very process committed last: it stays, and is not read again to see that it is
            sound, unless it was touched since.

    Returns:
        Manifests removed, oldest first.

    Raises:
        OSError: the disk failed; what was removed until then stays removed.
    """
    with store.writing():
        return prune_inside(store, policy, last_saved)


def prune_inside(store: CheckpointStore, policy: Retention, last_saved: Path | None = None) -> list[Path]:
    """`prune` for a caller that is inside `store.writing()`, which cannot be entered twice."""
    removed = [manifest.path for manifest in doomed(store, policy, last_saved)]
    for path in removed:
        store.remove(path)
    if removed:
        store.collect()
        tags.forget_confirmations(store)
    return removed


def doomed(store: CheckpointStore, policy: Retention, last_saved: Path | None = None) -> list[Manifest]:
    """What `prune` would remove, oldest first; nothing is removed.

    Always stay: the newest sound resumable checkpoint whatever its kind and the newest sound one of
    `torch.distributed.checkpoint`, the one committed last whatever its step (training may have been rewound),
    tagged ones, and damaged manifests, for a person to look at. While a tag cannot be read, everything stays,
    since nobody knows what it keeps.
    """
    manifests = tags.readable(store)
    try:
        keep = {store.manifests / name for name in tags.tags(store).values()}
    except CheckpointError as error:
        _log.warning("prune_held_back", store=str(store.root), problem=str(error))
        return []
    keep |= policy.kept(manifests, tags.confirmed(store))
    keep |= {last_saved} if last_saved is not None else set()
    keep |= {path} if (path := _committed_last(manifests)) is not None else set()
    going = [manifest for manifest in manifests if manifest.path not in keep]
    for kind in ("resumable", "distributed"):
        usable = attrgetter(kind)
        if any(map(usable, going)):  # else none of them can be the one that must stay
            sound = newest_sound(store, list(filter(usable, manifests)), last_saved)
            going = [manifest for manifest in going if sound is None or manifest.path != sound.path]
    return going


def newest_sound(
    store: CheckpointStore, manifests: Sequence[Manifest], last_saved: Path | None = None
) -> Manifest | None:
    """The newest of `manifests` (oldest first) whose chunks are all sound.

    Args:
        last_saved: as for `prune`.
    """
    for manifest in reversed(manifests):
        with contextlib.suppress(CheckpointError):
            # What this very process wrote and hashed is not read again: it would cost its size.
            store.verify(manifest, only_touched=manifest.path == last_saved)
            return manifest
    return None


def with_room(
    store: CheckpointStore,
    policy: Retention,
    needed: int,
    commit: Callable[[], T],
    last_saved: Path | None = None,
) -> T:
    """Commit; where space is short, make room and try again. Inside `store.writing()`.

    First goes what the policy does not keep. If that is not enough, unconfirmed emergencies are given up in
    spite of `keep_emergency`, one by one and the oldest first, as the very last resort: only if they are
    large enough to help, and never the newest of them nor anything that `doomed` keeps in any case.

    Args:
        needed: bytes it takes at most.
        commit: raises OSError (no space, over quota) and leaves the store as it was when the disk fills up.
        last_saved: as for `prune`.

    Raises:
        CheckpointError: too little space even then.
        OSError: the disk failed, or is full even then.
    """

    def attempt() -> T:
        store.check_space(needed)
        return commit()

    try:
        return attempt()
    except (CheckpointError, OSError) as error:
        problem = _no_room(store, needed, error)
    removed = prune_inside(store, policy, last_saved)
    _log.warning(
        "checkpoint_space_short",
        store=str(store.root),
        needed_bytes=needed,
        problem=str(problem),
        pruned=[path.stem for path in removed],
    )
    if removed:
        try:
            return attempt()
        except (CheckpointError, OSError) as error:
            problem = _no_room(store, needed, error)
    for victim in _last_resort(store, policy, needed, problem, last_saved):
        store.remove(victim.path)
        store.collect()
        tags.forget_confirmations(store)
        _log.warning("unconfirmed_emergency_given_up", store=str(store.root), checkpoint=victim.path.stem)
        try:
            return attempt()
        except (CheckpointError, OSError) as error:
            problem = _no_room(store, needed, error)
    raise problem


def _no_room(store: CheckpointStore, needed: int, error: CheckpointError | OSError) -> Exception:
    """The error, if it says that there is too little space; else it is raised."""
    if isinstance(error, OSError):
        if error.errno in _NO_ROOM:
            return error
    elif not _fits(store, needed):
        return error
    raise error


def _last_resort(
    store: CheckpointStore, policy: Retention, needed: int, problem: Exception, last_saved: Path | None
) -> list[Manifest]:
    """Unconfirmed emergencies that may go so that others can be saved, oldest first; none if all are too few.

    A quota shows in no figure of free space: with one, they must free as much as is needed.
    """
    spared = {manifest.path for manifest in tags.readable(store)}
    spared -= {manifest.path for manifest in doomed(store, replace(policy, keep_emergency=1), last_saved)}
    victims = [found for found in tags.readable(store) if found.path not in spared]
    victims = [found for found in victims if found.kind == "emergency"]
    going = {digest for victim in victims for digest in victim.chunks()}
    for manifest in tags.readable(store):
        if manifest.path in spared:
            going -= manifest.chunks()
    freed = 0
    for digest in going:
        with contextlib.suppress(OSError):
            freed += store.objects.path(digest).stat().st_size
    if isinstance(problem, CheckpointError):
        return victims if _fits(store, needed - freed) else []
    return victims if freed >= needed else []


def _fits(store: CheckpointStore, needed: int) -> bool:
    try:
        store.check_space(needed)
    except CheckpointError:
        return False
    return True


def _committed_last(manifests: Sequence[Manifest]) -> Path | None:
    """By the time of the file, since steps may have been rewound; within one tick, by what they say."""
    moments = {}
    for manifest in manifests:
        with contextlib.suppress(OSError):
            moments[manifest.path] = (manifest.path.stat().st_mtime_ns, manifest.created_at)
    return max(moments, key=lambda path: moments[path], default=None)
