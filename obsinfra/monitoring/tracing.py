"""The tracer's face: what a monitor asks for, its null object, choosing receivers, W3C traceparent.

OpenTelemetry is imported only when a tracer that has somewhere to send spans is created. Spans are made
after the fact from recorded timestamps, so nothing here is on the step path.
"""

from __future__ import annotations

import http.client
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from obsinfra.errors import ConfigError
from obsinfra.run.files import of_rank

StepReason = Literal["sampled", "slow", "nonfinite"]
"""Why a step was traced."""

Phase = tuple[str, int, int]
"""Name, start and end of a phase, in nanoseconds since the epoch."""

DEFAULT_COLLECTOR = "http://127.0.0.1:4318"
"""Where an OpenTelemetry collector listens for OTLP over HTTP by default."""

PROBE_SECONDS = 0.25

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True, slots=True)
class TraceParent:
    """A place in somebody's trace: the W3C header `traceparent` (https://www.w3.org/TR/trace-context/).

    Attributes:
        trace_id: 32 lower-case hex digits, not all zero.
        span_id: 16 lower-case hex digits, not all zero.
        sampled: whether the caller records this trace.
    """

    trace_id: str
    span_id: str
    sampled: bool = True


def parse_traceparent(text: str | None) -> TraceParent | None:
    """Read a `traceparent`; None when it is none. Versions above 00 are read by their first four fields."""
    match = _TRACEPARENT.fullmatch(text or "")
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest) or not trace_id.strip("0") or not span_id.strip("0"):
        return None
    return TraceParent(trace_id, span_id, bool(int(flags, 16) & 1))


def trace_id_of(traceparent: str | None) -> str | None:
    """The trace a `traceparent` names, as 32 hex digits; None when it is none."""
    parsed = parse_traceparent(traceparent)
    return parsed.trace_id if parsed is not None else None


def format_traceparent(trace_id: str, span_id: str, *, sampled: bool = True) -> str:
    """Write a `traceparent` of version 00.

    Raises:
        ValueError: an id is not 32 or 16 lower-case hex digits, or all zero.
    """
    text = f"00-{trace_id}-{span_id}-{'01' if sampled else '00'}"
    if parse_traceparent(text) is None:
        raise ValueError(f"trace id {trace_id!r} and span id {span_id!r}: expected 32 and 16 hex digits")
    return text


class Tracer(Protocol):
    """Makes the spans of one rank: run → epoch → step → phases, and checkpoints and commands beside them.

    Times are nanoseconds since the epoch. Every method may be called from any thread and never waits for a
    receiver, `close` excepted.
    """

    @property
    def created(self) -> int:
        """Spans made so far."""
        ...

    @property
    def exported(self) -> int:
        """Spans a collector accepted."""
        ...

    @property
    def dropped(self) -> int:
        """Spans that a receiver (collector or file) lost: its queue was full, or delivery failed."""
        ...

    @property
    def errors(self) -> int:
        """Failed deliveries to the collector or the file."""
        ...

    def start_run(self, start_ns: int, attributes: Mapping[str, Any] | None = None) -> str:
        """Open the run's span; returns its traceparent."""
        ...

    def start_epoch(self, epoch: int, start_ns: int) -> None:
        """Open an epoch's span; one still open ends here."""
        ...

    def end_epoch(self, end_ns: int) -> None:
        """End the open epoch's span, if any."""
        ...

    def emit_step(
        self,
        step: int,
        epoch: int,
        start_ns: int,
        end_ns: int,
        phases: Sequence[Phase],
        attributes: Mapping[str, Any] | None = None,
        *,
        reason: StepReason = "sampled",
    ) -> str:
        """Make the span of a finished step, with its phases as children; returns the trace id in hex."""
        ...

    def emit(
        self,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, Any] | None = None,
        parent_traceparent: str | None = None,
    ) -> str:
        """Make a finished span, child of `parent_traceparent` (with a link to the run) or of the run.

        Returns:
            Its own traceparent, for what it causes.
        """
        ...

    def close(self, timeout: float) -> None:
        """End open spans and deliver what waits, for at most `timeout` seconds. May be called twice."""
        ...


