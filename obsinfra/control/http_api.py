"""The sidecar's `/v1`: runs, their commands and events, alerts, annotations; typed, and described by OpenAPI.

For dashboards, scripts and people with the token. Every answer that is no success is `{"detail": text}`.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from obsinfra.catalog.actions import ACTIONS, MAX_TEXT
from obsinfra.control.command import ID_PATTERN
from obsinfra.control.gate import Gate
from obsinfra.control.history import Event, EventKind, events_of, grafana_annotations
from obsinfra.control.journal import AlertEntry, CommandEntry, Firing
from obsinfra.control.responder import Sidecar
from obsinfra.control.run_watch import SeenRun
from obsinfra.errors import CommandError
from obsinfra.monitoring.slow_steps import SlowStep, slow_steps
from obsinfra.run.folder import RUN_ID_PATTERN

MAX_LISTED = 1_000
MAX_ANNOTATED_RUNS = 50
MAX_MOMENT = 1 << 53

RunId = Annotated[
    str, Path(pattern=f"^{RUN_ID_PATTERN.pattern}$", max_length=100, description="The run's name.")
]
Limit = Annotated[int, Query(ge=1, le=MAX_LISTED, description="At most so many, the newest.")]


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


class RunView(BaseModel):
    """A run as of the last scan."""

    id: str
    model: str
    state: str = Field(description="What run.json says; `dead` when its trainer went without a word.")
    live: bool
    started: str
    host: str
    world_size: int
    restarts: int
    ended: str | None
    reason: str | None
    metrics_urls: dict[str, str] = Field(description="Rank → address of its /metrics.")


class FiringView(BaseModel):
    """An alert that fires for a run, and what comes next about it. Times are epoch seconds."""

    run: str
    alert: str
    severity: str
    summary: str
    starts_at: float
    steps_taken: int
    next_step: str | None
    next_at: float | None


class RunDetail(RunView):
    """A run, what it has reached, and what fires for it."""

    step: int | None
    progress_at: float | None = Field(description="When it noted its step, epoch seconds.")
    alerts_act: Literal["sidecar", "in-process"]
    firing: list[FiringView]


class AlertView(BaseModel):
    """What was decided about an alert. Times are epoch seconds."""

    received_at: float
    alert: str
    run: str
    severity: str
    status: str
    starts_at: float
    decision: str
    action: str


class AlertsView(BaseModel):
    """What fires, and what was heard of."""

    firing: list[FiringView]
    heard: list[AlertView]


class CommandView(BaseModel):
    """A command of the sidecar's journal. Times are epoch seconds."""

    id: str
    run: str
    action: str
    args: dict[str, Any]
    reason: str
    source: str
    alert: str
    received_at: float
    expires_at: float
    outcome: str = Field(description="`waiting`, or what became of it.")
    step: int | None
    result: dict[str, Any] | None
    error: str | None
    settled_at: float | None


class CommandRequest(BaseModel):
    """What a run shall do."""

    model_config = ConfigDict(extra="forbid", strict=True)

    action: str = Field(
        max_length=64,
        description="See docs/actions.md.",
        json_schema_extra=lambda schema: schema.update(enum=list(ACTIONS)),  # as registered by then
    )
    args: dict[Annotated[str, Field(max_length=64)], bool | int | float | str | None] = Field(
        default_factory=dict, max_length=32
    )
    reason: str = Field("", max_length=MAX_TEXT, description="Why, for the journal.")
    who: str = Field(
        "", max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$", description="Who asks, for the journal."
    )
    id: str | None = Field(
        None,
        pattern=f"^{ID_PATTERN.pattern}$",
        description="The same id again is the same command.",
    )


class EventView(BaseModel):
    """Something that happened to a run. Times are epoch seconds."""

    at: float
    until: float | None
    run: str
    kind: EventKind
    who: str
    what: str
    outcome: str
    step: int | None
    why: str
    id: str


class SlowStepView(BaseModel):
    """A step that its trainer judged slow. `at` is its end, epoch seconds; `phases` are in seconds."""

    at: float
    step: int
    epoch: int
    rank: int
    seconds: float
    phases: dict[str, float]
    trace_id: str


