"""Everything a report tells of one run, gathered from the run's folder and the sidecar's journal."""

from __future__ import annotations

import itertools
import json
import re
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from obsinfra.control.history import Event, events_of
from obsinfra.control.journal import Journal
from obsinfra.monitoring.performance_history import read_history
from obsinfra.monitoring.slow_steps import SlowStep, slow_steps
from obsinfra.run.folder import RunFolder, RunInfo

MAX_MANIFEST_BYTES = 64 << 20

SAME_SECONDS = 60.0
"""Two firings of an alert, of the trainer and of Prometheus, are one where no more lies between them."""

"""A manifest larger than this is listed by its name alone."""

CURVES = ("loss", "grad_norm", "learning_rate", "samples_per_second", "step_time_seconds")
MACHINE = ("cpu_ratio", "memory_ratio", "gpu_ratio", "gpu_memory_ratio")


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity over the steps of a run; a step that was done again after a restart is there
    once, as done last.

    Attributes:
        steps: rising.
        values: one per step.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def last(self) -> float | None:
        """The newest value."""
        return self.values[-1] if self.values else None


@dataclass(frozen=True, slots=True)
class Session:
    """One process of the run.

    Attributes:
        began, ended: epoch seconds, the end as of its last record.
        facts: what it was and ran on, as `TrainingMonitor` noted at its start.
        summary: where its time went, as it noted last; empty when it ended before the first.
    """

    began: float
    ended: float
    facts: Mapping[str, Any]
    summary: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert that fired. Times are epoch seconds; `until` is None where its end was not seen.

    Attributes:
        alert: its name in the table.
        name: the same with the labels it fired for, where the trainer told them.
        judged_by: `trainer`, `Prometheus`, or both.
    """

    at: float
    until: float | None
    alert: str
    name: str
    severity: str
    value: float | None
    threshold: float | None
    unit: str
    step: int | None
    judged_by: str
    summary: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint. `created_at` is epoch seconds, `bytes_total` None if its manifest is bad."""

    step: int
    kind: str
    created_at: float
    bytes_total: int | None
    reason: str
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Account:
    """Where the time of all sessions went, in seconds.

    Attributes:
        wall: from the start of the first to the end of the last.
        phases: by phase, `catalog.metrics.PHASES`.
        lost: by cause, `catalog.metrics.LOST_CAUSES`, and `between_processes`.
        goodput: productive ÷ wall, 0 to 1; None when nothing was noted.
    """

    wall: float
    phases: Mapping[str, float]
    lost: Mapping[str, float]
    goodput: float | None


@dataclass(frozen=True, slots=True)
class RunStory:
    """One run, as a report tells it.

    Attributes:
        now: when it was gathered, epoch seconds.
        config: the settings, as in its config.toml, secrets in addresses hidden.
        curves: of rank 0, by column; those without any value are left out.
        validation: by metric.
        events: all that is known to have happened, oldest first.
    """

    info: RunInfo
    state: str
    now: float
    config: Mapping[str, Any]
    sessions: tuple[Session, ...]
    account: Account
    curves: Mapping[str, Curve]
    validation: Mapping[str, Curve]
    alerts: tuple[Alert, ...]
    events: tuple[Event, ...]
    checkpoints: tuple[Checkpoint, ...]
    slow_steps: tuple[SlowStep, ...]

    @property
    def steps(self) -> int | None:
        """The highest step known; None when none is."""
        known = [curve.steps[-1] for curve in self.curves.values() if curve.steps]
        known += [one.step for one in self.checkpoints]
        known += [
            session.summary["step"] for session in self.sessions if _is_number(session.summary.get("step"))
        ]
        return max(known, default=None)


def gather(folder: RunFolder, journal: Journal | None) -> RunStory:
    """Read everything known of a run.

    Args:
        journal: the sidecar's; None where there is none.

    Raises:
        ConfigError: there is no run in that folder.
    """
    info = folder.read_info()
    records = list(read_history(folder.history))
    sessions = _sessions(records)
    events = tuple(events_of(folder, journal))
    return RunStory(
        info=info,
        state=folder.present_state(info),
        now=time.time(),
        config=_config(folder),
        sessions=sessions,
        account=_account(sessions),
        curves=_curves(records),
        validation=_validation(records),
        alerts=_alerts(records, journal, folder.id),
        events=events,
        checkpoints=_checkpoints(folder),
        slow_steps=tuple(slow_steps(folder.traces)),
    )


