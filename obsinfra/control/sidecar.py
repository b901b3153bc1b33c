"""The sidecar: Alertmanager's webhook in, commands to the runs out, and where Prometheus finds the runs.

One process per host (`obsinfra sidecar`, or `python -m obsinfra.control.sidecar`). A bearer token guards what
changes anything; it answers 2xx only after the commands are in its durable journal.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import secrets
import socket
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from pydantic import ValidationError

from obsinfra.catalog import metrics as catalog
from obsinfra.catalog.actions import ACTIONS
from obsinfra.control.command import Ack
from obsinfra.control.delivery import Deliverer
from obsinfra.control.idle_connections import PatientForAWhile
from obsinfra.control.journal import AlertEntry, CommandEntry, Journal
from obsinfra.control.run_watch import RunWatch
from obsinfra.control.webhook import STALE_SECONDS, Webhook, WebhookAlert, age_seconds, command_for
from obsinfra.errors import ConfigError, ObsinfraError
from obsinfra.monitoring.exporter import SampleCollector
from obsinfra.monitoring.instruments import Instruments
from obsinfra.monitoring.logging_config import configure_logging, get_logger
from obsinfra.monitoring.tracing import Tracer, create_tracer
from obsinfra.run.files import write_atomic

MAX_BODY_BYTES = 1 << 20
BODY_SECONDS = 10.0
"""A body that takes longer to arrive is refused."""

MAX_CONNECTIONS = 64
UNUSABLE_DECISIONS = ("no_run", "unknown_run", "run_ended", "unknown_action", "expired")
"""An action was asked for that cannot be done; worth a warning."""

ALERT_DECISIONS = ("accepted", "duplicate", "informed", "resolved", "dry_run", *UNUSABLE_DECISIONS)
"""What becomes of an alert in a webhook."""


@dataclass(frozen=True, slots=True)
class SidecarSettings:
    """How one sidecar runs.

    Attributes:
        output_dir: the folder of runs.
        host, port: where to listen; port 0 takes any.
        token_file: the bearer token, 0600; made when missing.
        state_dir: journal, logs and traces; made when missing, 0700.
        dry_run: journal what would be done, do nothing.
    """

    output_dir: Path
    token_file: Path
    state_dir: Path
    host: str = "127.0.0.1"
    port: int = 9465
    dry_run: bool = False


class Sidecar:
    """Journal, deliveries and the watch over runs, without the HTTP in front.

    Args:
        settings: how it runs.

    Raises:
        ConfigError: the state folder or the journal cannot be used.
    """

    def __init__(self, settings: SidecarSettings) -> None:
        self.settings = settings
        self.instruments = Instruments()
        self._log = get_logger("system")
        try:
            settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            settings.state_dir.chmod(0o700)
            self.journal = Journal(settings.state_dir / "journal.sqlite")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"cannot keep the journal in {settings.state_dir}: {error}",
                "a writable folder with a sound journal.sqlite",
                "free space, or move the damaged journal.sqlite away",
            ) from error
        self.watch = RunWatch(settings.output_dir, self._scanned)
        self.deliverer = Deliverer(settings.output_dir, self.journal, self._settled)
        self.tracer: Tracer = create_tracer(
            run_id="sidecar",
            model="sidecar",
            trace_file=settings.state_dir / "traces" / "spans.jsonl",
            probe=True,
        )
        self._known_states: set[str] = set()
        for outcome in ("accepted", "unauthorized", "malformed", "too_large", "journal_failed", "too_slow"):
            self.instruments.add(catalog.SIDECAR_WEBHOOKS, 0, outcome=outcome)
        for action in ACTIONS:
            for outcome in ("done", "failed", "rejected", "expired", "undelivered"):
                self.instruments.add(catalog.SIDECAR_COMMANDS, 0, action=action, outcome=outcome)
        for decision in ALERT_DECISIONS:
            self.instruments.add(catalog.SIDECAR_ALERTS, 0, decision=decision)

    def start(self) -> None:
        """Watch the runs, and deliver what an earlier process left."""
        self.watch.start()
        for entry in self.journal.waiting():
            self._log.info("delivering_again", id=entry.command.id, run=entry.command.run)
            self.deliverer.deliver(entry)

    def stop(self) -> None:
        """End the watch; deliveries under way stay in the journal."""
        self.watch.stop()
        self.deliverer.stop()
        self.tracer.close(timeout=2.0)
        self.journal.close()

    def receive(self, webhook: Webhook) -> dict[str, int]:
        """Take on a notification: journal it, begin to deliver what it asks for.

        Returns:
            Number of alerts by decision (`ALERT_DECISIONS`).

        Raises:
            sqlite3.Error: it could not be journalled, and nothing was begun.
        """
        received_at = time.time()
        alerts, commands = [], []
        for alert in webhook.alerts:
            decision = self._decide(alert)
            if decision == "accepted":
                commands.append(self._command(alert, received_at))
            alerts.append(_entry(alert, decision, received_at))
        fresh = self.journal.add(alerts, commands)
        for entry in fresh:
            self.deliverer.deliver(entry)
        for seen in alerts:
            self.instruments.add(catalog.SIDECAR_ALERTS, decision=seen.decision)
            log = self._log.warning if seen.decision in UNUSABLE_DECISIONS else self._log.info
            log(
                "alert",
                alert=seen.name,
                label_run=seen.run,
                severity=seen.severity,
                status=seen.status,
                decision=seen.decision,
            )
        return dict(Counter(seen.decision for seen in alerts))

    def _decide(self, alert: WebhookAlert) -> str:
        if alert.status == "resolved":
            return "resolved"
        if not alert.action:
            return "informed"
        if alert.action not in ACTIONS:
            return "unknown_action"
        if not alert.run:
            return "no_run"
        if self.journal.known(alert.command_id()):
            return "duplicate"
        if age_seconds(alert, datetime.now(UTC)) > STALE_SECONDS:
            return "expired"
        seen = self.watch.find(alert.run)
        if seen is None:
            return "unknown_run"
        if not seen.live:
            return "run_ended"
        return "dry_run" if self.settings.dry_run else "accepted"

    def _command(self, alert: WebhookAlert, received_at: float) -> CommandEntry:
        starts_at = alert.startsAt.timestamp()
        traceparent = self.tracer.emit(
            f"alert {alert.name}",
            int(min(starts_at, received_at) * 1e9),
            int(received_at * 1e9),
            {
                "obsinfra.run": alert.run,
                "obsinfra.alert": alert.name,
                "obsinfra.fingerprint": alert.fingerprint,
                "obsinfra.action": alert.action,
            },
        )
        return CommandEntry(command_for(alert, traceparent or None), alert.name, starts_at, received_at)

    def _settled(self, entry: CommandEntry, outcome: str, ack: Ack | None) -> None:
        now = time.time()
        command = entry.command
        self.instruments.add(catalog.SIDECAR_COMMANDS, action=command.action, outcome=outcome)
        self.instruments.observe(
            catalog.SIDECAR_DELIVERY_SECONDS, now - entry.received_at, action=command.action
        )
        self.tracer.emit(
            f"delivery {command.action}",
            int(entry.received_at * 1e9),
            int(now * 1e9),
            {"obsinfra.run": command.run, "obsinfra.command.id": command.id, "obsinfra.outcome": outcome},
            parent_traceparent=command.traceparent,
        )
        self._log.info(
            "command_settled",
            id=command.id,
            label_run=command.run,
            action=command.action,
            alert=entry.alert,
            outcome=outcome,
            seconds_from_webhook=round(now - entry.received_at, 4),
            ack=ack.to_json() if ack else None,
        )

    def _scanned(self, states: dict[str, int]) -> None:
        self._known_states |= states.keys()
        for state in self._known_states:
            self.instruments.set(catalog.SIDECAR_RUNS, states.get(state, 0), state=state)


def create_app(sidecar: Sidecar, token: str) -> FastAPI:
    """The HTTP face: `POST /webhook` (bearer token), `GET /healthz`, `/metrics`, `/sd`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sidecar.start()
        yield
        sidecar.stop()

    app = FastAPI(title="obsinfra sidecar", lifespan=lifespan, docs_url=None, redoc_url=None)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SampleCollector({}, sidecar.instruments.samples, sidecar.instruments.histograms))
    expected = f"Bearer {token}".encode()
    log = get_logger("system")

    def refuse(status: int, outcome: str, detail: str) -> HTTPException:
        sidecar.instruments.add(catalog.SIDECAR_WEBHOOKS, outcome=outcome)
        log.warning("webhook_refused", outcome=outcome, detail=detail)
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
        return HTTPException(status, detail, headers)

    async def body_of(request: Request) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > MAX_BODY_BYTES:
                        raise refuse(413, "too_large", f"expected at most {MAX_BODY_BYTES} bytes")
        except TimeoutError:
            raise refuse(408, "too_slow", f"expected the body within {BODY_SECONDS:.0f} s") from None
        return bytes(body)

    @app.post("/webhook")
    async def webhook(request: Request) -> dict[str, int]:
        given = request.headers.get("authorization", "").encode()
        if not secrets.compare_digest(given, expected):
            raise refuse(401, "unauthorized", "expected the bearer token of the sidecar's token file")
        body = await body_of(request)
        try:
            notification = Webhook.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise refuse(
                422, "malformed", f"expected Alertmanager's webhook version 4; {where}: {first['msg']}"
            ) from None
        try:
            decisions = await run_in_threadpool(sidecar.receive, notification)
        except sqlite3.Error as error:
            raise refuse(503, "journal_failed", f"the journal cannot be written: {error}") from error
        sidecar.instruments.add(catalog.SIDECAR_WEBHOOKS, outcome="accepted")
        return decisions

    @app.get("/healthz")
    def healthz() -> dict[str, Any]:
        return {"ok": True, "prometheus_asks": sidecar.watch.prometheus_asks}

    @app.get("/metrics")
    def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept") or "")
        return Response(encode(registry), media_type=content_type)

    @app.get("/sd")
    def sd() -> list[dict[str, Any]]:
        return sidecar.watch.targets()

    return app


