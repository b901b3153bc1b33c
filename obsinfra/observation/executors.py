"""What each built-in action does; the rows are in `catalog.actions`, and `Actions` calls these.

Those done between two steps may use the run's state; `dump_stacks`, `memory_snapshot`, `measure_utilization`,
`set_log_level` and `set_threshold` run on threads of their own and must not.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obsinfra.backup.backup_system import LoadedCheckpoint, create_backup_system
from obsinfra.catalog import actions as catalog
from obsinfra.catalog.metrics import MFU_RATIO
from obsinfra.errors import CheckpointError, CommandError
from obsinfra.observation import rollback
from obsinfra.observation.actions import NOT_COMMITTED, Executor, Order, Steps, where
from obsinfra.observation.flight_record import dump_collectives
from obsinfra.observation.keeper import Committed, Kind, Request, Saving
from obsinfra.observation.memory_report import live_tensors, memory_report
from obsinfra.observation.profiling import ProfileFiles, profile_steps
from obsinfra.observation.stacks import dump_stacks
from obsinfra.optimization.bottleneck import monitor_gpu_utilization
from obsinfra.optimization.reclaim import free_memory
from obsinfra.run.files import write_json_atomic

if TYPE_CHECKING:
    from obsinfra.observation.observed_run import ObservedRun

Result = Mapping[str, Any]

LONGEST_VISIT_SECONDS = 30.0
"""How long a memory report waits for the loop to come round, so that it may look at gradients too."""


def _checkpoint(run: ObservedRun, order: Order) -> Result | Saving:
    return _save(run, "regular", order)


def _emergency_checkpoint(run: ObservedRun, order: Order) -> Result | Saving:
    return _save(run, "emergency", order)


def _save(run: ObservedRun, kind: Kind, order: Order) -> Result | Saving:
    saving = run.keeper.begin(kind, order.request, run.position.epoch)
    if saving is None and run.keeper.backup is not None:
        raise CommandError(NOT_COMMITTED)
    return saving if saving is not None else where(None)


def _stop(run: ObservedRun, order: Order) -> Result:
    run.card.show_state("stopping", order.reason)
    committed = run.keeper.commit("emergency", order.request, run.position.epoch)
    run.end(f"command stop ({order.reason})")
    if committed is None and run.keeper.backup is not None:
        raise CommandError(NOT_COMMITTED)
    return where(committed)


def _pause(run: ObservedRun, order: Order) -> Result:
    again = run.actions.pause is not None
    seconds = order.arguments["max_seconds"]
    run.actions.hold("alert" if order.arguments["alert"] else "person", order.reason, seconds)
    return {"paused": True, "was_paused": again, "max_seconds": seconds}


def _resume(run: ObservedRun, order: Order) -> Result:
    was_paused = run.actions.pause is not None
    seconds = run.actions.end_pause(order.reason, "alert" if order.arguments["alert"] else None)
    paused = None if seconds is None else round(seconds, 3)
    still = run.actions.pause is not None
    return {"paused": still, "was_paused": was_paused, "paused_seconds": paused}


def _profile(run: ObservedRun, order: Order) -> Steps:
    first, stamp = run.step, time.strftime("%Y%m%d-%H%M%S")
    stem = run.folder.profiles / f"step{first:09d}-{stamp}{_of_rank(run)}"
    files = ProfileFiles(
        stem.with_suffix(".trace.json"), stem.with_suffix(".summary.json"), stem.with_suffix(".summary.txt")
    )
    settings = {name: value for name, value in order.arguments.items() if name != "alert"}
    top = yield from profile_steps(files, **settings)
    return {
        "trace": str(files.trace),
        "summary": str(files.summary_text),
        "summary_json": str(files.summary_json),
        "steps": order.arguments["steps"],
        "first_step": first + order.arguments["warmup"],
        "top": [operator["name"] for operator in top[:3]],
    }


def _dump_stacks(run: ObservedRun, order: Order) -> Result:
    dump = dump_stacks(run.folder.logs, native=order.arguments["native"])
    record = dump_collectives(run.folder.logs, run.ranks.rank)
    return {
        "stacks": str(dump.path),
        **({"collectives": str(record.path), "last_collective": record.last} if record else {}),
        "threads": dump.threads,
        "native": dump.native,
        "loop_in": run.monitor.recorder.in_step_phase(),
    }


def _measure_utilization(run: ObservedRun, order: Order) -> Result:
    report = monitor_gpu_utilization(
        order.arguments["seconds"],
        run.monitor.recorder,
        mfu=lambda: run.monitor.present_value(MFU_RATIO),
        stop=run.actions.closing,
    )
    report.export(run.monitor.instruments)
    return report.document()


def _memory_snapshot(run: ObservedRun, order: Order) -> Result:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = _fresh(run.folder.reports / f"memory-step{run.step:09d}-{stamp}{_of_rank(run)}.json")
    run.folder.reports.mkdir(mode=0o700, exist_ok=True)
    top = order.arguments["top"]

    def tensors() -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        patience = min(LONGEST_VISIT_SECONDS, max(2.0, 3 * run.monitor.recorder.median_step_seconds()))
        if not run.actions.visit(
            lambda: found.update(live_tensors(run.model, top, between_steps=True)), patience
        ):
            found.update(live_tensors(run.model, top, between_steps=False))
        return found

    report = memory_report(
        tensors=tensors,
        top=top,
        trace_seconds=order.arguments["trace_seconds"],
        pause=run.actions.closing.wait,
        device_file=path.with_suffix(".cuda.pickle"),
    )
    head = {
        "run": run.folder.id,
        "step": run.step,
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    write_json_atomic(path, {**head, **report}, mode=0o644)
    return {
        "report": str(path),
        "cuda_snapshot": report.get("cuda_snapshot"),
        "resident_bytes": report["process"]["resident_bytes"],
        "tensor_bytes": report["tensors"]["total_bytes"],
        "tensors": report["tensors"]["count"],
        "between_steps": report["tensors"]["between_steps"],
    }


def _free_memory(run: ObservedRun, order: Order) -> Result:
    return free_memory()


def _scale_lr(run: ObservedRun, order: Order) -> Result:
    factor, undo = order.arguments["factor"], order.arguments["undo"]
    if (factor is None) != undo:
        raise CommandError("expected either factor=… or undo=true")
    scale = run.learning_rate
    before, total_before = scale.rates(), scale.total
    scale.set(1.0 if undo else scale.total * factor)
    facts = {
        "before": before,
        "after": scale.rates(),
        "scale_before": total_before,
        "scale": scale.total,
        "lasts": scale.lasts,
    }
    run.log.logger("training").warning("learning_rate_scaled", at_step=run.step, reason=order.reason, **facts)
    return facts


def _rollback(run: ObservedRun, order: Order) -> Result:
    from_step, arguments = run.step, order.arguments
    loaded: LoadedCheckpoint | None = None

    def choose() -> str:
        nonlocal loaded
        if run.keeper.backup is None:
            raise CommandError("backups are disabled in this run; expected checkpoints to go back to")
        run.keeper.settle()  # nothing is on its way to the store, so what is there is all there is
        loaded = _target(run, order)
        return str(loaded.info.path)

    chosen = Path(run.ranks.share("rollback", choose))
    # On every rank: of a state in shards each has a part.
    undo = run.keeper.commit("emergency", Request.now(f"before a rollback: {order.reason}"), run.epoch)
    undone = run.ranks.share("undo", lambda: str(undo.path) if undo is not None else None)
    if loaded is None:  # rank 0 has it
        loaded = create_backup_system(chosen.parent.parent).load(chosen)
    backup = run.keeper.backup
    to_step = loaded.info.step
    positions = run.data_ahead() if arguments["skip"] else None
    try:
        run.go_back(loaded, positions, arguments["skip_more"])
    except Exception:  # whatever it was, it is raised again, and the command fails with it
        if undone is not None:  # a state half put back is worse than none
            store = backup or create_backup_system(Path(undone).parent.parent)
            run.go_back(store.load(Path(undone)), None, 0)
        raise
    facts: dict[str, Any] = {
        "checkpoint": str(loaded.info.path),
        "from_step": from_step,
        "to_step": to_step,
        "epoch": run.epoch,
        "skipped_steps": (max(0, from_step - to_step) if arguments["skip"] else 0) + arguments["skip_more"],
        "passed_over": [f"{found.path.stem}: {found.problem}" for found in loaded.skipped],
        "undo": f"rollback checkpoint={undo.path.stem}" if undo is not None else None,
    }
    saved: Committed | None = None
    if facts["skipped_steps"]:
        saved = run.keeper.commit("regular", Request.now(order.reason), run.epoch)
    if backup is None:  # one store for all ranks, and rank 0 keeps it
        run.log.logger("training").warning("rolled_back", at_step=to_step, reason=order.reason, **facts)
        return facts
    problems = []
    if facts["skipped_steps"] and saved is None:
        problems.append("the new position in the data could not be saved; a restart would repeat the data")
    entry = rollback.Rollback(
        from_step,
        to_step,
        loaded.info.id,
        bool(facts["skipped_steps"]),
        rollback.beyond(backup, to_step),
        _now(),
        order.reason,
    )
    try:
        rollback.note_rollback(run.folder.root, entry)
        facts["removed"] = len(rollback.remove_abandoned(backup, entry)) if undo is not None else 0
    except (OSError, CheckpointError) as error:
        problems.append(
            f"not noted in the run folder ({error}); a restart would go on from before the rollback"
        )
    facts["problems"] = problems
    run.log.logger("training").warning("rolled_back", at_step=to_step, reason=order.reason, **facts)
    return facts


def _target(run: ObservedRun, order: Order) -> LoadedCheckpoint:
    """The checkpoint to go back to, read and verified."""
    backup = run.keeper.backup
    assert backup is not None
    if order.arguments["checkpoint"] is not None:
        name = order.arguments["checkpoint"]
        path = backup.find(name)
        if path.parent.resolve() != backup.store.manifests.resolve():
            raise CheckpointError(f"checkpoint {name!r} is of another run", "one of this run's own")
        return backup.load(path)
    before = order.arguments["before_step"]
    limit = run.step if before is None else min(before, run.step)
    left = rollback.left_behind(run.folder.root)
    # When nobody says where the trouble began, an emergency checkpoint may well hold it.
    kinds = ("regular", "final") if before is None else ("regular", "final", "emergency")
    return rollback.load_last(
        backup,
        lambda found: found.step <= limit and found.kind in kinds and found.id not in left,
    )


def _set_log_level(run: ObservedRun, order: Order) -> Result:
    before = run.log.set_level(order.arguments["level"])
    if before is None:
        raise CommandError(
            "this run's host program configures logging; expected one that obsinfra configured"
        )
    return {"level": order.arguments["level"], "before": before}


def _set_threshold(run: ObservedRun, order: Order) -> Result:
    key = order.arguments["key"]
    before, after = run.monitor.set_threshold(key, order.arguments["value"])
    note = None
    if run.alerts_act() == "sidecar":
        note = "a sidecar watches this run: Prometheus goes on judging by its own rules"
    return {"key": key, "before": before, "after": after, "note": note}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _of_rank(run: ObservedRun) -> str:
    """What tells a file of one rank from that of another."""
    return "" if run.ranks.first else f"-rank{run.ranks.rank}"


def _fresh(path: Path) -> Path:
    """`path`, or the same with a number where it is taken."""
    found, number = path, 2
    with contextlib.suppress(OSError):
        while found.exists():
            found, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return found


EXECUTORS: dict[str, Executor] = {
    catalog.CHECKPOINT.name: _checkpoint,
    catalog.EMERGENCY_CHECKPOINT.name: _emergency_checkpoint,
    catalog.STOP.name: _stop,
    catalog.PAUSE.name: _pause,
    catalog.RESUME.name: _resume,
    catalog.PROFILE.name: _profile,
    catalog.DUMP_STACKS.name: _dump_stacks,
    catalog.MEMORY_SNAPSHOT.name: _memory_snapshot,
    catalog.MEASURE_UTILIZATION.name: _measure_utilization,
    catalog.FREE_MEMORY.name: _free_memory,
    catalog.SCALE_LR.name: _scale_lr,
    catalog.ROLLBACK.name: _rollback,
    catalog.SET_LOG_LEVEL.name: _set_log_level,
    catalog.SET_THRESHOLD.name: _set_threshold,
}
