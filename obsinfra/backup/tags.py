"""Names and marks people give to checkpoints: a tag keeps one for good, a confirmation lets an emergency go.

Small sealed files beside the manifests, in `tags/` and `confirmed/`. Knows no tensors and no torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from obsinfra.backup.manifest import Manifest, sealed, unsealed
from obsinfra.backup.store import CheckpointStore
from obsinfra.errors import CheckpointError
from obsinfra.run.files import fsync_folder, write_atomic

LATEST = "latest"
"""Names the newest checkpoint, so no tag may be called so."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TAKEN = re.compile(r"latest|[0-9a-f]{8}|\d{12}-.*")
"""What a tag must not look like: `latest`, an id, a checkpoint's full name."""


def age(manifest: Manifest) -> tuple[int, str]:
    """What checkpoints are ordered by, oldest first: step, then the time they were made."""
    return manifest.step, manifest.created_at


def readable(
    store: CheckpointStore, paths: list[Path] | None = None, problems: dict[Path, str] | None = None
) -> list[Manifest]:
    """Manifests that can be read, oldest first; chunks are not looked at.

    Args:
        paths: which; None takes all.
        problems: gets why others cannot be read.
    """
    found = []
    for path in store.manifest_paths() if paths is None else paths:
        try:
            found.append(store.read_manifest(path))
        except CheckpointError as error:
            if problems is not None:
                problems[path] = str(error)
    return sorted(found, key=age)


def find(store: CheckpointStore, name: str) -> Path:
    """The manifest that `name` means: `latest`, a tag, an id, a full name, or a manifest's path.

    Raises:
        CheckpointError: there is none.
    """
    paths = store.manifest_paths()
    if name == LATEST:
        if manifests := readable(store, paths):
            return manifests[-1].path
    elif (tag_path := _tag_path(store, name)) is not None and tag_path.is_file():
        path = store.manifests / _read_mark(tag_path)
        if path in paths:
            return path
        raise CheckpointError(
            f"tag {name!r} names {path.stem}, which is gone",
            "a checkpoint of this store",
            f"remove the tag with 'obsinfra checkpoints untag {name}'",
        )
    for path in paths:
        if name in (path.stem, path.name, path.stem.rpartition("-")[2]):
            return path
    if "/" in name and Path(name).is_file():
        return Path(name)
    raise CheckpointError(
        f"no checkpoint {name!r} in {store.root}",
        "an id, a full name, a tag or 'latest'",
        "see 'obsinfra checkpoints list'",
    )


def tag(store: CheckpointStore, checkpoint: Path, name: str, *, move: bool = False) -> None:
    """Give a checkpoint a name; no `prune` removes it as long as it has one. Takes `store.writing()`.

    Args:
        checkpoint: its manifest.
        name: letters, digits, `.`, `_`, `-`; at most 64; not `latest` and nothing that looks like an id.
        move: take the name from another checkpoint that has it.

    Raises:
        CheckpointError: the name cannot be one, or is another checkpoint's; there is no such checkpoint.
        OSError: the disk failed.
    """
    path = _checked_path(store, name)
    with store.writing():
        _check_here(store, checkpoint)
        if path.exists() and not move and (other := _read_mark(path)) != checkpoint.name:
            raise CheckpointError(
                f"tag {name!r} is that of {Path(other).stem}", "a new name", "remove it there first"
            )
        _write_mark(store, path, checkpoint.name)


def check_free(store: CheckpointStore, name: str) -> None:
    """Whether `name` can be given to a checkpoint that is yet to be made.

    Raises:
        CheckpointError: it cannot be a tag's name, or is another checkpoint's.
    """
    if _checked_path(store, name).exists():
        raise CheckpointError(f"tag {name!r} is there already", "a new name")


def untag(store: CheckpointStore, name: str) -> None:
    """Take a name away; the checkpoint stays until `prune`. Takes `store.writing()`.

    Raises:
        CheckpointError: there is no such tag.
        OSError: the disk failed.
    """
    path = _tag_path(store, name)
    if path is None or not path.exists():
        raise CheckpointError(f"no tag {name!r} in {store.root}", "one of " + (", ".join(tags(store)) or "–"))
    with store.writing():
        _remove_mark(path)


def tags(store: CheckpointStore) -> dict[str, str]:
    """Every tag and the manifest's file name it stands for, by name.

    Raises:
        CheckpointError: a tag's file is damaged.
    """
    return {path.name: _read_mark(path) for path in _marks(store.root / "tags")}


def confirm(store: CheckpointStore, checkpoint: Path) -> None:
    """Say that an emergency checkpoint was looked at: from now on it is kept as a regular one is.

    Takes `store.writing()`.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not an emergency one.
        OSError: the disk failed.
    """
    with store.writing():
        _check_here(store, checkpoint)
        if (kind := store.read_manifest(checkpoint).kind) != "emergency":
            raise CheckpointError(f"{checkpoint.stem} is of kind {kind}", "an emergency checkpoint")
        _write_mark(store, store.root / "confirmed" / checkpoint.name, checkpoint.name)


def confirmed(store: CheckpointStore) -> set[str]:
    """File names of the manifests that `confirm` was called for; a damaged mark does not count."""
    found = set()
    for path in _marks(store.root / "confirmed"):
        try:
            found.add(_read_mark(path))
        except CheckpointError:
            continue  # kept as if unconfirmed: the side that loses nothing
    return found


def forget_confirmations(store: CheckpointStore) -> None:
    """Remove marks of checkpoints that are gone; inside `store.writing()`."""
    for path in _marks(store.root / "confirmed"):
        if not (store.manifests / path.name).exists():
            _remove_mark(path)


def _tag_path(store: CheckpointStore, name: str) -> Path | None:
    """Where a tag lies, or would; None when it cannot be a tag's name."""
    return store.root / "tags" / name if _NAME.fullmatch(name) and not _TAKEN.fullmatch(name) else None


def _checked_path(store: CheckpointStore, name: str) -> Path:
    path = _tag_path(store, name)
    if path is None:
        raise CheckpointError(
            f"tag {name!r}", "1 to 64 letters, digits, '.', '_' or '-', not 'latest' and not like an id"
        )
    return path


def _check_here(store: CheckpointStore, checkpoint: Path) -> None:
    if checkpoint not in store.manifest_paths():
        raise CheckpointError(f"no checkpoint {checkpoint}", f"one in {store.manifests}")


def _marks(folder: Path) -> list[Path]:
    """Mark files; a half-written one begins with a dot."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _write_mark(store: CheckpointStore, path: Path, manifest_name: str) -> None:
    if not path.parent.is_dir():
        path.parent.mkdir(mode=0o700)
        fsync_folder(store.root)
    write_atomic(path, sealed({"checkpoint": manifest_name}))


def _remove_mark(path: Path) -> None:
    path.unlink(missing_ok=True)
    fsync_folder(path.parent)


def _read_mark(path: Path) -> str:
    try:
        name = json.loads(unsealed(path.read_bytes()))["checkpoint"]
        if not isinstance(name, str) or "/" in name:
            raise ValueError(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the mark {path} is damaged", "a sealed checkpoint name", "remove the file, and set it anew"
        ) from error
    return name
