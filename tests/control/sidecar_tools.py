"""Alertmanager's side of the sidecar: notifications as it sends them, and the sidecar as a real process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from waiting import wait_for

TOKEN = "a-token-of-more-than-16-characters"

Json = dict[str, Any]


def ago(**difference: float) -> str:
    """A moment as Alertmanager writes it."""
    return (datetime.now(UTC) - timedelta(**difference)).isoformat().replace("+00:00", "123Z")


def alert(
    run: str | None = "r1", action: str | None = "emergency_checkpoint", status: str = "firing", **more: Any
) -> Json:
    """One alert; `more` overrides its fields."""
    labels = {"alertname": "GradientExplosion", "model": "digits", "rank": "0", "severity": "critical"}
    labels |= {name: value for name, value in (("run", run), ("action", action)) if value is not None}
    return {
        "status": status,
        "labels": labels,
        "annotations": {"summary": "gradient norm 1e9", "runbook_url": "https://example.org/runbook"},
        "startsAt": ago(seconds=2),
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus:9090/graph?g0.expr=x",
        "fingerprint": "c3a1f0d2b4e59687",
        **more,
    }


def notification(*alerts: Json, **more: Any) -> Json:
    """A webhook call of Alertmanager 0.28 with all its fields; `more` overrides them."""
    return {
        "receiver": "sidecar",
        "status": "firing",
        "alerts": list(alerts),
        "groupLabels": {"alertname": "GradientExplosion", "run": "r1"},
        "commonLabels": {"alertname": "GradientExplosion"},
        "commonAnnotations": {},
        "externalURL": "http://alertmanager:9093",
        "version": "4",
        "groupKey": '{}/{action!=""}:{alertname="GradientExplosion", run="r1"}',
        "truncatedAlerts": 0,
        **more,
    }


def counted(text: str, name: str, **labels: str) -> float:
    """The value of one sample of a Prometheus exposition; 0 where there is none."""
    for line in text.splitlines():
        if line.startswith(name + "{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


class SidecarProcess:
    """`python -m obsinfra.control.sidecar` on a free port, with its token and its HTTP client."""

    def __init__(self, output_dir: Path, *more: str) -> None:
        self.state_dir = output_dir / ".stack" / "sidecar"
        self.token_file = output_dir / ".stack" / "token"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = output_dir / ".sidecar.log"
        self.arguments = [
            sys.executable,
            "-m",
            "obsinfra.control.sidecar",
            f"--output-dir={output_dir}",
            f"--token-file={self.token_file}",
            f"--state-dir={self.state_dir}",
            f"--port={self.port}",
            *more,
        ]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=20, trust_env=False)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.arguments, stdout=log, stderr=log, env=os.environ | {"OTEL_SDK_DISABLED": "false"}
            )
        wait_for(self.answers, f"the sidecar answers\n{self.log.read_text()}")
        self.client.headers["authorization"] = f"Bearer {self.token_file.read_text().strip()}"

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(httpx.HTTPError):
            return self.client.get("/healthz").status_code == 200
        return False

    def post(self, *alerts: Json) -> Json:
        """Send a notification; the decisions by number."""
        answer = self.client.post("/webhook", json=notification(*alerts))
        assert answer.status_code == 200, answer.text
        decisions: Json = answer.json()
        return decisions

    def end(self, by: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(by)
        return self.process.wait(20)


@contextlib.contextmanager
def sidecar(output_dir: Path, *more: str) -> Iterator[SidecarProcess]:
    """A started sidecar, ended whatever happened."""
    made = SidecarProcess(output_dir, *more)
    try:
        made.start()
        yield made
    finally:
        made.client.close()
        if made.process is not None and made.process.poll() is None:
            made.end(signal.SIGKILL)
