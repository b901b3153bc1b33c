"""The sidecar's process: its HTTP face, its token, its address, TLS, and the command line that starts it.

One process per host (`obsinfra sidecar`, or `python -m obsinfra.control.sidecar`). What it does with alerts
is in `responder`, what it tells in `http_api`. A webhook is answered 2xx once its commands are journalled.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import ipaddress
import os
import re
import secrets
import socket
import sqlite3
import ssl
import sys
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from obsinfra.catalog import metrics as catalog
from obsinfra.catalog.policy import DEFAULT_POLICY, Policy, policy_with
from obsinfra.control.action_plugins import load_action_plugins
from obsinfra.control.alertmanager_watch import AlertmanagerWatch
from obsinfra.control.firing_check import FiringCheck
from obsinfra.control.gate import Gate
from obsinfra.control.http_api import answers, create_router, first_problem, json_body
from obsinfra.control.idle_connections import PatientForAWhile
from obsinfra.control.index_page import create_index_router
from obsinfra.control.responder import Sidecar
from obsinfra.control.runbook_pages import create_runbook_router
from obsinfra.control.webhook import Webhook
from obsinfra.errors import ConfigError, ObsinfraError
from obsinfra.monitoring.exposition import SampleCollector
from obsinfra.monitoring.logging_config import configure_logging, get_logger
from obsinfra.run.files import write_atomic

MAX_CONNECTIONS = 256

CONTAINER_SECRETS = Path("/run/secrets")
"""Where container engines show secrets; who may read them on the host is not to be seen from in here."""

WEBHOOKS_PER_SECOND, WEBHOOKS_AT_ONCE = 1_000.0, 128
REQUESTS_PER_SECOND, COMMANDS_AT_ONCE = 100.0, 16

SWITCH_SECONDS = 0.0005
"""The interpreter's usual 5 ms make the event loop wait that long for each delivery being worked on."""


@dataclass(frozen=True, slots=True)
class SidecarSettings:
    """How one sidecar runs.

    Attributes:
        output_dir: the folder of runs.
        host, port: where to listen; port 0 takes any.
        token_file: the bearer token, 0600; made when missing.
        state_dir: journal, logs and traces; made when missing, 0700.
        policy: what is done about alerts.
        tls_cert, tls_key: PEM files; needed for any address but this machine's own.
        alertmanager_url: asked whether an alert still fires before a further step about it is taken, and
            whether it is there at all; None: an alert fires until its end is heard, and alerts come.
        trusted_network: listen on any address without TLS, and ask for the token where it is asked for on a
            loopback address: for a network of containers that nobody else is on.
        loopback_host: the name under which Prometheus, in a container, reaches trainers that listen on this
            machine's loopback address; None: as it is.
        page_url: where people open its page, which the trainers' pages lead to; None: the address it listens
            on, by this machine's name where that is every address.
    """

    output_dir: Path
    token_file: Path
    state_dir: Path
    host: str = "127.0.0.1"
    port: int = 9465
    policy: Policy = DEFAULT_POLICY
    tls_cert: Path | None = None
    tls_key: Path | None = None
    alertmanager_url: str | None = None
    trusted_network: bool = False
    loopback_host: str | None = None
    page_url: str | None = None


