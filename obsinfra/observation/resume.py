"""Deciding what `--resume` means: which run folder goes on, from which checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obsinfra.backup.heir import wait_for_heir
from obsinfra.backup.remote_url import check_url, is_url
from obsinfra.backup.transfer import fetch
from obsinfra.config.settings import Settings
from obsinfra.errors import CheckpointError, ConfigError, ObsinfraError, RunBusyError
from obsinfra.observation.ranks import Ranks
from obsinfra.run.folder import LIVE_STATES, RunFolder, check_run_id, find_run, new_run_id, scan_runs

HEIR_SECONDS = 60.0
"""How long a resume waits for the writer of a trainer that died to commit its last snapshot."""


@dataclass(frozen=True, slots=True)
class ResumePlan:
    """Where a run lives and what it starts from.

    Attributes:
        folder: the run's folder; it need not exist yet.
        store: checkpoint folder to load from; None starts from scratch.
        checkpoint: a named checkpoint in it; None takes the newest sound one.
        continues: the folder's own run goes on (same id, counters and history).
        parent: checkpoint or run a new run is branched from.
        note: one line for the user, saying what was decided.
    """

    folder: RunFolder
    store: Path | None = None
    checkpoint: Path | None = None
    continues: bool = False
    parent: str | None = None
    note: str = ""


def plan_run(settings: Settings, model: str) -> ResumePlan:
    """Resolve `settings.run` and `settings.resume` against what is on disk.

    Raises:
        ConfigError: the run name is malformed, taken, or unknown.
        CheckpointError: there is nothing to resume from.
        RunBusyError: the run to resume is still running.
        RemoteError: `settings.checkpoint_remote` can be none.
    """
    check_remote(settings)
    resume = settings.resume
    if settings.run is not None:
        check_run_id(settings.run)
    if resume is None:
        return _new(settings, model)
    if resume == "auto":
        return _automatic(settings, model)
    if is_url(resume):
        return _fetched(resume, _new(settings, model).folder)
    path = Path(resume).expanduser()
    if "/" not in resume and not path.exists():
        return _continue(find_run(settings.output_dir, resume))
    if not path.exists():
        raise CheckpointError(
            f"nothing at {path}",
            "a run name, a run folder, a checkpoint folder or a checkpoint manifest",
            "list runs with 'obsinfra runs'",
        )
    if (path / "run.json").exists():
        return _continue(RunFolder(path))
    fresh = _new(settings, model)
    if path.is_dir():
        return ResumePlan(fresh.folder, store=path, parent=str(path), note=f"a new run from {path}")
    return ResumePlan(
        fresh.folder,
        store=path.parent.parent,
        checkpoint=path,
        parent=str(path),
        note=f"a new run from checkpoint {path.name}",
    )


def plan_for_all(ranks: Ranks, decide: Callable[[], ResumePlan]) -> ResumePlan:
    """What rank 0 decides, for every rank.

    Raises:
        ObsinfraError: whatever `decide` raises on rank 0, on every rank.
    """

    def document() -> dict[str, Any]:
        plan = decide()
        return {
            "folder": str(plan.folder.root.absolute()),
            "store": str(plan.store.absolute()) if plan.store else None,
            "checkpoint": str(plan.checkpoint.absolute()) if plan.checkpoint else None,
            "continues": plan.continues,
            "parent": plan.parent,
            "note": plan.note,
        }

    if ranks.alone:
        return decide()
    found = ranks.share("plan", document)
    return ResumePlan(
        RunFolder(Path(found["folder"])),
        store=Path(found["store"]) if found["store"] else None,
        checkpoint=Path(found["checkpoint"]) if found["checkpoint"] else None,
        continues=found["continues"],
        parent=found["parent"],
        note=found["note"],
    )


def check_remote(settings: Settings) -> None:
    """Whether checkpoints can be mirrored as the settings ask; the remote itself is not asked.

    Raises:
        RemoteError: `settings.checkpoint_remote` can be none.
    """
    if settings.checkpoint_remote is not None and not settings.disable_backups:
        check_url(settings.checkpoint_remote)


def _fetched(url: str, folder: RunFolder) -> ResumePlan:
    """A new run from a remote's newest sound checkpoint, brought into the run's own store first."""
    made = not folder.root.exists()
    try:
        checkpoint = fetch(url, folder.checkpoints, run=folder.id)
    except (ObsinfraError, OSError) as error:
        if made:
            shutil.rmtree(folder.root, ignore_errors=True)
        if isinstance(error, ObsinfraError):
            raise
        raise CheckpointError(
            f"cannot bring {url} to {folder.checkpoints}: {error}", "a writable folder with free space"
        ) from error
    return ResumePlan(
        folder,
        store=folder.checkpoints,
        checkpoint=checkpoint,
        parent=url,
        note=f"a new run from checkpoint {checkpoint.name} of {url}",
    )


def _automatic(settings: Settings, model: str) -> ResumePlan:
    """The named run whatever became of it, or the newest of the model that did not come to its end."""
    folder = _newest_resumable(settings, model)
    if folder is not None:
        return _continue(folder)
    named = RunFolder(settings.output_dir / settings.run) if settings.run is not None else None
    if named is not None and named.run_json.exists():
        info = named.read_info()
        if info.model == model and named.present_state(info) not in LIVE_STATES:
            # It ended before its first checkpoint; a scheduler that starts it again means this very run.
            return ResumePlan(named, note=f"run {named.id} has no checkpoint: it starts from the beginning")
    fresh = _new(settings, model)
    note = f"nothing to resume for {model} in {settings.output_dir}: a new run"
    return ResumePlan(fresh.folder, note=note)


def _new(settings: Settings, model: str) -> ResumePlan:
    run_id = settings.run or new_run_id(model)
    folder = RunFolder(settings.output_dir / run_id)
    if folder.run_json.exists():
        info = folder.read_info()
        if folder.present_state(info) in LIVE_STATES:
            raise _busy(folder)
        raise ConfigError(
            f"run {run_id!r} exists already in {settings.output_dir} (state {folder.present_state(info)})",
            "a new name",
            f"go on with it by --resume {run_id}, or choose another --run",
        )
    return ResumePlan(folder)


def _continue(folder: RunFolder) -> ResumePlan:
    info = folder.read_info()
    if folder.present_state(info) in LIVE_STATES:
        raise _busy(folder)
    if not wait_for_heir(folder.checkpoints, HEIR_SECONDS):
        raise RunBusyError(
            f"the last checkpoint of run {folder.id} is still being written after {HEIR_SECONDS:.0f} s",
            "a run whose writer has ended",
            "wait for the process 'obsinfra.backup.writer' of that run, or look at its logs/writer.jsonl",
        )
    if not has_checkpoints(folder.checkpoints):
        raise CheckpointError(
            f"run {folder.id} has no checkpoint to resume from",
            "a run that committed at least one",
            "start a new run (without --resume)",
        )
    return ResumePlan(folder, store=folder.checkpoints, continues=True, note=f"resuming run {folder.id}")


def _busy(folder: RunFolder) -> RunBusyError:
    pids = ", ".join(str(int(process["pid"])) for process in folder.read_info().processes.values())
    return RunBusyError(
        f"run {folder.id} is in use by process {pids}",
        "one trainer per run folder",
        f"stop it with 'obsinfra command {folder.id} stop', or choose another --run",
    )


def _newest_resumable(settings: Settings, model: str) -> RunFolder | None:
    candidates = []
    for folder in scan_runs(settings.output_dir):
        if settings.run is not None and folder.id != settings.run:
            continue
        try:
            info = folder.read_info()
        except ConfigError:
            continue
        live = folder.present_state(info) in LIVE_STATES
        over = info.state == "finished" and settings.run is None
        if info.model == model and not live and not over and has_checkpoints(folder.checkpoints):
            candidates.append((info.started, folder))
    return max(candidates, key=lambda found: found[0])[1] if candidates else None


def has_checkpoints(store: Path) -> bool:
    """Whether any manifest lies in the store; says nothing of its soundness."""
    manifests = store / "manifests"
    return manifests.is_dir() and any(manifests.glob("*.json"))
