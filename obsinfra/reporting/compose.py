"""A run's story as a document: which numbers, charts and tables a report has, alone or beside another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from obsinfra.catalog.alert_changes import alert_table
from obsinfra.errors import ConfigError
from obsinfra.reporting import words
from obsinfra.reporting.charts import smoothed
from obsinfra.reporting.document import Cell, Chart, Document, Line, Section, Shares, Table, Text, Tile, Tone
from obsinfra.reporting.gather import Curve, RunStory

LOST_NAMES = {"outside_step": "outside steps", "data": "data wait", "between_processes": "between processes"}
MAX_ROWS = 200
"""Of the table of events; the newest."""

GOOD_OUTCOMES = ("done", "committed", "finished")
BAD_OUTCOMES = ("failed", "rejected", "expired", "undelivered", "unacknowledged")
STATE_TONES: Mapping[str, Tone] = {"finished": "good", "running": "good", "failed": "bad", "dead": "bad"}
SEVERITY_TONES: Mapping[str, Tone] = {"critical": "bad", "warning": "warn"}


def compose(story: RunStory, other: RunStory | None = None) -> Document:
    """The report of `story`, with `other` beside it where there is one."""
    info = story.info
    facts = [
        _device(story),
        f"host {info.host}",
        f"{info.world_size} ranks" if info.world_size > 1 else "",
        f"started {info.started[:19].replace('T', ' ')} UTC",
        f"{info.restarts} restarts" if info.restarts else "",
        f"revision {info.git_revision}" if info.git_revision else "",
        f"branched from {info.parent}" if info.parent else "",
        f"beside {other.info.id}" if other else "",
    ]
    sections = [
        *([_comparison(story, other)] if other else []),
        _curves(story, other),
        _time(story),
        _alerts(story),
        _events(story),
        _checkpoints(story),
        _slow(story),
        _machine(story),
        _environment(story),
        _config(story, other),
    ]
    return Document(
        title=info.model,
        run=info.id,
        state=story.state,
        facts=tuple(fact for fact in facts if fact),
        tiles=_tiles(story),
        sections=tuple(section for section in sections if section.blocks),
        made=words.moment(story.now) + " UTC",
        reason=info.reason or "",
    )


def _device(story: RunStory) -> str:
    facts = story.sessions[-1].facts if story.sessions else {}
    return " · ".join(str(facts[name]) for name in ("device", "precision") if facts.get(name))


def _tiles(story: RunStory) -> tuple[Tile, ...]:
    loss, account = story.curves.get("loss"), story.account
    # The raw loss of one step says little: the mean of the last stretch is what the curve ends at.
    final = smoothed(loss).last if loss else None
    tiles = [
        Tile(
            "Loss at the end",
            words.number(final),
            f"first {words.number(loss.values[0])}, lowest {words.number(min(loss.values))}" if loss else "",
        )
    ]
    for name, curve in list(story.validation.items())[:2]:
        tiles.append(
            Tile(
                f"Validation: {name}",
                words.number(curve.last),
                f"from {words.number(min(curve.values))} to {words.number(max(curve.values))}",
            )
        )
    rate = _mean_rate(story)
    firing = sum(alert.until is None for alert in story.alerts)
    tiles += [
        Tile("Steps", words.integer(story.steps), _epochs(story)),
        Tile("Wall time", words.duration(account.wall or None), _processes(story)),
        Tile(
            "Goodput",
            words.percent(account.goodput),
            f"{words.duration(sum(account.lost.values()))} lost" if account.lost else "",
        ),
        Tile("Samples per second", words.number(rate), "mean over steps"),
        Tile(
            "Checkpoints",
            words.integer(len(story.checkpoints)),
            f"last at step {words.integer(story.checkpoints[-1].step)}" if story.checkpoints else "",
        ),
        Tile(
            "Alerts",
            words.integer(len(story.alerts)),
            f"{firing} without an end" if firing else "",
            "bad" if any(alert.severity == "critical" for alert in story.alerts) else "",
        ),
    ]
    return tuple(tiles)


def _epochs(story: RunStory) -> str:
    epochs = [session.summary.get("epoch") for session in story.sessions]
    reached = next((epoch for epoch in reversed(epochs) if isinstance(epoch, int)), None)
    planned = story.info.epochs
    if reached is None:
        return ""
    return f"epoch {reached} of {planned}" if planned else f"epoch {reached}"


def _processes(story: RunStory) -> str:
    count = len(story.sessions)
    return f"in {count} processes" if count > 1 else ""


def _mean_rate(story: RunStory) -> float | None:
    """Samples ÷ seconds of all steps: throughput on the whole; None where no samples were told."""
    samples = seconds = 0.0
    for session in story.sessions:
        mean, steps = session.summary.get("step_seconds_mean"), session.summary.get("steps")
        count = session.summary.get("samples")
        if all(isinstance(value, int | float) for value in (mean, steps, count)):
            samples += count  # type: ignore[operator]
            seconds += mean * steps  # type: ignore[operator]
    return samples / seconds if samples and seconds else None


# ---- curves ------------------------------------------------------------------------------------------


def _curves(story: RunStory, other: RunStory | None) -> Section:
    limits = _limits(story)
    alerts = tuple(alert.step for alert in story.alerts if alert.step is not None)
    saved = tuple(one.step for one in story.checkpoints)
    charts: list[Chart] = []

    def add(
        title: str,
        column: str,
        write: Callable[[float | None], str] = words.number,
        axis: Callable[[float], str] = words.short,
        **more: Any,
    ) -> None:
        lines = []
        if (curve := story.curves.get(column)) is not None:
            if column == "loss" and len(curve.steps) > 2:
                lines = [Line("raw", curve, "faint"), Line(story.info.id, smoothed(curve))]
            else:
                lines = [Line(story.info.id, curve)]
        if other is not None and (beside := other.curves.get(column)) is not None:
            shown = smoothed(beside) if column == "loss" and len(beside.steps) > 2 else beside
            lines.append(Line(other.info.id, shown, "other"))
        if lines:
            charts.append(Chart(title, tuple(lines), write, axis, alerts=alerts, checkpoints=saved, **more))

    add("Loss", "loss", log=True)
    for name in dict.fromkeys([*story.validation, *(other.validation if other else ())]):
        lines = [
            Line(told.info.id, told.validation[name], style, points=True)  # type: ignore[arg-type]
            for told, style in ((story, "main"), (other, "other"))
            if told is not None and name in told.validation
        ]
        charts.append(
            Chart(
                f"Validation: {name}",
                tuple(lines),
                words.number,
                words.short,
                alerts=alerts,
                checkpoints=saved,
            )
        )
    add("Gradient norm", "grad_norm", limit=limits.get("gradient_norm"), log=True)
    add("Throughput, samples per second", "samples_per_second", floor=0.0)
    add(
        "Step time",
        "step_time_seconds",
        words.duration,
        words.duration,
        limit=limits.get("step_time"),
        floor=0.0,
    )
    add("Learning rate", "learning_rate", floor=0.0)
    note = Text(
        "No numbers were kept: the run was made without monitoring, or has not come to its first second."
    )
    return Section("Curves", tuple(charts) or (note,))


def _limits(story: RunStory) -> dict[str, float]:
    """Thresholds of the run's own settings, in base units."""
    try:
        rows = alert_table(story.config.get("thresholds"), story.config.get("alerts"))
    except (ConfigError, TypeError, ValueError, AttributeError):  # of another version's table
        rows = alert_table(None, None)
    return {row.key: row.limit for row in rows}


