"""Going back to an earlier checkpoint within a run, and what a run's folder remembers of it.

A rollback leaves checkpoints of higher steps behind, from which nothing may go on by itself. `rollbacks.json`
in the run folder names them, and `load_newest` heeds it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from obsinfra.backup import tags
from obsinfra.backup.backup_system import BackupSystem, LoadedCheckpoint
from obsinfra.backup.manifest import Manifest
from obsinfra.errors import CheckpointError
from obsinfra.run.files import write_json_atomic

FILE = "rollbacks.json"
_VERSION = 1
_REMOVABLE = ("regular", "final", "best")


@dataclass(frozen=True, slots=True)
class Rollback:
    """One rollback.

    Attributes:
        from_step: where the run was.
        to_step: the step of the checkpoint it went back to.
        checkpoint: that checkpoint's id.
        skipped: whether the data used in between was passed over.
        abandoned: ids of the checkpoints beyond `to_step` at that time: by id, since clocks are set back.
        at: ISO 8601, UTC.
        reason: for people.
    """

    from_step: int
    to_step: int
    checkpoint: str
    skipped: bool
    abandoned: tuple[str, ...]
    at: str
    reason: str


def beyond(backup: BackupSystem, step: int) -> tuple[str, ...]:
    """Ids of all checkpoints after `step`."""
    return tuple(manifest.id for manifest in backup.list() if manifest.step > step)


def read_rollbacks(root: Path) -> list[Rollback]:
    """The rollbacks of the run in `root`, oldest first; none when it has never been rolled back.

    Raises:
        CheckpointError: the file is damaged: nobody knows which checkpoints are of a course that was left.
    """
    path = root / FILE
    try:
        document = json.loads(path.read_text())
        found = [
            Rollback(**{**entry, "abandoned": tuple(map(str, entry["abandoned"]))})
            for entry in document["rollbacks"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"unreadable {path}: {error}",
            "the list of rollbacks a trainer wrote",
            "name the checkpoint to go on from, or remove the file to take the one of the highest step",
        ) from error
    return found


def left_behind(root: Path) -> set[str]:
    """Ids of the checkpoints that rollbacks left behind and none has gone back to since.

    Raises:
        CheckpointError: as `read_rollbacks`.
    """
    left: set[str] = set()
    for rollback in read_rollbacks(root):
        left |= set(rollback.abandoned)
        left.discard(rollback.checkpoint)
    return left


def note_rollback(root: Path, rollback: Rollback) -> None:
    """Add `rollback` to the run's list, durably.

    Raises:
        OSError, CheckpointError: it cannot be written, or the list cannot be read.
    """
    entries = [asdict(entry) for entry in (*read_rollbacks(root), rollback)]
    write_json_atomic(root / FILE, {"version": _VERSION, "rollbacks": entries}, mode=0o644)


def load_newest(backup: BackupSystem, root: Path) -> LoadedCheckpoint:
    """The newest sound resumable checkpoint that no rollback has left behind.

    Args:
        root: the run's folder.

    Raises:
        CheckpointError: there is none.
    """
    left = left_behind(root)
    return load_last(backup, lambda manifest: manifest.id not in left) if left else backup.load()


def load_last(backup: BackupSystem, wanted: Callable[[Manifest], bool]) -> LoadedCheckpoint:
    """The newest sound resumable checkpoint that is `wanted`; damaged ones are passed over and told of.

    Raises:
        CheckpointError: there is none.
    """
    loaded, damaged = backup.load_newest(lambda manifest: manifest.resumable and wanted(manifest))
    if loaded is None:
        raise CheckpointError(
            f"no sound checkpoint to go back to in {backup.store.root}{damaged}",
            "at least one committed before the trouble",
            "see 'obsinfra checkpoints list', and name one with checkpoint=…",
        )
    return loaded


def remove_abandoned(backup: BackupSystem, rollback: Rollback) -> Sequence[Path]:
    """Remove checkpoints that `rollback` left behind, so that the retention keeps those of the new course.

    Tagged ones and emergencies stay.

    Returns:
        Manifests removed.

    Raises:
        OSError, CheckpointError: the disk failed, or a tag cannot be read; then nothing more is removed.
    """
    store = backup.store
    with store.writing():
        kept = set(tags.tags(store).values())
        going = [
            manifest.path
            for manifest in backup.list()
            if manifest.id in rollback.abandoned
            and manifest.kind in _REMOVABLE
            and manifest.path.name not in kept
        ]
        for path in going:
            store.remove(path)
        if going:
            store.collect()
    return going