class SidecarApp(FastAPI):
    """FastAPI, but for routes that it answers itself: the layers in between are half of what a webhook costs.

    Attributes:
        direct: (method, path) → the endpoint; it is declared as a route as well, for OpenAPI.
    """

    direct: dict[tuple[str, str], Callable[[Request], Awaitable[Any]]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = None
        if scope["type"] == "http":
            endpoint = self.direct.get((scope["method"], scope["path"]))
        if endpoint is None:
            await super().__call__(scope, receive, send)
            return
        try:
            response = JSONResponse(await endpoint(Request(scope, receive)))
        except HTTPException as refusal:
            response = JSONResponse({"detail": refusal.detail}, refusal.status_code, refusal.headers)
        await response(scope, receive, send)


def create_app(
    sidecar: Sidecar,
    token: str,
    *,
    guard_all: bool = False,
    alertmanager: AlertmanagerWatch | None = None,
    webhooks_per_second: float = WEBHOOKS_PER_SECOND,
    requests_per_second: float = REQUESTS_PER_SECOND,
) -> FastAPI:
    """The HTTP face: `POST /webhook` and `/v1/…` with the token, `/healthz`, `/metrics`, `/sd`,
    `/runbooks/…` and the page at `/` without.

    Args:
        token: the bearer token.
        guard_all: ask for the token on everything but `/healthz`, the runbooks and the files of the page.
        alertmanager: the watch over Alertmanager, run as long as the app.
        webhooks_per_second, requests_per_second: what is taken of `/webhook` and of `/v1`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if alertmanager is not None:
            alertmanager.start()
        sidecar.start()
        yield
        sidecar.stop()
        if alertmanager is not None:
            alertmanager.stop()

    log = get_logger("system")

    def refused_webhook(outcome: str, detail: str) -> None:
        sidecar.instruments.add(catalog.SIDECAR_WEBHOOKS, outcome=outcome)
        log.warning("webhook_refused", outcome=outcome, detail=detail)

    def refused_request(outcome: str, detail: str) -> None:
        log.warning("request_refused", outcome=outcome, detail=detail)

    # 503, not 429: Alertmanager (0.25 to 0.33) repeats a notification with growing pauses after the first,
    # after the second only at its group's next turn.
    webhook_gate = Gate(
        token, refused_webhook, per_second=webhooks_per_second, at_once=WEBHOOKS_AT_ONCE, too_many=503
    )
    gate = Gate(
        token, refused_request, per_second=requests_per_second, at_once=COMMANDS_AT_ONCE, too_many=429
    )

    async def guarded(request: Request) -> None:
        if guard_all:
            gate.check_token(request)

    app = SidecarApp(
        title="obsinfra sidecar",
        version=version("obsinfra"),
        description="Alertmanager's webhook in, commands to the runs out; what fires, was done and runs.",
        redirect_slashes=False,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    collector = SampleCollector({}, sidecar.samples, sidecar.instruments.histograms)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)

    @app.exception_handler(sqlite3.Error)
    async def unreadable(request: Request, error: sqlite3.Error) -> JSONResponse:
        """A journal that a disk damaged: what asks for it fails, the rest is served."""
        log.error("journal_not_read", path=request.url.path, error=str(error))
        return JSONResponse({"detail": f"the journal cannot be read: {error}"}, 503)

    @app.post(
        "/webhook",
        responses=answers(401, 408, 413, 422, 503),
        openapi_extra=json_body(Webhook) | {"security": [{"HTTPBearer": []}]},
    )
    async def webhook(request: Request) -> dict[str, int]:
        """A notification of Alertmanager, version 4. Answers with the number of alerts by decision."""
        webhook_gate.check_token(request)
        webhook_gate.check_rate()
        with webhook_gate.place():
            body = await webhook_gate.body_of(request)
            try:
                notification = Webhook.model_validate_json(body)
            except ValidationError as error:
                detail = f"expected Alertmanager's webhook version 4; {first_problem(error)}"
                raise webhook_gate.refuse(422, "malformed", detail) from None
            try:
                decided = await asyncio.wrap_future(sidecar.receive(notification))
            except sqlite3.Error as error:
                detail = f"the journal cannot be written: {error}"
                raise webhook_gate.refuse(503, "journal_failed", detail) from error
        sidecar.instruments.add(catalog.SIDECAR_WEBHOOKS, outcome="accepted")
        return decided.decisions()

    app.direct = {("POST", "/webhook"): webhook}

    @app.get("/healthz")
    async def healthz() -> dict[str, bool | None]:
        """Whether it works, whether a Prometheus asks it for targets, and whether Alertmanager answers it
        (null: it was told of none)."""
        return {
            "ok": True,
            "prometheus_asks": sidecar.watch.prometheus_asks,
            "alertmanager_answers": alertmanager.answers if alertmanager is not None else None,
        }

    @app.get("/metrics", dependencies=[Depends(guarded)], response_class=Response)
    def metrics(request: Request) -> Response:
        """Its own metrics, for Prometheus."""
        body, content_type = collector.exposition(request.headers.get("accept") or "")
        return Response(body, media_type=content_type)

    @app.get("/sd", dependencies=[Depends(guarded)])
    def sd() -> list[dict[str, Any]]:
        """Where the live runs' metrics are, as Prometheus's http_sd wants it."""
        return sidecar.watch.targets()

    @app.get("/openapi.json", dependencies=[Depends(guarded)], include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return app.openapi()

    app.include_router(create_router(sidecar, gate))
    app.include_router(create_runbook_router())
    app.include_router(create_index_router())
    return app


def run_sidecar(settings: SidecarSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: the address is taken, not this machine's, or too wide for no TLS; or state, token,
            certificate or key cannot be used; or another sidecar uses the same state.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    wide = not (settings.trusted_network or _is_loopback(settings.host))
    scheme = _check_tls(settings, wide)
    page = _checked_page(settings.page_url)
    listener = _listen(settings.host, settings.port)
    token = _token(settings.token_file)
    host, port = listener.getsockname()[:2]
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    if page is None:
        page = f"{scheme}://{socket.gethostname()}:{port}" if host in ("0.0.0.0", "::") else url
    _hold(settings.state_dir)
    sidecar, alertmanager = _create_sidecar(settings, page)
    configure_logging(settings.state_dir / "logs", run="", model="sidecar", terminal_level="info")
    get_logger("system").info(
        "sidecar",
        url=url,
        watches=str(settings.output_dir),
        token_file=str(settings.token_file),
        dry_run=settings.policy.dry_run,
    )
    config = uvicorn.Config(
        create_app(sidecar, token, guard_all=wide, alertmanager=alertmanager),
        log_config=None,
        access_log=False,
        http=PatientForAWhile,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
        server_header=False,
        proxy_headers=False,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _hold(state_dir: Path) -> None:
    """Be the one sidecar of this state folder until the end of the process.

    Two would deliver each other's commands, and the first to end would take away the heartbeats of both.
    """
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"another sidecar keeps its journal in {state_dir}",
            "one sidecar for a folder of runs",
            "stop it first, as with 'obsinfra down'",
        ) from None
    except OSError as error:  # no locks on this file system; what else is wrong shows at the journal
        get_logger("system").warning("sidecar_not_locked", folder=str(state_dir), error=str(error))


def _checked_page(url: str | None) -> str | None:
    try:
        found = urlsplit(url or "")
        wrong = url is not None and (found.scheme not in ("http", "https") or not found.hostname)
    except ValueError:
        wrong = True
    if wrong:
        raise ConfigError(f"--page-url {url!r}", "http://host:port/ or https://host:port/", "correct it")
    return url


def _create_sidecar(settings: SidecarSettings, page: str) -> tuple[Sidecar, AlertmanagerWatch | None]:
    url = settings.alertmanager_url
    if url is None:
        return (
            Sidecar(
                settings.output_dir,
                settings.state_dir,
                settings.policy,
                loopback_host=settings.loopback_host,
                page=page,
            ),
            None,
        )
    watch = AlertmanagerWatch(url)
    return (
        Sidecar(
            settings.output_dir,
            settings.state_dir,
            settings.policy,
            FiringCheck(url).still_fires,
            lambda: watch.answers,
            loopback_host=settings.loopback_host,
            page=page,
        ),
        watch,
    )


def _is_loopback(host: str) -> bool:
    """Whether every address that `host` means is this machine's own; a name that means none counts so too."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host or "0.0.0.0", None)}
    except (OSError, UnicodeError):
        return True
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def _check_tls(settings: SidecarSettings, wide: bool) -> str:
    cert, key = settings.tls_cert, settings.tls_key
    if cert is None and key is None:
        if wide:
            raise ConfigError(
                f"address {settings.host} without TLS",
                "a loopback address, or --tls-cert and --tls-key",
                "listen on 127.0.0.1, or give a certificate and its key; within a network of containers that "
                "nobody else is on: --trusted-network",
            )
        return "http"
    if cert is None or key is None:
        raise ConfigError("one of --tls-cert and --tls-key alone", "both or none", "give the other one too")
    try:
        if key.stat().st_mode & 0o077:
            raise ConfigError(f"others may read the key {key}", "mode 0600", f"chmod 600 {key}")
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"cannot use certificate {cert} and key {key}: {error.strerror or error}",
            "PEM files that belong together",
            "correct --tls-cert and --tls-key",
        ) from error
    return "https"


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
        if path.stat().st_mode & 0o077 and path.parent != CONTAINER_SECRETS:
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


