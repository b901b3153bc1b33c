"""What happened to a run, from all that wrote it down: the sidecar's journal, the run's logs, its folder.

Behind `obsinfra history`, the sidecar's `/v1/annotations` and what dashboards show. Reads only; a run without
a sidecar has a history too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from obsinfra.control.command import CLOCK_SKEW_SECONDS
from obsinfra.control.journal import AlertEntry, CommandEntry, Journal
from obsinfra.errors import ConfigError
from obsinfra.run.folder import RunFolder

EventKind = Literal["start", "restart", "end", "checkpoint", "alert", "command", "problem"]
EVENT_KINDS: tuple[EventKind, ...] = ("start", "restart", "end", "checkpoint", "alert", "command", "problem")

MAX_LOG_BYTES = 8 << 20
"""Of each log, from its end backwards; older lines are not looked at."""

MAX_EVENTS = 10_000

_WANTED = {
    "training": (b'"event": "checkpoint"',),
    "system": (b'"event": "run_started"', b'"event": "command"', b'"event": "run_ended"'),
    "errors": (b'"event": "alert_firing"', b'"event": "checkpoint_failed"', b'"event": "training_failed"'),
}
"""Log channel → the events read from it."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a run.

    Attributes:
        at: epoch seconds.
        until: when it was over, epoch seconds; None for a moment.
        kind: one of `EVENT_KINDS`.
        who: what caused it: `trainer`, `alertmanager`, `sidecar`, `in-process`, `cli`, …
        what: in few words, e.g. `emergency_checkpoint` or `HighMemory fires`.
        outcome: what came of it; empty where nothing is to come.
        step: of the run, where it is known.
        why: the reason, or the error.
        id: of a command.
    """

    at: float
    run: str
    kind: EventKind
    who: str
    what: str
    outcome: str = ""
    step: int | None = None
    why: str = ""
    id: str = ""
    until: float | None = None


def events_of(
    folder: RunFolder, journal: Journal | None, *, since: float = 0.0, until: float = float("inf")
) -> list[Event]:
    """Everything known of a run in that time (epoch seconds), oldest first; the newest `MAX_EVENTS`.

    What the journal has of an earlier run of the same name, whose folder was removed, is left out.

    Args:
        journal: the sidecar's; None where there is none.
    """
    found: list[Event] = []
    heard: set[str] = set()
    start = _start(folder)
    if journal is not None:
        first = since if start is None else max(since, start.at - CLOCK_SKEW_SECONDS)
        last = None if until == float("inf") else until
        entries = journal.commands(MAX_EVENTS, run=folder.id, since=first, until=last)
        heard = {entry.command.id for entry in entries}
        found += [_of_command(entry) for entry in entries]
        found += map(_of_alert, journal.alerts(MAX_EVENTS, run=folder.id, since=first, until=last))
    logged: set[str] = set()
    for line in _lines(folder):
        if (event := _of_line(folder.id, line)) is not None and event.id not in heard:
            found.append(event)
        if line.get("event") == "checkpoint":
            logged.add(Path(str(line.get("path"))).name)
    found += _unlogged_checkpoints(folder, logged)
    if start is not None and not any(event.kind == "start" for event in found):
        found.append(start)
    wanted = [event for event in found if since <= event.at <= until]
    return sorted(wanted, key=lambda event: event.at)[-MAX_EVENTS:]


def grafana_annotations(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Events in the shape of Grafana's annotations; times in milliseconds."""
    return [
        {
            "time": round(event.at * 1e3),
            "timeEnd": round((event.until or event.at) * 1e3),
            "title": f"{event.kind}: {event.what}",
            "text": " · ".join(
                part
                for part in (
                    event.outcome,
                    f"step {event.step}" if event.step is not None else "",
                    f"by {event.who}",
                    event.why,
                )
                if part
            ),
            "tags": ["obsinfra", event.kind, event.run],
        }
        for event in events
    ]


def as_document(event: Event) -> dict[str, Any]:
    """The event as JSON."""
    return asdict(event)


def _of_command(entry: CommandEntry) -> Event:
    command, ack = entry.command, entry.ack or {}
    why = command.reason + (f"; {ack['error']}" if ack.get("error") else "")
    return Event(
        at=entry.received_at,
        run=command.run,
        kind="command",
        who=command.source,
        what=command.action,
        outcome=entry.outcome or "waiting",
        step=ack.get("step"),
        why=why,
        id=command.id,
        until=entry.settled_at,
    )