class NullTracer:
    """Traces nothing; a traceparent passes through it unchanged."""

    created = exported = dropped = errors = 0

    def start_run(self, start_ns: int, attributes: Mapping[str, Any] | None = None) -> str:
        return ""

    def start_epoch(self, epoch: int, start_ns: int) -> None:
        pass

    def end_epoch(self, end_ns: int) -> None:
        pass

    def emit_step(
        self,
        step: int,
        epoch: int,
        start_ns: int,
        end_ns: int,
        phases: Sequence[Phase],
        attributes: Mapping[str, Any] | None = None,
        *,
        reason: StepReason = "sampled",
    ) -> str:
        return ""

    def emit(
        self,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, Any] | None = None,
        parent_traceparent: str | None = None,
    ) -> str:
        return parent_traceparent or ""

    def close(self, timeout: float) -> None:
        pass


_NULL = NullTracer()


def null_tracer() -> Tracer:
    """The tracer that does nothing."""
    return _NULL


def create_tracer(
    *,
    run_id: str,
    model: str,
    rank: int = 0,
    world_size: int = 1,
    endpoint: str | None = None,
    trace_file: Path | None = None,
    probe: bool = False,
) -> Tracer:
    """A tracer for one rank of a run; the null tracer when its spans would go nowhere.

    Args:
        run_id, model, rank, world_size: who traces; become resource attributes.
        endpoint: OTLP/HTTP collector, e.g. `http://127.0.0.1:4318` (`/v1/traces` is added). None takes
            `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` or `OTEL_EXPORTER_OTLP_ENDPOINT`.
        trace_file: where spans are kept as JSON lines too; ranks above 0 write `NAME-rankN.jsonl` beside.
        probe: without any endpoint, use the collector at 127.0.0.1:4318 if one answers there.

    Raises:
        ConfigError: the endpoint is no http(s) address.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return _NULL
    address = _traces_address(endpoint)
    if address is None and probe and collector_answers(DEFAULT_COLLECTOR):
        address = f"{DEFAULT_COLLECTOR}/v1/traces"
    if trace_file is not None:
        trace_file = of_rank(trace_file, rank)
    if address is None and trace_file is None:
        return _NULL
    from obsinfra.monitoring.otel_tracer import OtelTracer  # imports OpenTelemetry: a tenth of a second

    return OtelTracer(
        run_id=run_id,
        model=model,
        rank=rank,
        world_size=world_size,
        address=address,
        trace_file=trace_file,
    )


def collector_answers(endpoint: str, seconds: float = PROBE_SECONDS) -> bool:
    """Whether an OTLP/HTTP collector accepts an empty export at `endpoint`, within about `seconds`."""
    url = urlsplit(endpoint)
    connection = http.client.HTTPConnection(url.hostname or "", url.port or 80, timeout=seconds)
    try:
        # No bytes are a valid protobuf ExportTraceServiceRequest without spans.
        connection.request("POST", "/v1/traces", b"", {"Content-Type": "application/x-protobuf"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _traces_address(endpoint: str | None) -> str | None:
    """Full address of the collector's trace door, from the argument or OpenTelemetry's own variables."""
    source, base, exact = "otlp_endpoint", endpoint or "", False
    if not base:
        source = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
        base, exact = os.environ.get(source, "").strip(), True
    if not base:
        source = "OTEL_EXPORTER_OTLP_ENDPOINT"
        base, exact = os.environ.get(source, "").strip(), False
    if not base:
        return None
    try:
        url = urlsplit(base)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            f"{source} {base!r}",
            "the http(s) address of an OTLP collector, e.g. http://127.0.0.1:4318",
            "correct it, or leave it out",
        )
    if exact or base.rstrip("/").endswith("/v1/traces"):
        return base
    return base.rstrip("/") + "/v1/traces"
