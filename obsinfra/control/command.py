"""What crosses the control channel: commands in, acknowledgements out, as small JSON documents.

Everything that comes through a door is parsed here and nowhere else; nothing is trusted before.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NoReturn

from obsinfra.catalog.actions import ACTIONS, MAX_TEXT
from obsinfra.catalog.actions import shown as _shown
from obsinfra.errors import CommandError
from obsinfra.monitoring.tracing import parse_traceparent

VERSION = 1

MAX_COMMAND_BYTES = 64 * 1024
"""Of one command, on the socket, in the inbox and at the sidecar."""

MAX_LIFETIME_SECONDS = 86_400.0
"""From issue to expiry. Acknowledgements are kept for longer than this, so no replay takes effect."""

CLOCK_SKEW_SECONDS = 60.0
"""How far in the future a command may have been issued, between clocks that differ."""

AckState = Literal["accepted", "running", "done", "failed", "rejected", "expired"]
ACK_STATES: tuple[AckState, ...] = ("accepted", "running", "done", "failed", "rejected", "expired")
FINAL_STATES = frozenset({"done", "failed", "rejected", "expired"})

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,149}")
"""An id becomes a file name, so it has no slash and leaves room for a suffix."""


@dataclass(frozen=True, slots=True)
class Command:
    """One thing a run is told to do.

    Attributes:
        id: makes it take effect once, whichever doors it came through and however often.
        run: the run it is for.
        action: a name of `catalog.actions.ACTIONS`, once it was checked.
        args: argument name → JSON scalar.
        reason: why, for people.
        source: who asked: `cli`, `sidecar`, `in-process`, …
        issued_at, expires_at: epoch seconds; it is not executed after `expires_at`.
        traceparent: W3C trace context of who asked, so that what follows lands in the same trace.
    """

    id: str
    run: str
    action: str
    args: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    source: str = ""
    issued_at: float = 0.0
    expires_at: float = 0.0
    traceparent: str | None = None
    version: int = VERSION

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, slots=True)
class Ack:
    """How far a command has come.

    Attributes:
        id: the command's.
        state: `accepted`, `running`, or final: `done`, `failed`, `rejected`, `expired`.
        rank: who says so.
        step: global step at which it acted; for a host snapshot, the step that was saved.
        result: what the action returned, e.g. the checkpoint's path.
        error: why it failed or was refused.
        at: epoch seconds.
    """

    id: str
    state: AckState
    rank: int = 0
    step: int | None = None
    result: Mapping[str, Any] | None = None
    error: str | None = None
    at: float = 0.0

    @property
    def final(self) -> bool:
        """Whether no further ack follows."""
        return self.state in FINAL_STATES

    def to_json(self) -> str:
        """One line of JSON; ASCII, since the name of a file in a result need not be UTF-8."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)


class RefusedError(CommandError):
    """A command that can be answered by name, and is refused.

    Attributes:
        command: as far as it could be read.
        state: `rejected` or `expired`.
    """

    def __init__(self, command: Command, state: Literal["rejected", "expired"], why: str) -> None:
        self.command, self.state = command, state
        super().__init__(why)


def new_command(
    run: str,
    action: str,
    *,
    source: str,
    reason: str = "",
    args: Mapping[str, Any] | None = None,
    id: str | None = None,
    lifetime_seconds: float = 300.0,
    traceparent: str | None = None,
) -> Command:
    """A command issued now.

    Args:
        id: default: source, time and eight random hex digits.
        lifetime_seconds: until it expires; at most `MAX_LIFETIME_SECONDS`.
    """
    now = time.time()
    return Command(
        id=id or f"{source}-{int(now * 1000)}-{secrets.token_hex(4)}",
        run=run,
        action=action,
        args=dict(args or {}),
        reason=reason[:MAX_TEXT],
        source=source,
        issued_at=now,
        expires_at=now + min(lifetime_seconds, MAX_LIFETIME_SECONDS),
        traceparent=traceparent,
    )