class Annotation(BaseModel):
    """An event as Grafana shows it. Times are epoch milliseconds."""

    time: int
    timeEnd: int
    title: str
    text: str
    tags: list[str]


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Refusals a route may answer with, for OpenAPI."""
    return {status: {"model": Problem} for status in statuses}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI of a body that the route reads and checks itself, after the token."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _inlined(schema, definitions)}},
        }
    }


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints: where, and what; never the value."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def create_router(sidecar: Sidecar, gate: Gate) -> APIRouter:
    """The routes under `/v1`, each behind `gate`."""

    async def enter(request: Request) -> None:
        gate.check_token(request)
        gate.check_rate()
        allowed = [parameter.alias for parameter in request.scope["route"].dependant.query_params]
        if unknown := sorted(set(request.query_params) - set(allowed)):
            raise HTTPException(
                422, f"unknown parameter {unknown[0][:80]!r}; expected one of: {', '.join(allowed) or 'none'}"
            )

    bearer = HTTPBearer(auto_error=False, description="The token in the sidecar's token file.")
    router = APIRouter(
        prefix="/v1",
        dependencies=[Security(bearer), Depends(enter)],
        responses=answers(401, 422, 429),
    )

    def find(run: str) -> SeenRun:
        seen = sidecar.watch.find(run)
        if seen is None:
            raise HTTPException(404, f"no run {run}; list them with GET /v1/runs")
        return seen

    @router.get("/runs")
    def runs(
        live: Annotated[
            Literal["true", "false", "any"], Query(description="Only those that live, or do not.")
        ] = "any",
    ) -> list[RunView]:
        """Every run of the folder."""
        wanted = {"true": (True,), "false": (False,), "any": (True, False)}[live]
        return [_run(seen) for seen in sidecar.watch.runs() if seen.live in wanted]

    @router.get("/runs/{run}", responses=answers(404))
    def run(run: RunId) -> RunDetail:
        """One run."""
        seen = find(run)
        progress = seen.folder.read_progress()
        return RunDetail(
            **_run(seen).model_dump(),
            step=progress.step if progress else None,
            progress_at=progress.at if progress else None,
            alerts_act="sidecar" if seen.folder.sidecar_alive(time.time()) else "in-process",
            firing=[_firing(sidecar, firing) for firing in sidecar.journal.firing(run)],
        )

    @router.get("/runs/{run}/commands", responses=answers(404))
    def commands(run: RunId, limit: Limit = 100) -> list[CommandView]:
        """The commands that went to a run through the sidecar, newest first."""
        find(run)
        return [_command(entry) for entry in sidecar.journal.commands(limit, run=run)]

    @router.post(
        "/runs/{run}/commands",
        status_code=202,
        responses={200: {"model": CommandView}, **answers(404, 408, 409, 413, 503)},
        openapi_extra=json_body(CommandRequest),
    )
    async def command(run: RunId, request: Request, response: Response) -> CommandView:
        """Tell a run to do something. 202: it is in the journal and under way; 200: that id was known."""
        with gate.place():
            body = await gate.body_of(request)
            try:
                wanted = CommandRequest.model_validate_json(body)
            except ValidationError as error:
                raise HTTPException(422, first_problem(error)) from None
            if wanted.action not in ACTIONS:
                raise HTTPException(422, f"unknown action; expected one of {', '.join(ACTIONS)}")
            if (problem := ACTIONS[wanted.action].problem(wanted.args)) is not None:
                raise HTTPException(422, problem)
            find(run)
            source = f"api: {wanted.who}" if wanted.who else "api"
            if (
                wanted.id is not None
                and (known := _known(sidecar, wanted.id, run, wanted.action)) is not None
            ):
                response.status_code = 200
                return known
            try:
                fresh, made = sidecar.give(
                    run, wanted.action, wanted.args, reason=wanted.reason, source=source, id=wanted.id
                )
                if not await asyncio.wrap_future(fresh):
                    response.status_code = 200
            except CommandError as error:
                raise HTTPException(409, str(error)) from None
            except sqlite3.Error as error:
                raise gate.refuse(503, "journal_failed", f"the journal cannot be written: {error}") from error
            found = sidecar.journal.command(made.id)
            assert found is not None
            return _command(found)

    @router.get("/runs/{run}/events", responses=answers(404))
    def events(
        run: RunId,
        since: Annotated[float, Query(ge=0, le=MAX_MOMENT, description="Epoch seconds.")] = 0,
        limit: Limit = 1_000,
    ) -> list[EventView]:
        """What happened to a run, oldest first: starts, checkpoints, alerts, commands."""
        seen = find(run)
        return [_event(event) for event in events_of(seen.folder, sidecar.journal, since=since)[-limit:]]

    @router.get("/runs/{run}/slow_steps", responses=answers(404))
    def slow(run: RunId, limit: Limit = 20) -> list[SlowStepView]:
        """The last slow steps of a run's ranks, from their traces, newest first."""
        return [_slow(step) for step in slow_steps(find(run).folder.traces, limit)]

    @router.get("/journal")
    def journal(limit: Limit = 100) -> list[CommandView]:
        """The commands that went to any run through the sidecar, newest first."""
        return [_command(entry) for entry in sidecar.journal.commands(limit)]

    @router.get("/alerts")
    def alerts(
        run: Annotated[str, Query(max_length=100, description="Of one run.")] = "",
        limit: Limit = 100,
    ) -> AlertsView:
        """What fires, and what was decided about the alerts heard of, newest first."""
        return AlertsView(
            firing=[_firing(sidecar, firing) for firing in sidecar.journal.firing(run or None)][-limit:],
            heard=[_alert(entry) for entry in sidecar.journal.alerts(limit, run=run or None)],
        )

    @router.get("/annotations", responses=answers(404))
    def annotations(
        from_: Annotated[
            int, Query(alias="from", ge=0, le=MAX_MOMENT, description="Epoch milliseconds.")
        ] = 0,
        to: Annotated[int, Query(ge=0, le=MAX_MOMENT, description="Epoch milliseconds.")] = MAX_MOMENT,
        run: Annotated[
            str, Query(max_length=100, description="Of one run; else of those that were active then.")
        ] = "",
        limit: Limit = MAX_LISTED,
    ) -> list[Annotation]:
        """Checkpoints, alerts, commands, starts and ends, for a dashboard's time range."""
        since, until = from_ / 1e3, to / 1e3
        if run:
            chosen = [find(run)]
        else:
            chosen = [seen for seen in sidecar.watch.runs() if _active(seen) >= since]
            chosen = sorted(chosen, key=_active)[-MAX_ANNOTATED_RUNS:]
        events = [
            event
            for seen in chosen
            for event in events_of(seen.folder, sidecar.journal, since=since, until=until)
        ]
        events = sorted(events, key=lambda event: event.at)[-limit:]
        return [Annotation(**annotation) for annotation in grafana_annotations(events)]

    return router


