"""The trainer's HTTP face: `/metrics` (text and OpenMetrics), the live page at `/`, `/api/live`, `/healthz`.

Knows HTTP and two things to serve, `exposition` and a document for the page; nothing of training.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from obsinfra.errors import ConfigError
from obsinfra.monitoring.exposition import SampleCollector
from obsinfra.monitoring.page import CONTENT_SECURITY_POLICY, asset

WHOLE_ANSWER_BYTES = 256 << 10
"""An answer up to this size is one write; ten times that of a full trainer."""

SILENT_SECONDS = 30
"""A connection on which nothing comes or goes for so long is closed."""


class _Received(io.RawIOBase):
    """What comes in on a connection for which the kernel keeps the time; too late is a `TimeoutError`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._connection.recv_into(buffer)
        except BlockingIOError:
            raise TimeoutError("nothing came for too long") from None


class _Server(ThreadingHTTPServer):
    """Knows its open connections, which live as long as a scraper keeps them."""

    daemon_threads = True

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.connections: set[socket.socket] = set()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        # Without HTTPServer's reverse look-up of the host name, which can hang without a network.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def close_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().close_request(request)

    def end_connections(self) -> None:
        """Let each handler thread see the end of its input."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class MetricsServer:
    """One HTTP server on one daemon thread; forked children lose its socket.

    Args:
        collector: what `/metrics` shows.
        live: returns the document of `/api/live` for a `since` number.
        host, port: where to listen; a taken port gives way to the next free one (200 are tried), 0 to any.
        on_error: called with an exception when building a response failed.

    Raises:
        ConfigError: the host cannot be bound, or no port is free.
    """

    def __init__(
        self,
        collector: SampleCollector,
        live: Callable[[int], Mapping[str, Any]],
        *,
        host: str,
        port: int,
        on_error: Callable[[Exception], None],
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            server_version = "obsinfra"
            # Each system call lets go of the interpreter's lock, and a busy loop gives it back 5 ms later. So
            # an answer is one write, and the kernel keeps the time: with a timeout of Python's own every call
            # would be two.
            wbufsize = WHOLE_ANSWER_BYTES

            def setup(self) -> None:
                for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                    self.request.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", SILENT_SECONDS, 0))
                super().setup()
                self.rfile = io.BufferedReader(_Received(self.request))

            def do_GET(self) -> None:
                try:
                    url = urlsplit(self.path)
                except ValueError:
                    return self._answer(400, b"bad request\n", "text/plain")
                path = url.path
                try:
                    if path == "/metrics":
                        self._answer(200, *collector.exposition(self.headers.get("Accept") or ""))
                    elif path == "/api/live":
                        text = parse_qs(url.query).get("since", ["0"])[0]
                        since = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0
                        body = json.dumps(live(since), allow_nan=False).encode()
                        self._answer(200, body, "application/json")
                    elif path == "/healthz":
                        self._answer(200, b"ok\n", "text/plain")
                    elif (found := asset("index.html" if path == "/" else path[1:])) is not None:
                        self._answer(200, *found)
                    else:
                        self._answer(404, b"not found: try /, /metrics or /api/live\n", "text/plain")
                except (BrokenPipeError, ConnectionResetError, TimeoutError, BlockingIOError):
                    self.close_connection = True
                except Exception as error:
                    on_error(error)
                    self._answer(500, b"the response could not be built; see the log\n", "text/plain")

            def _answer(self, status: int, body: bytes, content_type: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.send_header("X-Content-Type-Options", "nosniff")
                self.send_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = self._bind(Handler, host, port)
        self.port = self._server.server_port
        # The address that a name meant when it was bound: others may not resolve it, or differently.
        bound = str(self._server.server_address[0])
        shown = "127.0.0.1" if bound in ("0.0.0.0", "::") else bound
        self.url = f"http://{f'[{shown}]' if ':' in shown else shown}:{self.port}"
        _servers.append(self._server)
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.2},
            name="obsinfra-metrics",
            daemon=True,
        )
        self._thread.start()

    @staticmethod
    def _bind(handler: type[BaseHTTPRequestHandler], host: str, port: int) -> _Server:
        last = port if port == 0 else min(port + 200, 65_535)
        for candidate in range(port, last + 1):
            try:
                return _Server(host, candidate, handler)
            except (OSError, UnicodeError, OverflowError) as error:
                if getattr(error, "errno", None) != errno.EADDRINUSE:
                    raise ConfigError(
                        f"cannot listen on {host}:{candidate}: {getattr(error, 'strerror', None) or error}",
                        "an address of this machine and a port this user may open",
                        "correct --metrics-host or --metrics-port",
                    ) from error
        raise ConfigError(f"no free port in {port}–{last} on {host}", "one free port", "set --metrics-port")

    def stop(self) -> None:
        """Stop listening and end the thread. Answers under way are finished, idle connections closed."""
        self._server.shutdown()
        self._server.server_close()
        self._server.end_connections()
        self._thread.join(timeout=5)
        if self._server in _servers:
            _servers.remove(self._server)


_servers: list[_Server] = []


def _close_in_child() -> None:
    """A forked child (a data-loader worker) must not hold the port: close its copy of the sockets."""
    for server in _servers:
        for held in (server.socket, *server.connections):
            if held.fileno() >= 0:
                os.close(held.detach())
    _servers.clear()


os.register_at_fork(after_in_child=_close_in_child)