def parse_command(raw: bytes, *, run: str, now: float) -> Command:
    """Read a command for `run` and check all of it.

    Raises:
        RefusedError: it has an id, but is for another run, unknown, malformed or expired.
        CommandError: it is no command at all.
    """
    document = _object(raw)
    try:  # half a surrogate pair or 1e999 would fail later, wherever the command is written down
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise CommandError(f"JSON that cannot be written again: {str(error)[:200]}") from None
    identity = document.get("id")
    if not isinstance(identity, str) or not ID_PATTERN.fullmatch(identity):
        raise CommandError(
            f"id {_shown(identity)}; expected 1 to 150 letters, digits, '.', '_', ':', '+' or '-'"
        )
    command = Command(
        id=identity,
        run=_text(document, "run"),
        action=_text(document, "action"),
        reason=_text(document, "reason"),
        source=_text(document, "source") or "unknown",
        issued_at=now,
        traceparent=_traceparent(document),
    )

    def refuse(why: str) -> NoReturn:
        raise RefusedError(command, "rejected", why)

    if document.get("version") != VERSION or isinstance(document.get("version"), bool):
        refuse(f"version {_shown(document.get('version'))}; expected {VERSION}")
    if unknown := sorted(set(document) - set(Command.__dataclass_fields__)):
        refuse(f"unknown field {_shown(unknown[0])}; expected {', '.join(Command.__dataclass_fields__)}")
    for name in ("run", "action"):
        if not isinstance(document.get(name), str):
            refuse(f"{name} {_shown(document.get(name))}; expected text")
    if command.run != run:
        refuse(f"run {_shown(command.run)}; expected {run!r}")
    if (action := ACTIONS.get(command.action)) is None:
        refuse(f"unknown action {_shown(command.action)}; expected one of {', '.join(ACTIONS)}")
    args = document.get("args", {})
    if not isinstance(args, dict):
        refuse(f"args {_shown(args)}; expected an object")
    if (problem := action.problem(args)) is not None:
        refuse(problem)
    issued, expires = (_moment(document.get(name)) for name in ("issued_at", "expires_at"))
    if issued is None or expires is None:
        refuse("issued_at and expires_at; expected seconds since the epoch")
    if issued > now + CLOCK_SKEW_SECONDS:
        refuse(f"issued {issued - now:.0f} s in the future; expected a clock that agrees with this one")
    if expires - issued > MAX_LIFETIME_SECONDS + 1:
        refuse(f"a lifetime of {expires - issued:.0f} s; expected at most {MAX_LIFETIME_SECONDS:.0f} s")
    whole = Command(
        id=command.id,
        run=command.run,
        action=command.action,
        args=args,
        reason=command.reason,
        source=command.source,
        issued_at=issued,
        expires_at=expires,
        traceparent=command.traceparent,
    )
    if expires <= now:
        raise RefusedError(whole, "expired", f"expired {now - expires:.0f} s ago")
    return whole


def parse_ack(raw: bytes) -> Ack:
    """Read an ack.

    Raises:
        CommandError: it is none.
    """
    document = _object(raw)
    try:
        ack = Ack(**{key: value for key, value in document.items() if key in Ack.__dataclass_fields__})
    except TypeError as error:
        raise CommandError(f"not an ack: {error}") from None
    if not isinstance(ack.id, str) or ack.state not in ACK_STATES:
        raise CommandError(f"not an ack: id {_shown(ack.id)}, state {_shown(ack.state)}")
    return ack


def bounded(ack: Ack) -> Ack:
    """`ack`, with a result and an error that fit into a line of JSON, whatever an action made of them."""
    result = ack.result
    try:
        fits = len(json.dumps(result, allow_nan=False)) <= MAX_COMMAND_BYTES // 2
    except (TypeError, ValueError, RecursionError):
        fits = False
    if not fits:
        result = {"unreadable": _shown(result)}
    return replace(ack, result=result, error=ack.error[:MAX_TEXT] if ack.error is not None else None)


def _object(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_COMMAND_BYTES:
        raise CommandError(f"{len(raw)} bytes; expected at most {MAX_COMMAND_BYTES}")
    try:
        document = json.loads(raw.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"not JSON: {str(error)[:200]}") from None
    if not isinstance(document, dict):
        raise CommandError(f"a JSON {type(document).__name__}; expected an object")
    return document


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _text(document: Mapping[str, Any], name: str) -> str:
    value = document.get(name)
    return value[:MAX_TEXT] if isinstance(value, str) else ""


def _traceparent(document: Mapping[str, Any]) -> str | None:
    value = document.get("traceparent")
    return value if isinstance(value, str) and parse_traceparent(value) is not None else None


def _moment(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        moment = float(value)
    except OverflowError:
        return None
    return moment if math.isfinite(moment) else None
