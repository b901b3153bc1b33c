"""Whether Alertmanager still answers: without it a Prometheus that fires reaches nobody.

Run by the sidecar beside its watch over runs, which lets its heartbeats lapse while this says no.
"""

from __future__ import annotations

import threading
import time

from obsinfra.control.alertmanager import Alertmanager, AlertmanagerError
from obsinfra.monitoring.logging_config import get_logger

ASK_SECONDS = 2.0
TIMEOUT_SECONDS = 3.0
SILENT_SECONDS = 15.0
"""A supervisor brings a killed Alertmanager back sooner, and its alerts with it: long enough for that."""


class AlertmanagerWatch:
    """Asks one Alertmanager every `ASK_SECONDS` whether it is ready, from `start` to `stop`.

    Args:
        url: its address, without a path of the API.
        silent_seconds: how long without an answer counts as gone; it has that long from the start, too.
    """

    def __init__(self, url: str, silent_seconds: float = SILENT_SECONDS) -> None:
        self._alertmanager = Alertmanager(url, TIMEOUT_SECONDS)
        self._silent_seconds = silent_seconds
        self._heard_at = time.monotonic()
        self._gone = False
        self._ending = threading.Event()
        self._log = get_logger("system")
        self._thread = threading.Thread(target=self._watch, name="obsinfra-alertmanager-watch", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._heard_at = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * TIMEOUT_SECONDS)

    @property
    def answers(self) -> bool:
        """Whether it answered lately."""
        return time.monotonic() - self._heard_at < self._silent_seconds

    def _watch(self) -> None:
        while not self._ending.is_set():
            try:
                self._alertmanager.ready()
                self._heard_at = time.monotonic()
            except AlertmanagerError as error:
                if not self._gone and not self.answers:
                    self._gone = True
                    self._log.error("alertmanager_gone", error=str(error), acts="each trainer for itself")
            else:
                if self._gone:
                    self._gone = False
                    self._log.info("alertmanager_back", url=self._alertmanager.url)
            self._ending.wait(ASK_SECONDS)
