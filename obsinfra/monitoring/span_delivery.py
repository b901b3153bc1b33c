"""Where finished spans go: an OTLP collector over HTTP, and a file of JSON lines. Called by a SpanQueue.

OpenTelemetry encodes the requests; they are posted here instead of by its own OTLP exporter, because that
draws from Python's global random generator at every export and so would make training irreproducible.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.util.re import parse_env_headers

from obsinfra.monitoring.json_numbers import finite
from obsinfra.monitoring.rotating_file import RotatingFile

REQUEST_SECONDS = 5.0
RETRY_WAITS_SECONDS = (0.5, 1.0)
RETRYABLE = frozenset({429, 502, 503, 504})
"""Answers after which OTLP tells a client to try again."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")
FILE_MAX_BYTES = 32 * 2**20
FILE_BACKUPS = 3


class OtlpDelivery:
    """Posts batches of spans to a collector.

    Args:
        address: full address, ending in `/v1/traces`. `OTEL_EXPORTER_OTLP_HEADERS` and
            `OTEL_EXPORTER_OTLP_CERTIFICATE` (and their `_TRACES_` forms) are honoured.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._headers = {"Content-Type": "application/x-protobuf", "User-Agent": "obsinfra"}
        self._headers.update(parse_env_headers(_otlp_variable("HEADERS"), liberal=True))
        handlers: list[urllib.request.BaseHandler] = []
        if certificate := _otlp_variable("CERTIFICATE"):
            context = ssl.create_default_context(cafile=certificate)
            handlers.append(urllib.request.HTTPSHandler(context=context))
        if urlsplit(address).hostname in LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        self._ending = threading.Event()

    def __call__(self, spans: list[ReadableSpan]) -> int:
        """Post `spans`, again after a passing failure; returns how many the collector accepted.

        Raises:
            OSError: no answer, or an answer other than success (`urllib.error.HTTPError`).
            http.client.HTTPException: the answer was not HTTP.
        """
        body = encode_spans(spans).SerializeToString()
        for wait in (*RETRY_WAITS_SECONDS, None):
            try:
                return len(spans) - self._post(body)
            except (OSError, http.client.HTTPException) as error:
                status = error.code if isinstance(error, urllib.error.HTTPError) else None
                if wait is None or (status is not None and status not in RETRYABLE):
                    raise
                if self._ending.wait(wait):
                    raise
        raise AssertionError("the last attempt returns or raises")

    def end(self) -> None:
        """Do not wait for further attempts any more."""
        self._ending.set()

    def _post(self, body: bytes) -> int:
        """One attempt; returns how many spans the collector refused."""
        request = urllib.request.Request(self._address, body, self._headers, method="POST")
        with self._opener.open(request, timeout=REQUEST_SECONDS) as response:
            answer = response.read(65_536)
        try:
            return int(ExportTraceServiceResponse.FromString(answer).partial_success.rejected_spans)
        except DecodeError:
            return 0  # a success whose body is not protobuf (some gateways answer JSON) is still a success


class FileDelivery:
    """Appends spans to a file, one JSON document a line, rotated by size.

    Args:
        path: the file; its folder is made when missing.
        identity: put into every line (run, model, rank, pid), so that a line can be read alone.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        *,
        max_bytes: int = FILE_MAX_BYTES,
        backups: int = FILE_BACKUPS,
    ) -> None:
        self._file = RotatingFile(path, max_bytes=max_bytes, backups=backups)
        self._identity = dict(identity)

    def __call__(self, spans: list[ReadableSpan]) -> int:
        """Write `spans` in one go; returns how many.

        Raises:
            OSError: the file cannot be written.
        """
        lines = [json.dumps(self._document(span), allow_nan=False, default=str) for span in spans]
        self._file.path.parent.mkdir(parents=True, exist_ok=True)
        self._file.append("\n".join(lines).encode())
        return len(spans)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _document(self, span: ReadableSpan) -> dict[str, Any]:
        context = span.context
        assert context is not None
        return {
            "name": span.name,
            "trace_id": f"{context.trace_id:032x}",
            "span_id": f"{context.span_id:016x}",
            "parent_id": f"{span.parent.span_id:016x}" if span.parent is not None else None,
            "start_ns": span.start_time,
            "end_ns": span.end_time,
            "status": span.status.status_code.name.lower(),
            "attributes": {key: finite(value) for key, value in (span.attributes or {}).items()},
            "links": [
                {"trace_id": f"{link.context.trace_id:032x}", "span_id": f"{link.context.span_id:016x}"}
                for link in span.links
            ],
            **self._identity,
        }


def _otlp_variable(name: str) -> str:
    return os.environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or os.environ.get(
        f"OTEL_EXPORTER_OTLP_{name}", ""
    )
