"""Checkpoints in other people's formats: safetensors, `torch.save`, `torch.distributed.checkpoint`; and back.

Called by the CLI and by anybody with a `BackupSystem`. What came from outside is never unpickled freely.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from obsinfra.backup import tags
from obsinfra.backup.backup_system import BackupSystem, SavedCheckpoint
from obsinfra.backup.dcp_whole import read_any_state
from obsinfra.errors import CheckpointError, first_line
from obsinfra.run.files import fsync_folder

Format = Literal["safetensors", "torch", "dcp"]
WHOLE = "all"
"""The part that is the whole state."""
_NOTES = ("format", "obsinfra_checkpoint", "step")
"""What a safetensors file's metadata says besides names; the first is what Hugging Face's loaders ask for."""


def export(
    backup: BackupSystem,
    checkpoint: Path | str,
    target: Path,
    *,
    form: Format = "safetensors",
    part: str = "model",
    replace: bool = False,
) -> int:
    """Write a checkpoint in another format, every byte verified on the way; whole or not at all.

    Args:
        checkpoint: a manifest's path, or a name as `BackupSystem.find` takes it; of either kind. Of a
            distributed one the shards are put together, for which all of it must fit into memory.
        target: a file, for `dcp` a folder; its parent must exist.
        form: `safetensors` holds tensors only, under their names joined by dots, and loads in the safetensors
            library and in Hugging Face's loaders. A tensor of several names, as tied weights are, is in it
            once, as `huggingface_hub.save_torch_model` does it; see `without_duplicates`. `torch` loads with
            `torch.load(weights_only=True)`; arrays become tensors in it. `dcp` loads with
            `torch.distributed.checkpoint`.
        part: which top entry of the state, or `all`.
        replace: put it in the place of a `target` of the same kind.

    Returns:
        Bytes written.

    Raises:
        CheckpointError: damaged, without that part, not expressible in that format, or `target` is there.
        OSError: the disk failed.
    """
    if form not in get_args(Format):
        raise CheckpointError(f"format {form!r}", f"one of {', '.join(get_args(Format))}")
    _check_target(target, form, replace)
    manifest = backup.store.read_manifest(backup.find(checkpoint))
    name = manifest.path.stem
    state = read_any_state(backup.store, manifest)
    if part != WHOLE:
        if not isinstance(state, Mapping) or part not in state:
            known = ", ".join(map(str, state)) if isinstance(state, Mapping) else "none"
            raise CheckpointError(f"{name} has no part {part!r}", f"{WHOLE} or one of: {known}")
        state = state[part]
    with _whole(target) as temporary:
        try:
            if form == "safetensors":
                tensors, left_out = without_duplicates(named_tensors(state, name))
                notes = dict(zip(_NOTES, ("pt", name, str(manifest.step)), strict=True))
                save_file(tensors, temporary, left_out | notes)
            elif form == "torch":
                _save_torch(_without_numpy(state), temporary)
            else:
                _save_dcp(_without_numpy(state if part == WHOLE else {part: state}), temporary)
        except (SafetensorError, KeyError, RuntimeError, pickle.PickleError) as error:
            raise CheckpointError(
                f"{name} cannot be written as {form}: {error}", "another --format"
            ) from error
    if target.is_dir():
        return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return target.stat().st_size


def import_file(
    backup: BackupSystem, source: Path, *, step: int = 0, epoch: int = 0, tag: str | None = None
) -> SavedCheckpoint:
    """Commit a safetensors or torch file as a new, tagged checkpoint.

    A mapping with an entry `model` becomes the state as it is, anything else its `model`. Names that
    `without_duplicates` or Hugging Face left out of a safetensors file are there again. A run cannot resume
    from it, since it has no position in any data; it loads by its name and by its tag.

    Args:
        tag: its tag, which keeps it; default: `imported-` and its id.

    Raises:
        CheckpointError: unreadable, or with objects in it that would have to be unpickled freely; the tag
            cannot be one, or is taken.
        OSError: the disk failed.
    """
    if not source.is_file():
        raise CheckpointError(f"no file {source}", "a .safetensors file, or one that torch.save wrote")
    content = _read_foreign(source)
    state = content if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping) else None
    if tag is not None:
        tags.check_free(backup.store, tag)
    saved = backup.save(
        {"model": content} if state is None else dict(state),
        step=step,
        epoch=epoch,
        reason=f"imported from {source.name}",
        attributes={"resumable": False, "imported_from": source.name},
    )
    backup.tag(saved.path, tag or f"imported-{saved.id}")
    return saved


def named_tensors(state: Any, name: str = "the state") -> dict[str, Tensor]:
    """All tensors of a nested state, by their keys and indices joined with dots.

    Args:
        name: what to call it in messages.

    Raises:
        CheckpointError: something in it is not a tensor, or two get the same name.
    """
    found: dict[str, Tensor] = {}
    for path, leaf in leaves(_without_numpy(state)):
        key = ".".join(path)
        if not isinstance(leaf, Tensor):
            raise CheckpointError(
                f"{key or 'the part'} of {name} is a {type(leaf).__name__}",
                "tensors only, for safetensors",
                "export with --format torch",
            )
        if key in found:
            raise CheckpointError(f"two tensors of {name} are called {key}", "distinct names")
        found[key] = leaf.contiguous()
    return found


def without_duplicates(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor under one name only, the first in alphabetical order: safetensors takes no shared memory.

    Only names of one and the same tensor fall together, never names of tensors that happen to be equal.

    Returns:
        The tensors, and for every name that was left out the one that stands for it. Both as
        `huggingface_hub.save_torch_model` has them in a file and its metadata: a model that ties these
        weights loads whole in `from_pretrained`, `huggingface_hub.load_torch_model` and
        `safetensors.torch.load_model`.
    """
    names: dict[int, str] = {}
    left_out: dict[str, str] = {}
    for name in sorted(tensors):
        first = names.setdefault(id(tensors[name]), name)
        if first != name:
            left_out[name] = first
    return {name: tensor for name, tensor in tensors.items() if name not in left_out}, left_out


