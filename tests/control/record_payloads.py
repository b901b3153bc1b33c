"""Records webhook calls of a real Alertmanager for `test_payloads.py`.

    python tests/control/record_payloads.py /path/to/alertmanager tests/control/payloads

Sends alerts to its API as Prometheus does, takes what it posts, and writes one file a scene. Used by hand,
when a new version of Alertmanager comes out.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CONFIGURATION = """
route:
  receiver: sidecar
  group_by: [alertname, run]
  group_wait: 0s
  group_interval: 1s
  repeat_interval: 1h
receivers:
  - name: sidecar
    webhook_configs:
      - url: http://127.0.0.1:{port}/webhook
        send_resolved: true
        max_alerts: 5
        http_config:
          authorization: {{credentials: a-token}}
"""

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
Labels = dict[str, str]


def labels(alertname: str, **more: str) -> Labels:
    return {
        "alertname": alertname,
        "run": "r1",
        "model": "digits",
        "rank": "0",
        "severity": "critical",
        **more,
    }


SCENES: dict[str, list[tuple[Labels, Labels]]] = {
    "one": [
        (
            labels("GradientExplosion", scope="run", action="emergency_checkpoint"),
            {"summary": "Gradient norm above 100", "runbook_url": "https://example.org/GradientExplosion.md"},
        )
    ],
    "devices": [
        (
            labels("HighGPUTemperature", scope="device", action="emergency_checkpoint", device=str(device)),
            {"summary": f"GPU {device} hotter than 85 °C"},
        )
        for device in range(3)
    ],
    "host": [
        (
            {"alertname": "HostDown", "severity": "critical", "scope": "host", "action": "checkpoint"},
            {"summary": "no answer"},
        )
    ],
    "informs": [({"alertname": "Watchdog", "severity": "info"}, {})],
    "odd-texts": [
        (
            labels("Odd", scope="run", action="checkpoint", note='quotes " and \\ and \t and ünïcödé 🔥'),
            {"summary": "two\nlines <b>&amp;</b>", "description": "x" * 2_000},
        )
    ],
    "truncated": [
        (labels("Many", scope="rank", action="checkpoint", worker=str(worker)), {"summary": "slow"})
        for worker in range(8)
    ],
}


class Recorder:
    """What Alertmanager posted, in order."""

    def __init__(self) -> None:
        self.calls: queue.Queue[bytes] = queue.Queue()
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                recorder.calls.put(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def last_of(self, alerts: int) -> bytes:
        """The newest call, once one speaks of so many alerts (or as many as it may)."""
        while True:
            raw = self.calls.get(timeout=30)
            if len(json.loads(raw)["alerts"]) >= min(alerts, 5):
                return raw


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def alertmanager(binary: str, receiver: int) -> Iterator[str]:
    """A running Alertmanager in a time zone that is not UTC; yields its address."""
    with tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder) / "alertmanager.yml"
        configuration.write_text(CONFIGURATION.format(port=receiver))
        port = free_port()
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={configuration}",
                f"--storage.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
                "--web.external-url=http://alertmanager.example:9093",
                "--cluster.listen-address=",
                "--log.level=error",
            ],
            env=os.environ | {"TZ": "Asia/Kolkata"},
        )
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(200):
                with contextlib.suppress(OSError):
                    _direct.open(f"{url}/-/ready", timeout=2)
                    break
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait()


def send(url: str, alerts: list[tuple[Labels, Labels]], *, ended: bool) -> None:
    now = datetime.now(UTC)
    document = [
        {
            "labels": names,
            "annotations": texts,
            "startsAt": (now - timedelta(seconds=30)).isoformat(),
            "endsAt": (now + (timedelta(seconds=-1) if ended else timedelta(minutes=5))).isoformat(),
            "generatorURL": "http://prometheus.example:9090/graph?g0.expr=x%3E1&g0.tab=1",
        }
        for names, texts in alerts
    ]
    request = urllib.request.Request(
        f"{url}/api/v2/alerts", json.dumps(document).encode(), {"Content-Type": "application/json"}
    )
    _direct.open(request, timeout=10)


def main(binary: str, target: Path) -> None:
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"version (\d+\.\d+)", said.stdout + said.stderr)
    assert found is not None
    for name, alerts in SCENES.items():
        recorder = Recorder()
        with alertmanager(binary, recorder.server.server_port) as url:
            for ended in (False, True):
                send(url, alerts, ended=ended)
                wanted = "resolved" if ended else "firing"
                while True:
                    raw = recorder.last_of(len(alerts))
                    if json.loads(raw)["status"] == wanted:
                        break
                path = target / f"alertmanager-{found[1]}-{name}-{wanted}.json"
                path.write_bytes(raw)
                print(path)
        recorder.server.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
