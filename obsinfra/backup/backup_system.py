"""The backup system: save, choose, restore, verify and prune checkpoints of one folder.

Useful alone in any PyTorch loop, and what the observation floor saves through. Knows nothing of monitoring.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from obsinfra.backup import tags
from obsinfra.backup.compression import Compression
from obsinfra.backup.file_layer import FileLayer
from obsinfra.backup.manifest import Head, Manifest
from obsinfra.backup.retention import Retention, prune, with_room
from obsinfra.backup.rng import capture_rng_state, restore_rng_state
from obsinfra.backup.state_tree import encode
from obsinfra.backup.store import CheckpointStore
from obsinfra.backup.tensors import code_versions, raw_tensor, read_state
from obsinfra.errors import CheckpointError
from obsinfra.monitoring.logging_config import get_logger

Kind = Literal["regular", "emergency", "best", "final"]


class Stateful(Protocol):
    """Anything with a state: a scheduler, a scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """What a save did. `bytes_written` counts only chunks that were new to the store, as they lie on disk."""

    path: Path
    id: str
    kind: str
    step: int
    epoch: int
    bytes_total: int
    bytes_written: int
    duration_seconds: float


@dataclass(frozen=True, slots=True)
class Verification:
    """One checkpoint looked at in full; `problem` is None when it is sound."""

    path: Path
    problem: str | None


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A restored state and what was passed over to get it.

    Attributes:
        state: nested state with CPU tensors.
        info: its manifest.
        skipped: newer checkpoints that are damaged, and why; newest first.
    """

    state: Any
    info: Manifest
    skipped: tuple[Verification, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What `restore_from_checkpoint` found besides model and optimizer."""

    epoch: int
    step: int
    loss: float | None
    extra: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    kind: str = "regular"


def create_backup_system(
    directory: Path | str,
    *,
    keep_last: int = 3,
    keep_best: int = 1,
    keep_emergency: int | None = None,
    keep_every: int | None = None,
    best_metric: str | None = None,
    best_mode: Literal["min", "max"] = "min",
    run: str = "",
    files: FileLayer | None = None,
    compression: Compression = "off",
) -> BackupSystem:
    """A backup system over `directory`, which is created at the first save.

    Args:
        keep_last, keep_best, keep_emergency, keep_every, best_metric, best_mode: what `prune` keeps, as in
            `Retention`: emergencies stay until somebody confirms them, unless the disk is full.
        run: run id written into manifests.
        files: how writes reach the disk; for fault injection.
        compression: `auto` compresses, with zstd, tensors of which a sample shrinks by at least a quarter:
            zeros, indices, masks; not the noise in weights. Either kind of checkpoint can be read, and shares
            its chunks with the other. Whether there is space is still judged by the uncompressed size.

    Raises:
        ValueError: a count is less than one, or the mode or the compression unknown.
    """
    policy = Retention(keep_last, keep_every, keep_best, best_metric, best_mode, keep_emergency)
    return BackupSystem(CheckpointStore(Path(directory), files, compression=compression), policy, run)


