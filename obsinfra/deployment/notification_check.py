"""A marked test alert through the path that real ones take, and what became of it.

Called by `obsinfra alerts test`. Alertmanager says of no single notification whether it was delivered; its
counters of attempts do, and its log says why one failed.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from obsinfra.alerting.routes import TEST_LABEL
from obsinfra.control.alertmanager import Alertmanager, Attempts

WAIT_SECONDS = 30.0
POLL_SECONDS = 0.1
"""Between two looks at Alertmanager's counters and log: it calls nobody back."""
LOG_SECONDS = 2.0
"""A failure is counted a moment before it is logged."""

SHOWN_REASON_CHARACTERS = 600


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a test alert on one channel, and how that is known.

    Attributes:
        state: `delivered` (the other side accepted it), `failed`, or `unknown` (no attempt ended in time).
        evidence: for people.
    """

    channel: str
    state: Literal["delivered", "failed", "unknown"]
    evidence: str


def send_test(
    alertmanager: Alertmanager,
    channel: str,
    *,
    log: Path | None = None,
    wait_seconds: float = WAIT_SECONDS,
) -> Outcome:
    """Post a test alert for one channel and see what Alertmanager makes of it.

    Args:
        alertmanager: a running one whose configuration has the channel.
        channel: `slack`, `email`, `webhook` or `pagerduty`.
        log: Alertmanager's log, where it can be read, for the reason of a failure.
        wait_seconds: how long to wait for an attempt to end.

    Raises:
        AlertmanagerError: Alertmanager does not answer.
    """
    # The sidecar hears of every alert, of a test too, and by the same kind of integration as a webhook.
    expected = 2 if channel == "webhook" else 1
    read_from = log.stat().st_size if log is not None and log.exists() else 0
    before = alertmanager.attempts(channel)
    labels = {
        "alertname": "ObsinfraTest",
        "severity": "warning",
        "run": "test",
        TEST_LABEL: channel,
        "test_id": secrets.token_hex(4),
    }
    annotations = {
        "summary": f"TEST of the route to {channel}: nothing is wrong",
        "description": "Sent by 'obsinfra alerts test'. That you read this shows that alerts reach you.",
        "value": "0",
        "threshold": "0",
    }
    # The end is in the alert, so that it is over even if this process does not live to say so.
    starts = datetime.now(UTC)
    alertmanager.post(labels, annotations, starts=starts, ends=starts + timedelta(seconds=2 * wait_seconds))
    deadline = time.monotonic() + wait_seconds
    while True:
        since = _difference(alertmanager.attempts(channel), before)
        if since.failed or since.delivered >= expected or time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    alertmanager.post(labels, annotations, starts=starts, ends=datetime.now(UTC))
    counted = (
        f"Alertmanager's own count of {channel} requests went from {before.tried} to "
        f"{before.tried + since.tried}, {since.failed} of them failed"
    )
    if expected == 2:
        counted += " (one is the sidecar's)"
    if since.failed:
        return Outcome(channel, "failed", f"{counted}{_reason(log, read_from, channel)}")
    if since.delivered >= expected:
        return Outcome(channel, "delivered", f"{counted}; the other side accepted it")
    return Outcome(
        channel,
        "unknown",
        f"{counted} within {wait_seconds:g} s{_reason(log, read_from, channel)}; the other side may be slow "
        "or out of reach, or a silence holds for ObsinfraTest",
    )


def _difference(now: Attempts, before: Attempts) -> Attempts:
    return Attempts(now.tried - before.tried, now.failed - before.failed)


def _reason(log: Path | None, read_from: int, channel: str) -> str:
    """The last that the log says of the channel since; waits a moment where it says nothing yet."""
    if log is None or not log.exists():
        return "; its log says why"
    deadline = time.monotonic() + LOG_SECONDS
    while True:
        with log.open("rb") as file:
            file.seek(read_from)
            lines = file.read(1 << 20).decode(errors="replace").splitlines()
        about = [line for line in lines if "err=" in line and f"{channel}[" in line]
        if about:
            return f"; {log} says: {about[-1][-SHOWN_REASON_CHARACTERS:]}"
        if time.monotonic() > deadline:
            return f"; {log} may say why"
        time.sleep(POLL_SECONDS)
