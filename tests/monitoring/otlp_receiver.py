"""An OTLP/HTTP collector for tests: decodes what it is sent, or fails in a chosen way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> None:
    """Poll until `condition` is true; fail naming `what` otherwise."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        threading.Event().wait(0.01)


def plain(attributes: Any) -> dict[str, Any]:
    """OTLP key-values as a dictionary."""
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in attributes}


@dataclass
class Received:
    """One span as it came over the wire, ids in hex."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    links: list[tuple[str, str]]
    status: int
    resource: dict[str, Any]


@dataclass
class Receiver:
    """Listens on a free loopback port.

    Attributes:
        status: what every request is answered; 0 never answers.
        rejected: how many spans of a request a success claims to have refused.
    """

    status: int = 200
    rejected: int = 0
    spans: list[Received] = field(default_factory=list)
    requests: list[dict[str, str]] = field(default_factory=list)

    def __enter__(self) -> Receiver:
        receiver = self
        self._release = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.requests.append({"path": self.path, **dict(self.headers)})
                if receiver.status == 0:
                    receiver._release.wait()
                    self.close_connection = True
                    return
                if receiver.status == 200:
                    receiver._keep(ExportTraceServiceRequest.FromString(body))
                answer = ExportTraceServiceResponse()
                answer.partial_success.rejected_spans = receiver.rejected
                self.send_response(receiver.status)
                self.end_headers()
                self.wfile.write(answer.SerializeToString())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def named(self, name: str) -> Received:
        """The one span called `name`."""
        (found,) = [span for span in self.spans if span.name == name]
        return found

    def _keep(self, request: ExportTraceServiceRequest) -> None:
        for resource_spans in request.resource_spans:
            resource = plain(resource_spans.resource.attributes)
            for scope_spans in resource_spans.scope_spans:
                for span in scope_spans.spans:
                    self.spans.append(
                        Received(
                            span.name,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            plain(span.attributes),
                            [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
                            span.status.code,
                            resource,
                        )
                    )