def _machine(story: RunStory) -> Section:
    styles = itertools.cycle(("main", "second", "third", "fourth"))
    names = {
        "cpu_ratio": "processors", "memory_ratio": "memory", "gpu_ratio": "GPUs busy",
        "gpu_memory_ratio": "fullest GPU memory",
    }  # fmt: skip
    lines = tuple(
        Line(name, story.curves[column], next(styles))  # type: ignore[arg-type]
        for column, name in names.items()
        if column in story.curves
    )
    if not lines:
        return Section("Machine", ())
    chart = Chart(
        "Machine", lines, words.percent, lambda ratio: words.percent(ratio, 0), floor=0.0, ceiling=1.0
    )
    return Section("Machine", (chart,))


# ---- tables ------------------------------------------------------------------------------------------


def _time(story: RunStory) -> Section:
    account = story.account
    blocks: list[Any] = []
    phases = {name: seconds for name, seconds in account.phases.items() if seconds > 0}
    if total := sum(phases.values()):
        blocks.append(
            Shares(
                f"Wall time by phase, {words.duration(total)}",
                tuple(
                    (name, seconds / total, words.duration(seconds))
                    for name, seconds in sorted(phases.items(), key=lambda item: -item[1])
                ),
            )
        )
    lost = {name: seconds for name, seconds in account.lost.items() if seconds > 0}
    if lost and account.wall > 0:
        blocks.append(
            Shares(
                f"Time lost by cause, of {words.duration(account.wall)}",
                tuple(
                    (LOST_NAMES.get(name, name), seconds / account.wall, words.duration(seconds))
                    for name, seconds in sorted(lost.items(), key=lambda item: -item[1])
                ),
            )
        )
    return Section("Where the time went", tuple(blocks))