def _config(folder: RunFolder) -> dict[str, Any]:
    try:
        document = tomllib.loads(folder.config_toml.read_text())
    except (OSError, ValueError):
        return {}
    return {key: _without_secrets(value) for key, value in document.items()}


def _without_secrets(value: Any) -> Any:
    """User and password of addresses hidden: a report is passed around."""
    if isinstance(value, str):
        return re.sub(r"(://)[^/@\s]+@", r"\1…@", value)
    if isinstance(value, Mapping):
        return {key: _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return value


def _sessions(records: list[dict[str, Any]]) -> tuple[Session, ...]:
    found: list[list[dict[str, Any]]] = []
    for record in records:
        if record.get("kind") == "start" or not found:
            found.append([])
        found[-1].append(record)
    sessions = []
    for own in found:
        summaries = [record for record in own if record.get("kind") == "summary"]
        sessions.append(
            Session(
                began=own[0]["at"],
                ended=max(record["at"] for record in own),
                facts=own[0] if own[0].get("kind") == "start" else {},
                summary=summaries[-1] if summaries else {},
            )
        )
    return tuple(sessions)


def _account(sessions: tuple[Session, ...]) -> Account:
    phases: dict[str, float] = {}
    lost: dict[str, float] = {}
    walls = productive = 0.0
    for session in sessions:
        summary = session.summary
        for into, name in ((phases, "phase_seconds"), (lost, "lost_seconds")):
            for key, seconds in _numbers(summary.get(name)).items():
                into[key] = into.get(key, 0.0) + seconds
        if _is_number(summary.get("wall_seconds")) and _is_number(summary.get("goodput_ratio")):
            walls += summary["wall_seconds"]
            productive += summary["wall_seconds"] * summary["goodput_ratio"]
    between = sum(max(0.0, later.began - earlier.ended) for earlier, later in itertools.pairwise(sessions))
    if between:
        lost["between_processes"] = between
    wall = walls + between
    return Account(wall, phases, lost, productive / wall if wall > 0 else None)


def _curves(records: list[dict[str, Any]]) -> dict[str, Curve]:
    points = [record for record in records if record.get("kind") == "point"]
    found = {}
    for name in (*CURVES, *MACHINE):
        values = [
            (point["step"], float(point[name]))
            for point in points
            if isinstance(point.get("step"), int) and _is_number(point.get(name))
        ]
        if values:
            found[name] = _curve(values)
    return found


def _validation(records: list[dict[str, Any]]) -> dict[str, Curve]:
    values: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record.get("kind") == "validation" and isinstance(record.get("step"), int):
            for name, value in _numbers(record.get("metrics")).items():
                values.setdefault(name, []).append((record["step"], value))
    return {name: _curve(pairs) for name, pairs in values.items()}


def _curve(pairs: list[tuple[int, float]]) -> Curve:
    """Where the steps go back (a restart, a rollback), what came before from there on did not last."""
    kept: list[tuple[int, float]] = []
    for step, value in pairs:
        while kept and kept[-1][0] >= step:
            kept.pop()
        kept.append((step, value))
    return Curve(tuple(step for step, _ in kept), tuple(value for _, value in kept))


def _alerts(records: list[dict[str, Any]], journal: Journal | None, run: str) -> tuple[Alert, ...]:
    """Those that the trainer judged, and those of Prometheus that the sidecar heard of."""
    found: list[Alert] = []
    ends: dict[tuple[str, str], float] = {}
    for record in reversed(records):
        if record.get("kind") != "alert":
            continue
        key = (str(record.get("name")), json.dumps(record.get("labels"), sort_keys=True))
        if record.get("state") == "resolved":
            ends[key] = record["at"]
            continue
        labels = record.get("labels")
        about = (
            ", ".join(f"{name} {value}" for name, value in labels.items()) if isinstance(labels, dict) else ""
        )
        step = record.get("step")
        found.append(
            Alert(
                at=record["at"],
                until=ends.pop(key, None),
                alert=key[0],
                name=key[0] + (f" ({about})" if about else ""),
                severity=str(record.get("severity")),
                value=_number(record.get("value")),
                threshold=_number(record.get("threshold")),
                unit=str(record.get("unit") or ""),
                step=step if isinstance(step, int) else None,
                judged_by="trainer",
                summary=str(record.get("summary") or ""),
            )
        )
    heard = journal.alerts(1_000, run=run) if journal is not None else []
    # By fingerprint alone: a Prometheus that was started anew gives the same firing another start.
    resolved: dict[str, float] = {}
    seen: set[tuple[str, float]] = set()
    for entry in heard:  # newest first
        firing = (entry.fingerprint, entry.starts_at)
        if entry.status == "resolved":
            resolved[entry.fingerprint] = entry.received_at
        elif firing not in seen:
            seen.add(firing)
            found.append(
                Alert(
                    at=entry.starts_at,
                    until=resolved.get(entry.fingerprint),
                    alert=entry.name,
                    name=entry.name,
                    severity=entry.severity,
                    value=None,
                    threshold=None,
                    unit="",
                    step=None,
                    judged_by="Prometheus",
                    summary=f"decided: {entry.decision}" + (f" ({entry.action})" if entry.action else ""),
                )
            )
    return _joined(found)


def _joined(found: list[Alert]) -> tuple[Alert, ...]:
    """In order of time; a firing that the trainer and Prometheus both judged is one."""
    judged = [alert for alert in found if alert.judged_by == "trainer"]
    joined: list[Alert] = []
    for alert in sorted(found, key=lambda alert: alert.at):
        if alert.judged_by == "trainer":
            continue
        alike = [one for one in judged if one.alert == alert.alert and _overlap(one, alert)]
        if alike:
            # Of several devices each has its own: the one that began at nearly the same time.
            same = min(alike, key=lambda one: abs(one.at - alert.at))
            judged.remove(same)
            ends = (same.until, alert.until)
            alert = replace(
                same,
                at=min(same.at, alert.at),
                until=None if None in ends else max(end for end in ends if end is not None),
                judged_by="trainer, Prometheus",
                summary=f"{same.summary}; {alert.summary}".removeprefix("; "),
            )
        joined.append(alert)
    return tuple(sorted([*judged, *joined], key=lambda alert: alert.at))


def _overlap(one: Alert, other: Alert) -> bool:
    """Whether they fired at the same time, or with no more between them than a scrape and an evaluation."""
    earlier, later = sorted((one, other), key=lambda alert: alert.at)
    return earlier.until is None or later.at - earlier.until < SAME_SECONDS


def _checkpoints(folder: RunFolder) -> tuple[Checkpoint, ...]:
    found = []
    for path in sorted((folder.checkpoints / "manifests").glob("*.json")):
        step, _, rest = path.stem.partition("-")
        kind = rest.partition("-")[0]
        if not step.isdecimal():
            continue
        body: dict[str, Any] = {}
        sizes: list[int] | None = None
        try:
            size, changed = path.stat().st_size, path.stat().st_mtime
        except OSError:  # pruned meanwhile
            continue
        try:
            if size <= MAX_MANIFEST_BYTES:
                body = dict(json.loads(path.read_bytes().partition(b"\n")[0]))
                sizes = [int(tensor["nbytes"]) for tensor in body["tensors"]]
                changed = datetime.fromisoformat(str(body["created_at"])).timestamp()
        except (OSError, ValueError, KeyError, TypeError):
            pass
        found.append(
            Checkpoint(
                step=int(step),
                kind=kind,
                created_at=changed,
                bytes_total=sum(sizes) if sizes is not None else None,
                reason=str(body.get("reason") or ""),
                metrics=_numbers(body.get("metrics")),
            )
        )
    return tuple(found)


def _numbers(value: Any) -> dict[str, float]:
    return (
        {str(key): float(item) for key, item in value.items() if _is_number(item)}
        if isinstance(value, dict)
        else {}
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None
