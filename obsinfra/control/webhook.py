"""Alertmanager's webhook, version 4, as far as the sidecar reads it.

The format: https://prometheus.io/docs/alerting/latest/configuration/#webhook_config. Only what is needed is
required; fields that newer versions add are ignored.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

MAX_ALERTS = 1_000

STALE_SECONDS = 86_400.0
"""An alert that began longer ago and was never heard of is a replay, or its moment has passed."""

Text = Annotated[str, StringConstraints(max_length=4_000)]


class WebhookAlert(BaseModel):
    """One alert of a notification."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    status: Literal["firing", "resolved"]
    labels: dict[Text, Text] = Field(max_length=100)
    annotations: dict[Text, Text] = Field(default_factory=dict, max_length=100)
    startsAt: AwareDatetime
    endsAt: AwareDatetime | None = None
    fingerprint: str = Field(min_length=1, max_length=100)

    @property
    def name(self) -> str:
        """The `alertname` label."""
        return self.labels.get("alertname", "")

    @property
    def run(self) -> str:
        """The `run` label; empty for alerts that speak of no run."""
        return self.labels.get("run", "")

    @property
    def action(self) -> str:
        """The `action` label; empty for alerts that only inform."""
        return self.labels.get("action", "")

    @property
    def severity(self) -> str:
        """The `severity` label."""
        return self.labels.get("severity", "")

    @property
    def speaks_of_host(self) -> bool:
        """Whether it is about the host as a whole, and so about every run on it."""
        return self.labels.get("scope") == "host" and not self.run

    @property
    def starts_at(self) -> float:
        """`startsAt` in epoch seconds; the same in whichever time zone it is written."""
        return self.startsAt.timestamp()


class Webhook(BaseModel):
    """One notification."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    version: Literal["4"]
    alerts: list[WebhookAlert] = Field(max_length=MAX_ALERTS)


def command_id(run: str, fingerprint: str, starts_at: float, what: str) -> str:
    """The same for each repetition of one firing, whichever Alertmanager sends it and however often.

    Args:
        what: the action; of a later step, its number too.
    """
    parts = (run, fingerprint, f"{starts_at:.6f}", what)
    return "am-" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def age_seconds(alert: WebhookAlert, now: datetime) -> float:
    """How long ago the alert began to fire."""
    return (now - alert.startsAt).total_seconds()