def _known(sidecar: Sidecar, id: str, run: str, action: str) -> CommandView | None:
    known = sidecar.journal.command(id)
    if known is None:
        return None
    if (known.command.run, known.command.action) != (run, action):
        raise HTTPException(409, f"id {id} is that of another command; expected a new one")
    return _command(known)


def _run(seen: SeenRun) -> RunView:
    info = seen.info
    return RunView(
        id=seen.folder.id,
        model=info.model,
        state=seen.state,
        live=seen.live,
        started=info.started,
        host=info.host,
        world_size=info.world_size,
        restarts=info.restarts,
        ended=info.ended,
        reason=info.reason,
        metrics_urls=info.metrics_urls,
    )


def _active(seen: SeenRun) -> float:
    """When the run was active last, epoch seconds."""
    if seen.live:
        return time.time()
    newest = 0.0
    for place in (seen.folder.run_json, seen.folder.progress_json):
        try:
            newest = max(newest, place.stat().st_mtime)
        except OSError:
            continue
    return newest


def _firing(sidecar: Sidecar, firing: Firing) -> FiringView:
    steps = sidecar.policy.steps(firing.name, firing.label)
    next_step = steps[firing.taken].action if firing.next_at and firing.taken < len(steps) else None
    return FiringView(
        run=firing.run,
        alert=firing.name,
        severity=firing.severity,
        summary=firing.summary,
        starts_at=firing.starts_at,
        steps_taken=firing.taken,
        next_step=next_step,
        next_at=firing.next_at if next_step is not None else None,
    )


def _slow(step: SlowStep) -> SlowStepView:
    return SlowStepView(
        at=step.at,
        step=step.step,
        epoch=step.epoch,
        rank=step.rank,
        seconds=step.seconds,
        phases=dict(step.phases),
        trace_id=step.trace_id,
    )


def _alert(entry: AlertEntry) -> AlertView:
    return AlertView(
        received_at=entry.received_at,
        alert=entry.name,
        run=entry.run,
        severity=entry.severity,
        status=entry.status,
        starts_at=entry.starts_at,
        decision=entry.decision,
        action=entry.action,
    )


def _command(entry: CommandEntry) -> CommandView:
    command, ack = entry.command, entry.ack or {}
    result = ack.get("result")
    return CommandView(
        id=command.id,
        run=command.run,
        action=command.action,
        args=dict(command.args),
        reason=command.reason,
        source=command.source,
        alert=entry.alert,
        received_at=entry.received_at,
        expires_at=command.expires_at,
        outcome=entry.outcome or "waiting",
        step=ack.get("step"),
        result=dict(result) if isinstance(result, Mapping) else None,
        error=ack.get("error"),
        settled_at=entry.settled_at,
    )


def _event(event: Event) -> EventView:
    return EventView(**{name: getattr(event, name) for name in EventView.model_fields})


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """`schema` with each reference replaced by what it means, so that it stands alone."""
    if isinstance(schema, dict):
        if (reference := schema.get("$ref")) is not None:
            return _inlined(definitions[str(reference).rpartition("/")[2]], definitions)
        return {key: _inlined(value, definitions) for key, value in schema.items()}
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    return schema