def _alerts(story: RunStory) -> Section:
    rows = tuple(
        (
            Cell(words.moment(alert.at)),
            Cell(alert.severity, SEVERITY_TONES.get(alert.severity, "")),
            Cell(alert.name, "strong"),
            Cell(words.integer(alert.step)),
            Cell(_measured(alert.value, alert.unit)),
            Cell(_measured(alert.threshold, alert.unit)),
            Cell(words.duration(alert.until - alert.at) if alert.until is not None else "no end seen"),
            Cell(alert.judged_by),
            Cell(alert.summary, "quiet"),
        )
        for alert in story.alerts[-MAX_ROWS:]
    )
    columns = (
        "Fired, UTC",
        "Severity",
        "Alert",
        "Step#",
        "Value#",
        "Threshold#",
        "For#",
        "Judged by",
        "What",
    )
    return Section("Alerts", (Table("Alerts that fired", columns, rows, "No alert fired."),))


def _measured(value: float | None, unit: str) -> str:
    return words.NONE if value is None else f"{words.short(value)} {unit}".strip()


def _events(story: RunStory) -> Section:
    shown = [event for event in story.events if event.kind not in ("alert", "checkpoint")][-MAX_ROWS:]
    rows = []
    for event in shown:
        tone: Tone = ""
        if event.outcome.startswith(GOOD_OUTCOMES):
            tone = "good"
        elif event.outcome.startswith(BAD_OUTCOMES):
            tone = "bad"
        took = (
            f" in {words.duration(event.until - event.at)}"
            if event.until is not None and event.until > event.at
            else ""
        )
        rows.append(
            (
                Cell(words.moment(event.at)),
                Cell(words.integer(event.step)),
                Cell(event.who),
                Cell(event.what, "strong"),
                Cell(event.outcome + took, tone),
                Cell(event.why, "quiet"),
            )
        )
    columns = ("When, UTC", "Step#", "Who", "What", "Outcome", "Why")
    table = Table("Starts, commands, problems and ends", columns, tuple(rows), "Nothing is known.")
    return Section("Actions and events", (table,))


def _checkpoints(story: RunStory) -> Section:
    rows = tuple(
        (
            Cell(words.integer(one.step)),
            Cell(one.kind, "warn" if one.kind == "emergency" else ""),
            Cell(words.moment(one.created_at)),
            Cell(words.size(one.bytes_total)),
            Cell(", ".join(f"{name} {words.number(value)}" for name, value in one.metrics.items())),
            Cell(one.reason, "quiet"),
        )
        for one in reversed(story.checkpoints[-MAX_ROWS:])
    )
    columns = ("Step#", "Kind", "Committed, UTC", "Size#", "Metrics", "Why")
    return Section("Checkpoints", (Table("Checkpoints in the folder", columns, rows, "There is none."),))


def _slow(story: RunStory) -> Section:
    rows = tuple(
        (
            Cell(words.integer(step.step), "strong"),
            Cell(words.integer(step.rank)),
            Cell(words.moment(step.at)),
            Cell(words.duration(step.seconds)),
            Cell(
                ", ".join(
                    f"{name} {words.duration(seconds)}" for name, seconds in list(step.phases.items())[:4]
                )
            ),
            Cell(step.trace_id, "quiet"),
        )
        for step in story.slow_steps
    )
    columns = ("Step#", "Rank#", "Ended, UTC", "Took#", "Of which", "Trace")
    return Section(
        "Last slow steps",
        (Table("The last slow steps, from their traces", columns, rows, "None was traced."),),
    )


def _environment(story: RunStory) -> Section:
    blocks = []
    for number, session in enumerate(story.sessions, 1):
        facts = session.facts
        versions = facts.get("versions")
        pairs = [
            ("began", words.moment(session.began) + " UTC"),
            ("ran for", words.duration(session.ended - session.began)),
            ("resumed from step", facts.get("resumed_from_step")),
            *(versions.items() if isinstance(versions, dict) else ()),
            ("revision", facts.get("revision")),
            ("device", facts.get("device")),
            ("precision", facts.get("precision")),
            ("GPUs", facts.get("gpus")),
            ("processors", facts.get("processors")),
            ("host", facts.get("host")),
            ("platform", facts.get("platform")),
            ("process", facts.get("pid")),
        ]
        rows = tuple(
            (Cell(str(name), "quiet"), Cell(words.value_of(value)))
            for name, value in pairs
            if value not in (None, "", [])
        )
        name = f"Process {number}" if len(story.sessions) > 1 else "Process"
        blocks.append(Table(name, ("What", "Value"), rows))
    return Section("Environment", tuple(blocks[-8:]), open=len(blocks) <= 2)


