"""Who acts on an alert: the sidecar while one is alive, else this process, through the same queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from obsinfra.alerting.evaluator import AlertStatus
from obsinfra.catalog.actions import PAUSE
from obsinfra.control.command import Command, new_command
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.run.folder import RunFolder


class AlertDuty:
    """Turns firing alerts into commands while no sidecar watches the run.

    Args:
        folder: whose control folder holds the sidecar's heartbeat.
        submit: puts a command into the control channel.
    """

    def __init__(self, folder: RunFolder, submit: Callable[[Command], object]) -> None:
        self._folder = folder
        self._submit = submit
        self._seen: dict[str, bool] = {}
        self._log = get_logger("errors")

    def mode(self) -> str:
        """`sidecar` or `in-process`."""
        return "sidecar" if self._folder.sidecar_alive(time.time()) else "in-process"

    def page(self) -> str | None:
        """Where the page of all runs is; None without a sidecar."""
        return self._folder.sidecar_page(time.time())

    def consider(self, alerts: Sequence[AlertStatus]) -> None:
        """Called after each evaluation with everything pending or firing.

        Each firing is logged once. Its action is submitted once, and only without a sidecar: an alert that
        was the sidecar's and still fires after the sidecar died is acted on here.
        """
        firing = {_key(status): status for status in alerts if status.state == "firing"}
        for key in self._seen.keys() - firing.keys():
            del self._seen[key]
        for key, status in firing.items():
            alert = status.alert
            if key not in self._seen:
                self._seen[key] = False
                self._log.warning(
                    "alert_firing",
                    alert=alert.name,
                    severity=alert.severity,
                    value=status.value,
                    limit=alert.limit,
                    action=alert.action.name if alert.action else None,
                    acts=self.mode(),
                    **{f"label_{name}": value for name, value in status.labels.items()},
                )
            if self._seen[key] or alert.action is None or self.mode() == "sidecar":
                continue
            self._seen[key] = True
            self._submit(
                new_command(
                    self._folder.id,
                    alert.action.name,
                    source="in-process",
                    reason=f"alert {alert.name}",
                    args={} if alert.action is PAUSE else {"alert": alert.name},  # nobody here ends it
                    id=f"inproc-{alert.name}-{int(status.since * 1000)}",
                )
            )


def _key(status: AlertStatus) -> str:
    return status.alert.name + "".join(f"|{name}={value}" for name, value in sorted(status.labels.items()))
