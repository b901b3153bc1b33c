"""Alertmanager's webhook, version 4, as far as the sidecar reads it, and what an alert in it asks for.

The format: https://prometheus.io/docs/alerting/latest/configuration/#webhook_config. Only what is needed is
required; fields that newer versions add are ignored.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from obsinfra.catalog.actions import ACTIONS
from obsinfra.control.command import Command, new_command

MAX_ALERTS = 1_000
COMMAND_SECONDS = 300.0
"""A command that an alert caused is worth executing for this long."""

STALE_SECONDS = 86_400.0
"""An alert that began longer ago and was never heard of is a replay, or its moment has passed."""

Text = Annotated[str, StringConstraints(max_length=4_000)]


class WebhookAlert(BaseModel):
    """One alert of a notification."""

    model_config = ConfigDict(extra="ignore", frozen=True)

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

    def command_id(self) -> str:
        """The same for each repetition of one firing, whichever Alertmanager sends it and however often."""
        moment = f"{self.startsAt.timestamp():.6f}"  # the same in whichever time zone it is written
        parts = (self.run, self.fingerprint, moment, self.action)
        return "am-" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


class Webhook(BaseModel):
    """One notification."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: Literal["4"]
    alerts: list[WebhookAlert] = Field(max_length=MAX_ALERTS)


def command_for(alert: WebhookAlert, traceparent: str | None) -> Command:
    """The command a firing alert with a known action asks for."""
    arguments = ACTIONS[alert.action].arguments
    return new_command(
        alert.run,
        alert.action,
        source="sidecar",
        reason=f"alert {alert.name}: {alert.annotations.get('summary', '')}".rstrip(": "),
        args={"alert": alert.name} if "alert" in arguments else {},
        id=alert.command_id(),
        lifetime_seconds=COMMAND_SECONDS,
        traceparent=traceparent,
    )


def age_seconds(alert: WebhookAlert, now: datetime) -> float:
    """How long ago the alert began to fire."""
    return (now - alert.startsAt).total_seconds()