def load_plugin_actions() -> None:
    """Let the policy, alerts and requests name the actions of other packages."""
    for problem in load_action_plugins()[1]:
        get_logger("errors").error(
            "action_plugin", name=problem.name, target=problem.target, error=problem.problem
        )


def read_policy(path: Path) -> Policy:
    """The default policy with the `[policy]` table of a TOML file applied; other tables are not looked at.

    Raises:
        ConfigError: it cannot be read, or a value does not fit.
    """
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}",
            "a TOML file with a table [policy]",
            "correct --policy",
        ) from error
    table = document.get("policy", {})
    if not isinstance(table, dict):
        raise ConfigError(f"policy = {table!r} in {path}", "a table [policy]", "correct it there")
    return policy_with(table)


def main() -> None:
    """Entry point of `python -m obsinfra.control.sidecar`, as the native stack starts it."""
    parser = argparse.ArgumentParser(description="The obsinfra sidecar.")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of runs")
    parser.add_argument("--token-file", type=Path, required=True, help="bearer token, 0600")
    parser.add_argument("--state-dir", type=Path, required=True, help="journal, logs and traces")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9465)
    parser.add_argument("--policy", type=Path, help="TOML file with a table [policy]")
    parser.add_argument("--tls-cert", type=Path, help="certificate, PEM")
    parser.add_argument("--tls-key", type=Path, help="its key, PEM, 0600")
    parser.add_argument("--alertmanager-url", help="asked whether an alert still fires before a further step")
    parser.add_argument(
        "--trusted-network",
        action="store_true",
        help="any address without TLS: for a network of containers that nobody else is on",
    )
    parser.add_argument("--loopback-host", help="where a Prometheus in a container reaches loopback trainers")
    parser.add_argument("--page-url", help="where people open its page; the trainers' pages lead there")
    parser.add_argument("--dry-run", action="store_true", help="journal what would be done, do nothing")
    given = vars(parser.parse_args())
    load_plugin_actions()
    policy_file, dry_run = given.pop("policy"), given.pop("dry_run")
    try:
        policy = read_policy(policy_file) if policy_file else DEFAULT_POLICY
        policy = replace(policy, dry_run=policy.dry_run or dry_run)
        run_sidecar(SidecarSettings(**given, policy=policy))
    except ObsinfraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
