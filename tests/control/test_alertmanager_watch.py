"""The watch over Alertmanager: no heartbeat while what Prometheus fires would reach nobody."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from waiting import wait_for

from obsinfra.control.alertmanager_watch import AlertmanagerWatch


class Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == "/-/ready" else 404)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    status = 200


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Ready) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_it_answers_falls_silent_and_comes_back(server: Server) -> None:
    watch = AlertmanagerWatch(f"http://127.0.0.1:{server.server_port}", silent_seconds=5.0)
    watch.start()
    try:
        assert watch.answers
        server.status = 503
        wait_for(lambda: not watch.answers, "it is not ready for longer than it may be silent")
        server.status = 200
        wait_for(lambda: watch.answers, "it is back")
    finally:
        watch.stop()
    assert "obsinfra-alertmanager-watch" not in {thread.name for thread in threading.enumerate()}


def test_one_that_was_never_there_has_a_while_from_the_start(server: Server) -> None:
    server.status = 404
    watch = AlertmanagerWatch(f"http://127.0.0.1:{server.server_port}", silent_seconds=3.0)
    watch.start()
    try:
        assert watch.answers
        wait_for(lambda: not watch.answers, "silent too long")
    finally:
        watch.stop()