def _of_alert(entry: AlertEntry) -> Event:
    verb = {"firing": "fires", "resolved": "resolved"}[entry.status]
    if entry.decision in ("escalated", "undone"):
        verb = f"{entry.decision}: {entry.action}"
    return Event(
        at=entry.received_at,
        run=entry.run,
        kind="alert",
        who="alertmanager",
        what=f"{entry.name} {verb}",
        outcome=entry.decision if entry.decision != "resolved" else "",
        why=f"asks for {entry.action}" if entry.action else "",
    )


def _of_line(run: str, line: dict[str, Any]) -> Event | None:
    """An event from a line of a log; None for what is told elsewhere, or malformed."""
    try:
        at = datetime.fromisoformat(line["timestamp"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None
    step = line.get("at_step", line.get("step"))
    step = step if isinstance(step, int) else None

    def text(name: str) -> str:
        value = line.get(name)
        return "" if value is None else str(value)

    match line["event"]:
        case "run_started":
            resumed = line.get("resumed_from_step")
            return (
                Event(at, run, "start", "trainer", f"training {text('model')}")
                if resumed is None
                else Event(at, run, "restart", "trainer", f"resumed from step {resumed}", step=step)
            )
        case "checkpoint":
            return Event(
                at,
                run,
                "checkpoint",
                "trainer",
                f"{text('kind')} checkpoint",
                "committed",
                step,
                text("reason"),
            )
        case "run_ended":
            return Event(at, run, "end", "trainer", text("state"), step=step, why=text("reason"))
        case "command":
            return Event(
                at, run, "command", text("source"), text("action"), text("outcome"), step, id=text("id")
            )
        case "alert_firing" if line.get("acts") == "in-process":
            why = f"asks for {line['action']}" if line.get("action") else ""
            return Event(at, run, "alert", "in-process", f"{text('alert')} fires", step=step, why=why)
        case "checkpoint_failed":
            return Event(
                at, run, "problem", "trainer", f"{text('kind')} checkpoint", "failed", step, text("error")
            )
        case "training_failed":
            return Event(at, run, "problem", "trainer", "training", "failed", step, text("error"))
    return None


def _lines(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """The lines of interest of the run's logs, each log oldest first."""
    for channel, wanted in _WANTED.items():
        for raw in _tail(folder.logs / f"{channel}.jsonl"):
            if any(mark in raw for mark in wanted):
                try:
                    line = json.loads(raw)
                except ValueError:
                    continue
                # errors.jsonl repeats warnings of the other channels
                if isinstance(line, dict) and line.get("event"):
                    yield line


def _tail(path: Path) -> list[bytes]:
    """The last `MAX_LOG_BYTES` of a log and the rotated one before it, by whole lines."""
    parts: list[bytes] = []
    left = MAX_LOG_BYTES
    for place in (path, path.with_name(path.name + ".1")):
        try:
            with place.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - left))
                raw = file.read(left)
        except OSError:
            break
        if size > left:
            raw = raw.partition(b"\n")[2]
        parts.insert(0, raw)
        left -= len(raw)
        if left <= 0 or size > len(raw):
            break
    return b"".join(parts).splitlines()


def _unlogged_checkpoints(folder: RunFolder, logged: set[str]) -> list[Event]:
    """Checkpoints that no log tells of: of the writer process after the trainer's death, or copied here."""
    found = []
    try:
        entries = list(os.scandir(folder.checkpoints / "manifests"))
    except OSError:
        return []
    for entry in entries:
        step, _, rest = entry.name.partition("-")
        if entry.name in logged or not entry.name.endswith(".json") or not step.isdecimal():
            continue
        try:
            at = entry.stat().st_mtime
        except OSError:
            continue
        kind = rest.partition("-")[0]
        found.append(
            Event(at, folder.id, "checkpoint", "writer", f"{kind} checkpoint", "committed", int(step))
        )
    return found


def _start(folder: RunFolder) -> Event | None:
    """The run's first start, as its run.json tells."""
    try:
        info = folder.read_info()
        return Event(
            datetime.fromisoformat(info.started).timestamp(),
            folder.id,
            "start",
            "trainer",
            f"training {info.model}",
        )
    except (ConfigError, ValueError):
        return None