def leaves(state: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Everything in a nested state that is no dict, list or tuple, with the keys and indices to it."""
    if isinstance(state, Mapping):
        for key, item in state.items():
            yield from leaves(item, (*path, str(key)))
    elif isinstance(state, list | tuple):
        for index, item in enumerate(state):
            yield from leaves(item, (*path, str(index)))
    else:
        yield path, state


def _check_target(target: Path, form: Format, replace: bool) -> None:
    if not target.parent.is_dir():
        raise CheckpointError(f"no folder {target.parent}", "an existing folder to write into")
    if not target.exists():
        return
    if not replace:
        raise CheckpointError(f"{target} is there already", "a new name", "choose another, or --force")
    # Never a folder that somebody has other things in.
    same_kind = (target / ".metadata").is_file() if form == "dcp" else target.is_file()
    if not same_kind:
        raise CheckpointError(f"{target} is not a {form} export", "one, to be replaced", "choose a new name")


def _read_foreign(source: Path) -> Any:
    if source.suffix == ".safetensors":
        try:
            tensors = load_file(source)
            with safe_open(source, "pt") as file:
                notes = file.metadata() or {}
            return tensors | {
                name: tensors[kept]
                for name, kept in notes.items()
                if name not in tensors and kept in tensors and name not in _NOTES
            }
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {source}: {error}", "a whole safetensors file") from error
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"cannot read {source}: {first_line(error)}",
            "a .safetensors file, or one that torch.load(weights_only=True) takes",
            "where it was made, save the state dict only, or as safetensors",
        ) from error


def _without_numpy(value: Any) -> Any:
    """The same state with tensors for arrays and Python's numbers for NumPy's."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _without_numpy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_numpy(item) for item in value)
    return value


def _save_torch(state: Any, path: Path) -> None:
    torch.save(state, path)
    torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # or it is not what was promised


def _save_dcp(state: Any, path: Path) -> None:
    with warnings.catch_warnings():  # that there is no process group is meant: this one has the whole state
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        save_distributed(state, storage_writer=FileSystemWriter(path), no_dist=True)


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, which becomes `target`, durably, if nothing goes wrong."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        for path in [temporary] if temporary.is_file() else temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if temporary.is_dir():
            fsync_folder(temporary)
        if target.is_dir():
            aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
            os.rename(target, aside)
            os.rename(temporary, target)
            shutil.rmtree(aside)
        else:
            os.rename(temporary, target)
        fsync_folder(target.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
