"""`[notify]`: which people hear of alerts, how, and when not; the part of the settings about messages.

Validated here, rendered by `obsinfra.alerting.routes`. Holds names of secret files, never a secret: one that
is written into the settings is refused, and no message repeats it.
"""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

SEVERITIES = ("critical", "warning", "info")
CHANNELS = ("slack", "email", "webhook", "pagerduty")
PLACEHOLDERS = ("run", "model", "rank", "device", "alert")
"""What may stand in braces in a link; the alert's labels are put there, escaped for a URL."""

LINK_CHARACTERS, LINK_LABEL_CHARACTERS = 320, 100
"""So long may a link be, and a label in it, for a Slack message to hold three of them in its text's limit."""

WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_CLOCK = re.compile(r"([01]\d|2[0-3]):[0-5]\d|24:00")
_SMARTHOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([1-9][0-9]{0,4})")
_ADDRESS = re.compile(r"[^@\s<>,;]+@[^@\s<>,;]+")


def _plain(text: str) -> str:
    # Alertmanager expands templates in most of its values; one with a mistake would lose the message.
    if "{{" in text or any(not character.isprintable() for character in text):
        raise ValueError("plain text on one line, without {{")
    return text


def _http_url(text: str) -> str:
    if not text.isascii() or re.search(r"[\s{}<>\"|\\^`]", text):
        raise ValueError("a URL without spaces, quotes, braces or other characters that need escaping")
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        raise ValueError("a URL, as https://host/path") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an http or https URL with a host, as https://host/path")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL without user name and password; secrets belong into files of their own")
    return text


def _link(text: str) -> str:
    unknown = [name for name in _PLACEHOLDER.findall(text) if name not in PLACEHOLDERS]
    if unknown:
        known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise ValueError(f"only {known} in braces, not {{{unknown[0]}}}")
    _http_url(_PLACEHOLDER.sub("x", text))
    filled = len(text.replace("&", "&amp;")) + len(_PLACEHOLDER.findall(text)) * LINK_LABEL_CHARACTERS
    if filled > LINK_CHARACTERS:
        raise ValueError(
            f"at most {LINK_CHARACTERS} characters, each placeholder counted as {LINK_LABEL_CHARACTERS}"
        )
    return text


def _smarthost(text: str) -> str:
    found = _SMARTHOST.fullmatch(text)
    if found is None or int(found[2]) > 65535:
        raise ValueError("host:port, as smtp.example.org:587")
    return text


def _address(text: str) -> str:
    if not _ADDRESS.fullmatch(_plain(text)):
        raise ValueError("a mail address, as name@example.org")
    return text


def _location(text: str) -> str:
    if text != "UTC":
        try:
            zoneinfo.ZoneInfo(text)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("a time zone, as Europe/Berlin") from None
    return text


def _clock_range(text: str) -> str:
    start, dash, end = text.partition("-")
    if not (dash and _CLOCK.fullmatch(start) and _CLOCK.fullmatch(end)) or start in ("24:00", end):
        raise ValueError("times as 22:00-07:00")
    return text


def _words(value: Any) -> Any:
    """`a b` or `a,b` for a list, as environment variables have it."""
    return tuple(re.split(r"[\s,]+", value.strip())) if isinstance(value, str) else value


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, Mapping | BaseModel) else value


PlainText = Annotated[str, Field(min_length=1, max_length=400), AfterValidator(_plain)]
Url = Annotated[str, AfterValidator(_http_url)]
Link = Annotated[str, AfterValidator(_link)]
Duration = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}(s|m|h|d)$")]
Severities = Annotated[
    tuple[Literal["critical", "warning", "info"], ...], BeforeValidator(_words), Field(min_length=1)
]


