"""The stack's committed configuration made ready for this machine: other addresses and paths, same rules.

Called by the native stack and the one in containers. The committed files name container services; only values
are replaced here, on the parsed document, so that both ways of running the stack keep one meaning.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

import obsinfra
from obsinfra.alerting.messages import StackLinks, render_templates
from obsinfra.alerting.prometheus_rules import write_rules
from obsinfra.alerting.routes import render_alertmanager
from obsinfra.catalog.alerts import ALERTS, Alert
from obsinfra.catalog.policy import policy_with
from obsinfra.config.notify import Notify
from obsinfra.deployment.ports import DEFAULT_PORTS
from obsinfra.errors import UserError
from obsinfra.run.files import write_atomic

SERVICES = {name: f"{name}:{port}" for name, port in asdict(DEFAULT_PORTS).items()}
"""Addresses in the committed files: in a network of containers each service has its own default port."""

TOKEN_PATH = "/run/secrets/obsinfra_token"
"""Where the committed files expect the sidecar's bearer token."""

_INTERVAL = re.compile(r"[1-9][0-9]*(ms|s|m)")
_MILLISECONDS = {"ms": 1, "s": 1000, "m": 60_000}


def find_stack_files() -> Path:
    """The folder with `prometheus/` and `alertmanager/`: the wheel's copy, or the repository's top level.

    Raises:
        UserError: neither is there.
    """
    package = Path(obsinfra.__file__).parent
    for folder in (package / "deployment" / "stack_files", package.parent):
        if (folder / "prometheus/prometheus.yml").is_file() and (
            folder / "alertmanager/alertmanager.yml"
        ).is_file():
            return folder
    raise UserError(
        f"no stack configuration in {package / 'deployment/stack_files'} or {package.parent}",
        "prometheus/prometheus.yml and alertmanager/alertmanager.yml",
        "install obsinfra from a wheel or run it from a checkout",
    )


def write_configuration(
    state_dir: Path,
    addresses: Mapping[str, str],
    token_file: Path,
    *,
    scrape_interval: str | None = None,
    alerts: Sequence[Alert] = ALERTS,
    notify: Notify | None = None,
    runbooks: str | None = None,
    paths: Mapping[str, str] | None = None,
    links: StackLinks | None = None,
    policy: Mapping[str, Any] | None = None,
) -> None:
    """Write `prometheus/` and `alertmanager/` under `state_dir`, ready to be started from.

    Args:
        state_dir: an existing folder.
        addresses: service name → `host:port` to put in place of the one in `SERVICES`.
        token_file: absolute path put in place of `TOKEN_PATH`.
        scrape_interval: Prometheus duration for scraping, evaluating and discovery; None keeps the files'.
        alerts: the table the rules are made from.
        notify: the user's `[notify]`, for Alertmanager; None or an empty one keeps the committed files.
        runbooks: address of the runbooks as people reach it; None: the sidecar's in `addresses`.
        links: where this stack shows a run, for messages; `notify` goes before.
        policy: the user's `[policy]`, so that messages say what the sidecar does.
        paths: of files that `notify` names → where Alertmanager finds them instead.

    Raises:
        UserError: `scrape_interval` is no duration.
    """
    source = find_stack_files()
    values = {SERVICES[name]: address for name, address in addresses.items()}
    values |= {TOKEN_PATH: str(token_file), **(paths or {})}
    prometheus = replaced(yaml.safe_load((source / "prometheus/prometheus.yml").read_text()), values)
    if scrape_interval is not None:
        _set_interval(prometheus, check_interval(scrape_interval))
    if notify is None or notify == Notify():
        routes = (source / "alertmanager/alertmanager.yml").read_text()
        committed = (source / "alertmanager/templates").glob("*.tmpl")
        templates = {path.name: path.read_text() for path in committed}
    else:
        routes, templates = (
            render_alertmanager(notify),
            render_templates(notify, links, policy_with(policy or {}, known_actions_only=False)),
        )
    alertmanager = replaced(yaml.safe_load(routes), values)
    rules = state_dir / "prometheus" / "rules"
    shutil.rmtree(rules, ignore_errors=True)
    shutil.copytree(source / "prometheus" / "rules", rules)
    if (source / "prometheus" / "hosts").is_dir():
        shutil.copytree(
            source / "prometheus" / "hosts", state_dir / "prometheus" / "hosts", dirs_exist_ok=True
        )
    write_rules(rules / "obsinfra.yml", alerts, runbooks or f"http://{addresses['sidecar']}/runbooks")
    shutil.rmtree(state_dir / "alertmanager" / "templates", ignore_errors=True)
    (state_dir / "alertmanager" / "templates").mkdir(parents=True)
    for name, text in templates.items():
        write_atomic(state_dir / "alertmanager" / "templates" / name, text)
    for path, document in (
        (state_dir / "prometheus" / "prometheus.yml", prometheus),
        (state_dir / "alertmanager" / "alertmanager.yml", alertmanager),
    ):
        write_atomic(path, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def replaced(document: Any, values: Mapping[str, str]) -> Any:
    """`document` with each text that is a key of `values`, or a URL whose host and port are one, replaced."""
    if isinstance(document, dict):
        return {key: replaced(item, values) for key, item in document.items()}
    if isinstance(document, list):
        return [replaced(item, values) for item in document]
    if not isinstance(document, str):
        return document
    if document in values:
        return values[document]
    if "://" in document and (place := urlsplit(document)).netloc in values:
        return place._replace(netloc=values[place.netloc]).geturl()
    return document


def check_interval(text: str) -> str:
    """Return `text` if it is a duration Prometheus accepts here.

    Raises:
        UserError: it is not.
    """
    if not _INTERVAL.fullmatch(text):
        raise UserError(f"scrape interval {text!r}", "a number with ms, s or m, as 1s or 500ms")
    return text


def halved(interval: str) -> str:
    """Half of an interval that `check_interval` accepts, in milliseconds."""
    unit = next(unit for unit in ("ms", "s", "m") if interval.endswith(unit))
    return f"{max(1, int(interval.removesuffix(unit)) * _MILLISECONDS[unit] // 2)}ms"


def ensure_token(path: Path) -> Path:
    """Make a random bearer token at `path`, 0600, unless there is one. Returns the absolute path."""
    if not path.exists():
        write_atomic(path, secrets.token_urlsafe(32) + "\n", mode=0o600)
    return path.resolve()


def _set_interval(prometheus: dict[str, Any], interval: str) -> None:
    prometheus["global"]["scrape_interval"] = interval
    prometheus["global"]["evaluation_interval"] = halved(interval)
    for job in prometheus["scrape_configs"]:
        for discovery in job.get("http_sd_configs", ()):
            discovery["refresh_interval"] = interval