class BackupSystem:
    """One folder of checkpoints; made by `create_backup_system`. Safe to call from several threads."""

    def __init__(self, store: CheckpointStore, policy: Retention, run: str) -> None:
        self.store = store
        self.policy = policy
        self._run = run
        self._last_saved: Path | None = None
        self._log = get_logger("system")

    # ---- any nested state --------------------------------------------------------------------------

    def save(
        self,
        state: Mapping[str, Any],
        *,
        step: int,
        epoch: int,
        kind: Kind = "regular",
        metrics: Mapping[str, float] | None = None,
        reason: str | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> SavedCheckpoint:
        """Commit `state` durably. One save at a time, in this process and among processes.

        Where space is short, what the policy does not keep is pruned first.

        Raises:
            CheckpointError: too little space even then, or something in the state cannot be stored (named).
            OSError: the disk failed; the store is as it was.
        """
        started = time.perf_counter()
        document, tensors = encode(state)
        head = Head(
            run=self._run,
            kind=kind,
            step=step,
            epoch=epoch,
            metrics=metrics or {},
            reason=reason,
            attributes={"resumable": True, **(attributes or {})},
            versions=code_versions(),
        )
        raw = [raw_tensor(tensor) for tensor in tensors]
        with self.store.writing():
            manifest, written = with_room(
                self.store,
                self.policy,
                sum(len(tensor.data) for tensor in raw),
                lambda: self.store.commit(head, document, raw),
                self._last_saved,
            )
            self._last_saved = manifest.path
        return SavedCheckpoint(
            manifest.path,
            manifest.id,
            kind,
            step,
            epoch,
            manifest.bytes_total,
            written,
            time.perf_counter() - started,
        )

    def load(self, checkpoint: Path | str | None = None) -> LoadedCheckpoint:
        """Read a checkpoint, every byte verified.

        Args:
            checkpoint: a manifest's path, or a name as `find` takes it; None takes the newest sound resumable
                one and reports the damaged newer ones in `skipped`.

        Raises:
            CheckpointError: the named one is damaged, or there is no sound one.
        """
        if checkpoint is not None:
            manifest = self.store.read_manifest(self.find(checkpoint))
            return LoadedCheckpoint(read_state(self.store, manifest), manifest)
        loaded, damaged = self.load_newest(lambda manifest: manifest.resumable)
        if loaded is None:
            raise CheckpointError(
                f"no sound checkpoint in {self.store.root}{damaged}",
                "at least one",
                "start a new run, or copy a sound checkpoint there",
            )
        return loaded

    def load_newest(self, wanted: Callable[[Manifest], bool]) -> tuple[LoadedCheckpoint | None, str]:
        """The newest sound one that is `wanted`, read and verified; damaged ones are passed over.

        Returns:
            It, or None; and for a message about None how many were damaged, and how the first.
        """
        seen: set[Path] = set()
        problems: dict[Path, str] = {}
        # A writer may prune what was listed while it is being read; what it saved instead is there then.
        while fresh := [path for path in self.store.manifest_paths() if path not in seen]:
            seen.update(fresh)
            candidates = tags.readable(self.store, fresh, problems)
            for manifest in reversed(candidates):
                if not wanted(manifest):
                    continue
                try:
                    state = read_state(self.store, manifest)
                except CheckpointError as error:
                    problems[manifest.path] = str(error)
                    continue
                return LoadedCheckpoint(state, manifest, self._skipped(problems, manifest.step)), ""
        damaged = [problem for path, problem in problems.items() if path.exists()]
        return None, f" ({len(damaged)} damaged: {damaged[0]})" if damaged else ""

    def _skipped(self, problems: Mapping[Path, str], step: int) -> tuple[Verification, ...]:
        """Of the damaged ones, newest first, those still there and not older than `step` by their names."""
        skipped = []
        for path, problem in sorted(problems.items(), reverse=True):
            if path.name >= f"{step:012d}" and path.exists():
                self._log.warning("damaged_checkpoint_skipped", path=str(path), problem=problem)
                skipped.append(Verification(path, problem))
        return tuple(skipped)

    def list(self) -> list[Manifest]:
        """Readable checkpoints, oldest first; chunks are not looked at."""
        return tags.readable(self.store)

    def find(self, checkpoint: Path | str) -> Path:
        """The manifest of a path, an id, a full name, a tag or `latest`.

        Raises:
            CheckpointError: a name that is none of these.
        """
        if isinstance(checkpoint, Path) or "/" in checkpoint:
            return Path(checkpoint)
        return tags.find(self.store, checkpoint)

    def newest(self) -> Manifest | None:
        """The newest readable checkpoint; chunks are not looked at."""
        found = self.list()
        return found[-1] if found else None

    def verify(self, checkpoint: Path | str | None = None) -> Sequence[Verification]:
        """Read every chunk of one checkpoint or of all, oldest first."""
        paths = [self.find(checkpoint)] if checkpoint is not None else self.store.manifest_paths()
        results = []
        for path in paths:
            try:
                self.store.verify(self.store.read_manifest(path))
                results.append(Verification(path, None))
            except CheckpointError as error:
                if checkpoint is not None or path.exists():  # else pruned meanwhile
                    results.append(Verification(path, str(error)))
        return results

    def prune(self, just_saved: Path | None = None) -> Sequence[Path]:
        """Remove what the retention does not keep, then chunks nobody needs; see `retention.prune`.

        Args:
            just_saved: a checkpoint that this process has committed, but not by `save`.

        Returns:
            Manifests removed.

        Raises:
            OSError: the disk failed.
        """
        return prune(self.store, self.policy, just_saved or self._last_saved)

    def tag(self, checkpoint: Path | str, name: str, *, move: bool = False) -> None:
        """Give a checkpoint a name, by which it is found and kept; see `tags.tag`.

        Raises:
            CheckpointError: the name cannot be one, or is taken; there is no such checkpoint.
        """
        tags.tag(self.store, self.find(checkpoint), name, move=move)

    def untag(self, name: str) -> None:
        """Take a name away; the checkpoint stays until `prune`.

        Raises:
            CheckpointError: there is no such tag.
        """
        tags.untag(self.store, name)

    def confirm(self, checkpoint: Path | str) -> None:
        """Say that an emergency checkpoint was looked at: from now on it is kept as a regular one is.

        Raises:
            CheckpointError: there is no such checkpoint, or it is not an emergency one.
        """
        tags.confirm(self.store, self.find(checkpoint))

    # ---- a plain loop's face -----------------------------------------------------------------------

    def create_checkpoint(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        epoch: int = 0,
        step: int = 0,
        loss: float | None = None,
        *,
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
        kind: Kind = "regular",
        reason: str | None = None,
        **extra: Any,
    ) -> Path:
        """Save model, optimizer, scheduler, scaler, random states and `extra`; returns the manifest's path.

        Raises:
            CheckpointError, OSError: as `save`.
        """
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items() if part is not None}
        state |= {"rng": capture_rng_state(), "loss": loss, "extra": extra}
        metrics = {} if loss is None or loss != loss or abs(loss) == float("inf") else {"loss": float(loss)}
        return self.save(state, step=step, epoch=epoch, kind=kind, metrics=metrics, reason=reason).path

    def emergency_backup(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        epoch: int = 0,
        step: int = 0,
        loss: float | None = None,
        *,
        reason: str = "emergency",
        **state: Any,
    ) -> Path:
        """`create_checkpoint` of kind emergency: kept apart from the regular ones by `prune`."""
        return self.create_checkpoint(
            model, optimizer, epoch, step, loss, kind="emergency", reason=reason, **state
        )

    def restore_from_checkpoint(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        checkpoint: Path | str | None = None,
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
    ) -> TrainingState:
        """Put a checkpoint back: the named one, or the newest sound one.

        Raises:
            CheckpointError: none is sound, or it does not fit; the model is untouched then.
        """
        loaded = self.load(checkpoint)
        state, name = loaded.state, loaded.info.path.name
        given = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        parts = {part_name: part for part_name, part in given.items() if part is not None}
        if missing := [part_name for part_name in ("model", "rng", *parts) if part_name not in state]:
            raise CheckpointError(f"{name} has no {', '.join(missing)}", "one saved with it")
        check_fit(model, state["model"], name)
        for part_name, part in parts.items():
            try:
                load_part(part, state[part_name])
            except (ValueError, KeyError, RuntimeError) as error:
                raise CheckpointError(
                    f"the {part_name} does not fit checkpoint {name}: {error}",
                    f"the {part_name} it was made with",
                ) from error
        load_model(model, state["model"], name)
        restore_rng_state(state["rng"])
        return TrainingState(
            loaded.info.epoch,
            loaded.info.step,
            state.get("loss"),
            state.get("extra", {}),
            loaded.info.path,
            loaded.info.kind,
        )


