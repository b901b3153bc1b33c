"""Asking Alertmanager whether an alert still fires, before the sidecar goes a step further about it.

An end that was never heard of (Alertmanager was killed, its notification lost) must not stop a run.
"""

from __future__ import annotations

import time

from obsinfra.control.alertmanager import Alertmanager, AlertmanagerError
from obsinfra.control.journal import Firing
from obsinfra.monitoring.logging_config import get_logger

TIMEOUT_SECONDS = 3.0
FRESH_SECONDS = 2.0
"""One answer serves all questions within this long."""


class FiringCheck:
    """What one Alertmanager says of firings. For one thread.

    Args:
        url: its address, without a path of the API.
    """

    def __init__(self, url: str) -> None:
        self._alertmanager = Alertmanager(url, TIMEOUT_SECONDS)
        self._asked_at = float("-inf")
        self._firing: frozenset[str] | None = None
        self._log = get_logger("system")

    def still_fires(self, firing: Firing) -> bool | None:
        """Whether it fires, and nobody silenced it; None: no answer."""
        if time.monotonic() - self._asked_at > FRESH_SECONDS:
            self._firing = self._ask()
            self._asked_at = time.monotonic()
        return None if self._firing is None else firing.fingerprint in self._firing

    def _ask(self) -> frozenset[str] | None:
        """Fingerprints of what fires; None without an answer."""
        try:
            return frozenset(
                alert.fingerprint
                for alert in self._alertmanager.alerts()
                if not alert.silenced_by and alert.state != "unprocessed"
            )
        except AlertmanagerError as error:
            self._log.warning("alertmanager_unreachable", url=self._alertmanager.url, error=str(error))
            return None
