"""The tracer that makes OpenTelemetry spans and queues them for a collector and a file.

Created by `tracing.create_tracer` alone, which keeps OpenTelemetry's import out of everybody else's start.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.span_delivery import FileDelivery, OtlpDelivery
from obsinfra.monitoring.span_queue import SpanQueue
from obsinfra.monitoring.tracing import Phase, StepReason, format_traceparent, parse_traceparent

SPAN_KIND = "obsinfra.span"
"""Attribute naming what a span is: run, epoch, step, phase, checkpoint, command, …"""

REMEMBERED_EPOCHS = 16
"""A step is reported up to a housekeeping interval late, when its epoch may have ended already."""


class _SystemRandomIds(IdGenerator):
    """Ids from the system's generator: the SDK's own draws from `random`, whose state training restores."""

    def generate_span_id(self) -> int:
        return secrets.randbits(64) or 1

    def generate_trace_id(self) -> int:
        return secrets.randbits(128) or 1

    def is_trace_id_random(self) -> bool:
        return True


class _Fan(SpanProcessor):
    """Puts every ended span into every queue."""

    def __init__(self, queues: Sequence[SpanQueue[ReadableSpan]]) -> None:
        self._queues = queues

    def on_end(self, span: ReadableSpan) -> None:
        for queue in self._queues:
            queue.put(span)


class OtelTracer:
    """See `tracing.Tracer` for the methods and `tracing.create_tracer` for the arguments.

    Args:
        address: the collector's `/v1/traces`, or None.
        trace_file: this rank's span file, or None.
    """

    def __init__(
        self,
        *,
        run_id: str,
        model: str,
        rank: int,
        world_size: int,
        address: str | None,
        trace_file: Path | None,
    ) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._created = 0
        self._closed = False
        self._run: Span | None = None
        self._epoch: Span | None = None
        self._epochs: OrderedDict[int, SpanContext] = OrderedDict()
        self._warned: set[str] = set()
        self._otlp = OtlpDelivery(address) if address is not None else None
        self._file: FileDelivery | None = None
        self._collector_queue: SpanQueue[ReadableSpan] | None = None
        self._queues: list[SpanQueue[ReadableSpan]] = []
        if self._otlp is not None:
            self._collector_queue = SpanQueue(
                "obsinfra-otlp", self._otlp, lambda error: self._failed(str(address), error)
            )
            self._queues.append(self._collector_queue)
        if trace_file is not None:
            identity = {"run": run_id, "model": model, "rank": rank, "pid": self._pid}
            self._file = FileDelivery(trace_file, identity)
            self._queues.append(
                SpanQueue(
                    "obsinfra-spans",
                    self._file,
                    lambda error: self._failed(str(trace_file), error),
                    linger_seconds=0.2,
                )
            )
        resource = Resource.create(
            {
                "service.name": "obsinfra",
                "service.version": version("obsinfra"),
                "service.instance.id": f"{run_id}/{rank}",
                "host.name": socket.gethostname(),
                "process.pid": self._pid,
                "obsinfra.run": run_id,
                "obsinfra.model": model,
                "obsinfra.rank": rank,
                "obsinfra.world_size": world_size,
            }
        )
        # Which steps are traced was decided before they come here, so everything is sampled.
        provider = TracerProvider(
            sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False, id_generator=_SystemRandomIds()
        )
        provider.add_span_processor(_Fan(self._queues))
        self._tracer = provider.get_tracer("obsinfra", version("obsinfra"))

    @property
    def created(self) -> int:
        return self._created

    @property
    def exported(self) -> int:
        return self._collector_queue.delivered if self._collector_queue is not None else 0

    @property
    def dropped(self) -> int:
        return sum(queue.dropped for queue in self._queues)

    @property
    def errors(self) -> int:
        return sum(queue.errors for queue in self._queues)

    def start_run(self, start_ns: int, attributes: Mapping[str, Any] | None = None) -> str:
        if self._useless():
            return ""
        with self._lock:
            if self._run is None:
                self._run = self._start("run", "run", None, start_ns, attributes)
            return _traceparent(self._run.get_span_context())

    def start_epoch(self, epoch: int, start_ns: int) -> None:
        if self._useless():
            return
        with self._lock:
            self.end_epoch(start_ns)
            self._epoch = self._start(
                f"epoch {epoch}", "epoch", self._run_context(), start_ns, {"obsinfra.epoch": epoch}
            )
            self._epochs[epoch] = self._epoch.get_span_context()
            while len(self._epochs) > REMEMBERED_EPOCHS:
                self._epochs.popitem(last=False)

    def end_epoch(self, end_ns: int) -> None:
        if self._useless():
            return
        with self._lock:
            if self._epoch is not None:
                self._epoch.end(end_ns)
                self._epoch = None

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
        if self._useless():
            return ""
        with self._lock:
            parent = self._epochs.get(epoch) or self._run_context()
        own = {"obsinfra.step": step, "obsinfra.epoch": epoch, "obsinfra.reason": reason}
        span = self._start(f"step {step}", "step", parent, start_ns, {**(attributes or {}), **own})
        if reason == "nonfinite":
            span.set_status(Status(StatusCode.ERROR, "loss is not finite"))
        context = span.get_span_context()
        for name, phase_start, phase_end in phases:
            self._start(name, "phase", context, phase_start, None).end(max(phase_start, phase_end))
        span.end(max(start_ns, end_ns))
        return f"{context.trace_id:032x}"

    def emit(
        self,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, Any] | None = None,
        parent_traceparent: str | None = None,
    ) -> str:
        if self._useless():
            return parent_traceparent or ""
        parent = self._run_context()
        links: list[Link] = []
        if (told := parse_traceparent(parent_traceparent)) is not None:
            if parent is not None:
                links = [Link(parent, {"obsinfra.link": "run"})]
            flags = TraceFlags(TraceFlags.SAMPLED if told.sampled else TraceFlags.DEFAULT)
            parent = SpanContext(
                int(told.trace_id, 16), int(told.span_id, 16), is_remote=True, trace_flags=flags
            )
        span = self._start(name, name.split(" ", 1)[0], parent, start_ns, attributes, links)
        span.end(max(start_ns, end_ns))
        return _traceparent(span.get_span_context())

    def close(self, timeout: float) -> None:
        if self._useless():
            return
        deadline = time.monotonic() + timeout
        now = time.time_ns()
        with self._lock:
            self.end_epoch(now)
            if self._run is not None:
                self._run.end(now)
            self._closed = True
        for queue in self._queues:
            queue.begin_close()
        if self._otlp is not None:
            self._otlp.end()
        ended = [queue.close(deadline) for queue in self._queues]
        if self._file is not None and all(ended):
            self._file.close()

    def _useless(self) -> bool:
        """Closed, or in a forked child, which has no threads and shares the parent's file."""
        return self._closed or os.getpid() != self._pid

    def _run_context(self) -> SpanContext | None:
        return self._run.get_span_context() if self._run is not None else None

    def _start(
        self,
        name: str,
        kind: str,
        parent: SpanContext | None,
        start_ns: int,
        attributes: Mapping[str, Any] | None,
        links: Sequence[Link] = (),
    ) -> Span:
        # An own context each time: a span that is current in the user's program is none of ours.
        context = Context()
        if parent is not None:
            context = set_span_in_context(NonRecordingSpan(parent), context)
        with self._lock:
            self._created += 1
        return self._tracer.start_span(
            name,
            context=context,
            attributes={SPAN_KIND: kind, **_attributes(attributes)},
            links=links,
            start_time=start_ns,
        )

    def _failed(self, receiver: str, error: Exception) -> None:
        if receiver not in self._warned:
            self._warned.add(receiver)
            get_logger("system").warning(
                "spans_not_delivered",
                receiver=receiver,
                error=str(error) or repr(error),
                note="counted from now on in obsinfra_telemetry_dropped_total, not logged again",
            )


def _attributes(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """What OpenTelemetry accepts: absent values left out, other objects as text."""
    return {
        key: value if isinstance(value, str | bool | int | float | list | tuple) else str(value)
        for key, value in (values or {}).items()
        if value is not None
    }


def _traceparent(context: SpanContext) -> str:
    return format_traceparent(f"{context.trace_id:032x}", f"{context.span_id:016x}")
