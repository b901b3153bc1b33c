"""Asking Alertmanager whether an alert still fires, before the sidecar goes a step further about it.

An end that was never heard of (Alertmanager was killed, its notification lost) must not stop a run. And one
that was started a moment ago must not be believed that nothing fires: it has not been told yet.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from obsinfra.control.alertmanager import Alertmanager, AlertmanagerError
from obsinfra.control.journal import Firing
from obsinfra.monitoring.logging_config import get_logger

TIMEOUT_SECONDS = 3.0
FRESH_SECONDS = 2.0
"""One answer serves all questions within this long."""

TOLD_SECONDS = 90.0
"""So long after its start an Alertmanager has been told of all that fires: a Prometheus repeats it each
minute, that of the stack more often."""


class FiringCheck:
    """What one Alertmanager says of firings. For one thread.

    Args:
        url: its address, without a path of the API.
        told_seconds: how long after its start what it does not know may fire all the same.
    """

    def __init__(self, url: str, told_seconds: float = TOLD_SECONDS) -> None:
        self._alertmanager = Alertmanager(url, TIMEOUT_SECONDS)
        self._told_seconds = told_seconds
        self._asked_at = float("-inf")
        self._firing: dict[str, bool] | None = None
        self._told = False
        self._log = get_logger("system")

    def still_fires(self, firing: Firing) -> bool | None:
        """Whether it fires, and nobody silenced it; None: no answer, or it cannot know yet."""
        if time.monotonic() - self._asked_at > FRESH_SECONDS:
            self._firing = self._ask()
            self._asked_at = time.monotonic()
        if self._firing is None:
            return None
        return self._firing.get(firing.fingerprint, False if self._told else None)

    def _ask(self) -> dict[str, bool] | None:
        """Fingerprint of each alert it knows → whether it fires for all to hear; None without an answer."""
        try:
            found = {
                alert.fingerprint: not alert.silenced_by and alert.state != "unprocessed"
                for alert in self._alertmanager.alerts()
            }
            age = (datetime.now(UTC) - self._alertmanager.started()).total_seconds()
            self._told = age >= self._told_seconds
            return found
        except AlertmanagerError as error:
            self._log.warning("alertmanager_unreachable", url=self._alertmanager.url, error=str(error))
            return None