def load_model(model: nn.Module, state: Mapping[str, Any], checkpoint: str) -> None:
    """Load a model's state strictly.

    Raises:
        CheckpointError: as `check_fit`; the model is as it was.
    """
    check_fit(model, state, checkpoint)
    model.load_state_dict(state)


def load_part(part: Stateful, state: Any) -> None:
    """Load the state of an optimizer, a scheduler or a scaler.

    Raises:
        ValueError: it is that of an optimizer of another class, which torch takes and stumbles over in the
            next step; the optimizer is as it was.
        KeyError, RuntimeError: it does not fit in another way.
    """
    before = part.state_dict() if isinstance(part, torch.optim.Optimizer) else {}
    part.load_state_dict(state)
    if isinstance(part, torch.optim.Optimizer):
        known = set.intersection(*(set(group) for group in part.param_groups))
        if missing := part.defaults.keys() - known:
            part.load_state_dict(before)
            raise ValueError(f"its parameter groups have no {', '.join(sorted(missing))}")


def check_fit(model: nn.Module, state: Mapping[str, Any], checkpoint: str) -> None:
    """Whether a model's state can be loaded strictly.

    Raises:
        CheckpointError: names or shapes differ; it names the parameters.
    """
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own.keys() - state.keys()]
    problems += [f"{name} is unknown" for name in state.keys() - own.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if isinstance(own[name], torch.Tensor) and state[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"checkpoint {checkpoint} does not fit the model: {'; '.join(sorted(problems)[:5])}{more}",
            "the model it was made with",
            "use the same --model-name and --model-size, or start a new run",
        )