def _config(story: RunStory, other: RunStory | None) -> Section:
    names = dict.fromkeys([*story.config, *(other.config if other else ())])
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        mine = words.value_of(story.config.get(name))
        if other is None:
            rows.append((Cell(name), Cell(mine)))
            continue
        theirs = words.value_of(other.config.get(name))
        tone: Tone = "warn" if mine != theirs else ""
        rows.append((Cell(name), Cell(mine, tone), Cell(theirs, tone)))
    columns = ("Setting", story.info.id, other.info.id) if other else ("Setting", "Value")
    table = Table("Every setting as resolved", columns, tuple(rows), "config.toml is not there.")
    return Section("Configuration", (table,), open=False)


# ---- beside a second run -----------------------------------------------------------------------------


def _comparison(story: RunStory, other: RunStory) -> Section:
    rows: list[tuple[Cell, ...]] = []

    def add(
        name: str,
        mine: float | None,
        theirs: float | None,
        write: Callable[[float | None], str] = words.number,
    ) -> None:
        if mine is None and theirs is None:
            return
        change = words.NONE
        if mine is not None and theirs is not None:
            change = (
                f"{(mine - theirs) / abs(theirs) * 100:+.1f} %" if theirs else words.number(mine - theirs)
            )
        rows.append((Cell(name), Cell(write(mine), "strong"), Cell(write(theirs)), Cell(change)))

    def end(told: RunStory, column: str) -> float | None:
        curve = told.curves.get(column)
        return smoothed(curve).last if curve else None

    shared = _shared_step(story.curves.get("loss"), other.curves.get("loss"))
    add("loss at the end, smoothed", end(story, "loss"), end(other, "loss"))
    if shared is not None:
        at = (_at(story.curves["loss"], shared), _at(other.curves["loss"], shared))
        add(f"loss at step {words.integer(shared)}, smoothed", *at)
    for name in dict.fromkeys([*story.validation, *other.validation]):
        for what, pick in (("last", _last), ("highest", _highest), ("lowest", _lowest)):
            add(
                f"validation {name}, {what}",
                pick(story.validation.get(name)),
                pick(other.validation.get(name)),
            )
    add("steps", story.steps, other.steps, words.integer)
    add("wall time", story.account.wall or None, other.account.wall or None, words.duration)
    add("goodput", story.account.goodput, other.account.goodput, words.percent)
    add("samples per second", _mean_rate(story), _mean_rate(other))
    add("step time, median at the end", _last(story.curves.get("step_time_seconds")),
        _last(other.curves.get("step_time_seconds")), words.duration)  # fmt: skip
    add("alerts fired", len(story.alerts), len(other.alerts), words.integer)
    add("checkpoints", len(story.checkpoints), len(other.checkpoints), words.integer)
    add("restarts", story.info.restarts, other.info.restarts, words.integer)
    columns = ("What", f"{story.info.id}#", f"{other.info.id}#", "Change#")
    numbers = Table(f"{story.info.id} beside {other.info.id}", columns, tuple(rows))
    differing = tuple(
        (Cell(name), Cell(mine, "strong"), Cell(theirs))
        for name in dict.fromkeys([*story.config, *other.config])
        if name not in ("run", "output_dir")
        and (mine := words.value_of(story.config.get(name)))
        != (theirs := words.value_of(other.config.get(name)))
    )
    settings = Table(
        "Settings that differ", ("Setting", story.info.id, other.info.id), differing, "No setting differs."
    )
    return Section("Comparison", (numbers, settings))


def _shared_step(mine: Curve | None, theirs: Curve | None) -> int | None:
    """The last step that both have reached, where that is not the end of both."""
    if mine is None or theirs is None or mine.steps[-1] == theirs.steps[-1]:
        return None
    return min(mine.steps[-1], theirs.steps[-1])


def _at(curve: Curve, step: int) -> float | None:
    values = [value for at, value in zip(curve.steps, smoothed(curve).values, strict=True) if at <= step]
    return values[-1] if values else None


def _last(curve: Curve | None) -> float | None:
    return curve.last if curve else None


def _highest(curve: Curve | None) -> float | None:
    return max(curve.values) if curve else None


def _lowest(curve: Curve | None) -> float | None:
    return min(curve.values) if curve else None