class _Part(BaseModel):
    """A table under `[notify]`. `secrets` maps names a secret might be written under to the right setting."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, validate_default=True, allow_inf_nan=False
    )

    secrets: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _no_secret_here(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for name, right in cls.secrets.items():
                if name in value:
                    raise ValueError(
                        f"no secret in the settings: {name} must stand in a file of its own, readable by "
                        f'Alertmanager alone, and {right} = "/path/to/that/file" here'
                    )
        return value


class Slack(_Part):
    """An incoming webhook of Slack."""

    secrets: ClassVar = {"api_url": "api_url_file", "url": "api_url_file", "webhook_url": "api_url_file"}

    api_url_file: Path
    channel: PlainText
    severities: Severities = ("critical", "warning", "info")


class Email(_Part):
    """A mail server that takes messages for others (a smarthost)."""

    secrets: ClassVar = dict.fromkeys(("auth_password", "password", "auth_secret"), "auth_password_file")

    smarthost: Annotated[str, AfterValidator(_smarthost)]
    sender: Annotated[str, AfterValidator(_address)] = Field(alias="from")
    to: Annotated[
        tuple[Annotated[str, AfterValidator(_address)], ...], BeforeValidator(_words), Field(min_length=1)
    ]
    auth_username: PlainText | None = None
    auth_password_file: Path | None = None
    require_tls: bool = True
    ca_file: Path | None = None
    severities: Severities = ("critical", "warning")

    @model_validator(mode="after")
    def _user_and_password(self) -> Email:
        if (self.auth_username is None) != (self.auth_password_file is None):
            raise ValueError("auth_username and auth_password_file together, or neither")
        if self.auth_password_file is not None and not self.require_tls:
            raise ValueError("require_tls = true where a password is sent")
        return self


class Webhook(_Part):
    """Alertmanager's own JSON, posted to an address of yours."""

    secrets: ClassVar = dict.fromkeys(
        ("bearer_token", "token", "credentials", "password"), "bearer_token_file"
    )

    url: Url | None = None
    url_file: Path | None = None
    bearer_token_file: Path | None = None
    severities: Severities = ("critical", "warning", "info")

    @model_validator(mode="after")
    def _one_address(self) -> Webhook:
        if (self.url is None) == (self.url_file is None):
            raise ValueError("either url, or url_file when the address itself is a secret")
        return self


class PagerDuty(_Part):
    """The Events API v2 of PagerDuty."""

    secrets: ClassVar = dict.fromkeys(("routing_key", "service_key", "integration_key"), "routing_key_file")

    routing_key_file: Path
    url: Url = "https://events.pagerduty.com/v2/enqueue"
    severities: Severities = ("critical",)


class QuietHours(_Part):
    """When only critical alerts reach people."""

    times: Annotated[tuple[Annotated[str, AfterValidator(_clock_range)], ...], BeforeValidator(_words)] = ()
    weekdays: Annotated[
        tuple[Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"], ...],
        BeforeValidator(_words),
    ] = ()
    location: Annotated[str, AfterValidator(_location)] = "UTC"

    @model_validator(mode="after")
    def _says_when(self) -> QuietHours:
        if not self.times and not self.weekdays:
            raise ValueError("times, weekdays, or both")
        return self


class DeadManSwitch(_Part):
    """Who is told, again and again, that alerts still come through; silence alarms them."""

    secrets: ClassVar = Webhook.secrets

    url: Url | None = None
    url_file: Path | None = None
    bearer_token_file: Path | None = None
    every: Duration = "1m"

    @model_validator(mode="after")
    def _one_address(self) -> DeadManSwitch:
        if (self.url is None) == (self.url_file is None):
            raise ValueError("either url, or url_file when the address itself is a secret")
        return self


class Notify(_Part):
    """All of `[notify]`; empty, nobody is told and only the sidecar hears of alerts."""

    secrets: ClassVar = {
        "slack_api_url": "slack.api_url_file",
        "smtp_auth_password": "email.auth_password_file",
        "pagerduty_routing_key": "pagerduty.routing_key_file",
    }

    slack: Slack | None = None
    email: Email | None = None
    webhook: Webhook | None = None
    pagerduty: PagerDuty | None = None
    watchdog: DeadManSwitch | None = None
    quiet_hours: Annotated[tuple[QuietHours, ...], BeforeValidator(_one_or_more)] = ()
    grafana_url: Link | None = None
    run_url: Link | None = None
    trace_url: Link | None = None
    group_wait: Duration = "12s"
    group_interval: Duration = "1m"
    repeat_critical: Duration = "1h"
    repeat_warning: Duration = "4h"
    repeat_info: Duration = "1d"

    def __str__(self) -> str:
        """Who is told, as `obsinfra config show` and `--help` have it."""
        told = [f"{channel} ({', '.join(severities)})" for channel, severities in self.channels.items()]
        return ", ".join(told) or "nobody"

    @property
    def channels(self) -> dict[str, tuple[str, ...]]:
        """Channel → the severities it carries, for each that is set up."""
        parts = (self.slack, self.email, self.webhook, self.pagerduty)
        return {name: part.severities for name, part in zip(CHANNELS, parts, strict=True) if part is not None}

    @property
    def secret_files(self) -> dict[str, Path]:
        """Setting → the file it names, in which Alertmanager finds a secret."""
        return {
            f"notify.{part}.{name}": path
            for part, values in self
            if isinstance(values, _Part)
            for name, path in values
            if name.endswith("_file") and name != "ca_file" and isinstance(path, Path)
        }
