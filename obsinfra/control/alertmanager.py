"""Asking a running Alertmanager, API v2, and telling it: alerts, silences, its count of deliveries.

Called by the sidecar's `firing_check`, `obsinfra alerts` and the notification check. Knows nothing of how
Alertmanager was started.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from obsinfra.errors import UserError

TIMEOUT_SECONDS = 10.0


class AlertmanagerError(UserError):
    """Alertmanager does not answer, or refused what it was asked."""


@dataclass(frozen=True, slots=True)
class FiringAlert:
    """An alert as Alertmanager has it.

    Attributes:
        state: `active`, `suppressed` (silenced or inhibited) or `unprocessed` (just arrived).
        silenced_by, inhibited_by: ids of silences, fingerprints of alerts.
        receivers: names of the receivers its routes lead to.
        started: when it began to fire, UTC.
        fingerprint: hash of its labels, by which webhooks name it too.
    """

    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    state: str
    silenced_by: tuple[str, ...]
    inhibited_by: tuple[str, ...]
    receivers: tuple[str, ...]
    started: datetime
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Silence:
    """A silence that holds now or will; `matchers` as a person writes them: `run="r"`."""

    id: str
    matchers: tuple[str, ...]
    ends: datetime
    comment: str
    by: str


@dataclass(frozen=True, slots=True)
class Attempts:
    """How often Alertmanager tried to send with one integration since its start, and how often in vain."""

    tried: int
    failed: int

    @property
    def delivered(self) -> int:
        """Attempts that the other side accepted."""
        return self.tried - self.failed


@dataclass(frozen=True, slots=True)
class Alertmanager:
    """One Alertmanager.

    Attributes:
        url: `http://host:port`, with a path if it is served under one.
        timeout_seconds: for one question.
    """

    url: str
    timeout_seconds: float = TIMEOUT_SECONDS

    def alerts(self) -> list[FiringAlert]:
        """All alerts it holds, those that began first first."""
        with self._understood():
            found = [_alert(document) for document in self._list("/api/v2/alerts")]
        return sorted(found, key=lambda alert: (alert.started, sorted(alert.labels.items())))

    def silences(self) -> list[Silence]:
        """Silences that hold now or will, those that end first first."""
        with self._understood():
            found = [
                Silence(
                    id=document["id"],
                    matchers=tuple(_matcher(matcher) for matcher in document["matchers"]),
                    ends=_moment(document["endsAt"]),
                    comment=document["comment"],
                    by=document["createdBy"],
                )
                for document in self._list("/api/v2/silences")
                if document["status"]["state"] != "expired"
            ]
        return sorted(found, key=lambda silence: silence.ends)

    def silence(self, labels: Mapping[str, str], seconds: float, *, comment: str, by: str) -> Silence:
        """Let nobody hear of alerts with all these label values, from now on for so long.

        Raises:
            AlertmanagerError: it does not answer or refuses.
        """
        now = datetime.now(UTC)
        ends = now + timedelta(seconds=seconds)
        document: dict[str, Any] = {
            "matchers": [
                {"name": name, "value": value, "isRegex": False, "isEqual": True}
                for name, value in labels.items()
            ],
            "startsAt": now.isoformat(),
            "endsAt": ends.isoformat(),
            "comment": comment,
            "createdBy": by,
        }
        matchers = tuple(_matcher(matcher) for matcher in document["matchers"])
        with self._understood():
            id = str(self._json("POST", "/api/v2/silences", document)["silenceID"])
        return Silence(id=id, matchers=matchers, ends=ends, comment=comment, by=by)

    def end_silence(self, id: str) -> None:
        """End a silence now.

        Raises:
            AlertmanagerError: there is none with this id, or it does not answer.
        """
        if id not in {silence.id for silence in self.silences()}:
            raise AlertmanagerError(
                f"no silence {id!r} at {self.url}", "the id of one that holds", "see 'obsinfra alerts list'"
            )
        self._json("DELETE", f"/api/v2/silence/{id}")

    def ready(self) -> None:
        """Returns if it is ready to take alerts.

        Raises:
            AlertmanagerError: it does not answer, or is not ready.
        """
        self._ask("GET", "/-/ready")

    def started(self) -> datetime:
        """When it was started, UTC. It had forgotten all alerts then, but not the silences."""
        with self._understood():
            return _moment(self._json("GET", "/api/v2/status")["uptime"])

    def receivers(self) -> frozenset[str]:
        """Names of the receivers of its configuration."""
        with self._understood():
            return frozenset(document["name"] for document in self._list("/api/v2/receivers"))

    def post(
        self, labels: Mapping[str, str], annotations: Mapping[str, str], *, starts: datetime, ends: datetime
    ) -> None:
        """Send an alert as Prometheus does; with `ends` in the past it is resolved.

        Without a start, Alertmanager would take the end for it.
        """
        document = {
            "labels": dict(labels),
            "annotations": dict(annotations),
            "startsAt": starts.isoformat(),
            "endsAt": ends.isoformat(),
        }
        self._json("POST", "/api/v2/alerts", [document])

    def attempts(self, integration: str) -> Attempts:
        """Its counts for `slack`, `email`, `webhook` or `pagerduty`, over all receivers of that kind."""
        text = self._ask("GET", "/metrics").text
        sums = {"alertmanager_notification_requests": 0.0, "alertmanager_notification_requests_failed": 0.0}
        with self._understood():
            for family in text_string_to_metric_families(text):
                if family.name in sums:
                    for sample in family.samples:
                        if sample.labels.get("integration") == integration and sample.name.endswith("_total"):
                            sums[family.name] += sample.value
        tried, failed = sums.values()
        return Attempts(int(tried), int(failed))

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        """Whatever else answers at the address is no Alertmanager, which one line can say."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AlertmanagerError(
                f"what answers at {self.url} is no Alertmanager ({error!r})", "one of version 0.25 or newer"
            ) from None

    def _list(self, path: str) -> list[Any]:
        found = self._json("GET", path)
        if not isinstance(found, list):
            raise TypeError(f"{path} is no list")
        return found

    def _json(self, method: str, path: str, document: Any = None) -> Any:
        answer = self._ask(method, path, document)
        if not answer.content:
            return None
        try:
            return answer.json()
        except ValueError:
            raise AlertmanagerError(f"{self.url}{path} answered with no JSON", "an Alertmanager") from None

    def _ask(self, method: str, path: str, document: Any = None) -> httpx.Response:
        try:
            # trust_env off: a proxy of the environment must not be asked for this machine's own ports.
            with httpx.Client(trust_env=False, timeout=self.timeout_seconds) as client:
                answer = client.request(method, self.url.rstrip("/") + path, json=document)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise AlertmanagerError(
                f"no answer from Alertmanager at {self.url}: {error}",
                "a running Alertmanager",
                "start the stack with 'obsinfra up', or correct --alertmanager",
            ) from None
        if answer.status_code >= 400:
            said = f"{answer.status_code} {answer.text[:300]}"
            raise AlertmanagerError(f"Alertmanager at {self.url} refused {method} {path}: {said}")
        return answer


def _alert(document: Mapping[str, Any]) -> FiringAlert:
    status = document["status"]
    return FiringAlert(
        labels=document["labels"],
        annotations=document["annotations"],
        state=status["state"],
        silenced_by=tuple(status["silencedBy"]),
        inhibited_by=tuple(status["inhibitedBy"]),
        receivers=tuple(receiver["name"] for receiver in document["receivers"]),
        started=_moment(document["startsAt"]),
        fingerprint=document["fingerprint"],
    )


def _matcher(document: Mapping[str, Any]) -> str:
    equal = document.get("isEqual", True)
    sign = ("=~" if equal else "!~") if document["isRegex"] else ("=" if equal else "!=")
    return f'{document["name"]}{sign}"{document["value"]}"'


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)