def run_sidecar(settings: SidecarSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: the address is taken or not this machine's, or state or token cannot be used.
    """
    listener = _listen(settings.host, settings.port)
    token = _token(settings.token_file)
    sidecar = Sidecar(settings)
    configure_logging(settings.state_dir / "logs", run="", model="sidecar", terminal_level="info")
    host, port = listener.getsockname()[:2]
    get_logger("system").info(
        "sidecar",
        url=f"http://{f'[{host}]' if ':' in host else host}:{port}",
        watches=str(settings.output_dir),
        token_file=str(settings.token_file),
        dry_run=settings.dry_run,
    )
    config = uvicorn.Config(
        create_app(sidecar, token),
        log_config=None,
        access_log=False,
        http=PatientForAWhile,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError, UnicodeError) as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}",
            "a free port on an address of this machine",
            "stop what uses it, or choose another --port or --host",
        ) from error
    return listener


def _token(path: Path) -> str:
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(path, secrets.token_urlsafe(32) + "\n", mode=0o600)
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"others may read the token file {path}", "mode 0600", f"chmod 600 {path}")
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot use the token file {path}: {error}",
            "a readable file with a token",
            "correct --token-file",
        ) from error
    if len(token) < 16 or not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(
            f"the token in {path} has {len(token)} characters, or some that are not visible ASCII",
            "16 or more of them",
            "remove the file; a new token is made then",
        )
    return token


def _entry(alert: WebhookAlert, decision: str, received_at: float) -> AlertEntry:
    return AlertEntry(
        received_at=received_at,
        name=alert.name,
        run=alert.run,
        severity=alert.labels.get("severity", ""),
        status=alert.status,
        fingerprint=alert.fingerprint,
        starts_at=alert.startsAt.timestamp(),
        decision=decision,
    )


def main() -> None:
    """Entry point of `python -m obsinfra.control.sidecar`, as the native stack starts it."""
    parser = argparse.ArgumentParser(description="The obsinfra sidecar.")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of runs")
    parser.add_argument("--token-file", type=Path, required=True, help="bearer token, 0600")
    parser.add_argument("--state-dir", type=Path, required=True, help="journal, logs and traces")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9465)
    parser.add_argument("--dry-run", action="store_true")
    try:
        run_sidecar(SidecarSettings(**vars(parser.parse_args())))
    except ObsinfraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
