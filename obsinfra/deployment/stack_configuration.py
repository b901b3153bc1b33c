"""The stack's committed configuration made ready for this machine: other addresses and paths, same rules.

Called by the native stack. The committed files name container services; only values are replaced here, on
the parsed document, so that both ways of running the stack keep one meaning.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

import obsinfra
from obsinfra.alerting.prometheus_rules import render_rules
from obsinfra.catalog.alerts import with_thresholds
from obsinfra.errors import UserError
from obsinfra.run.files import write_atomic

SERVICES = {"prometheus": "prometheus:9090", "alertmanager": "alertmanager:9093", "sidecar": "sidecar:9465"}
"""Addresses in the committed files."""

TOKEN_PATH = "/run/secrets/obsinfra_token"
"""Where the committed files expect the sidecar's bearer token."""

_INTERVAL = re.compile(r"[1-9][0-9]*(ms|s|m)")


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
    thresholds: Mapping[str, float] | None = None,
) -> None:
    """Write `prometheus/` and `alertmanager/` under `state_dir`, ready to be started from.

    Args:
        state_dir: an existing folder.
        addresses: service name → `host:port` to put in place of the one in `SERVICES`.
        token_file: absolute path put in place of `TOKEN_PATH`.
        scrape_interval: Prometheus duration for scraping, evaluating and discovery; None keeps the files'.
        thresholds: the user's `[thresholds]`, for the rules; empty keeps the committed rules.

    Raises:
        UserError: `scrape_interval` is no duration.
    """
    source = find_stack_files()
    values = {SERVICES[name]: address for name, address in addresses.items()} | {TOKEN_PATH: str(token_file)}
    prometheus = replaced(yaml.safe_load((source / "prometheus/prometheus.yml").read_text()), values)
    if scrape_interval is not None:
        _set_interval(prometheus, check_interval(scrape_interval))
    alertmanager = replaced(yaml.safe_load((source / "alertmanager/alertmanager.yml").read_text()), values)
    rules = state_dir / "prometheus" / "rules"
    shutil.rmtree(rules, ignore_errors=True)
    shutil.copytree(source / "prometheus" / "rules", rules)
    if thresholds:
        write_atomic(rules / "obsinfra.yml", render_rules(with_thresholds(thresholds)), mode=0o644)
    (state_dir / "alertmanager").mkdir(exist_ok=True)
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


def ensure_token(path: Path) -> Path:
    """Make a random bearer token at `path`, 0600, unless there is one. Returns the absolute path."""
    if not path.exists():
        write_atomic(path, secrets.token_urlsafe(32) + "\n", mode=0o600)
    return path.resolve()


def _set_interval(prometheus: dict[str, Any], interval: str) -> None:
    prometheus["global"]["scrape_interval"] = interval
    prometheus["global"]["evaluation_interval"] = interval
    for job in prometheus["scrape_configs"]:
        for discovery in job.get("http_sd_configs", ()):
            discovery["refresh_interval"] = interval
