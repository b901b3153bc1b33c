"""Notifications as real Alertmanagers sent them (`record_payloads.py`), replayed to the sidecar."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sidecar_face import Face
from waiting import wait_for

from obsinfra.control.command import Command

PAYLOADS = sorted((Path(__file__).parent / "payloads").glob("*.json"))
VERSIONS = ("0.25", "0.33")
SCENES = {"one": 1, "devices": 3, "host": 1, "informs": 1, "odd-texts": 1, "truncated": 5}


def recorded(version: str, scene: str, status: str) -> Any:
    """A notification, its moments moved to the present: what is a day old is not acted on."""
    path = Path(__file__).parent / "payloads" / f"alertmanager-{version}-{scene}-{status}.json"
    document = json.loads(path.read_bytes())
    recently = datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=5)
    for alert in document["alerts"]:
        then = datetime.fromisoformat(alert["startsAt"])
        first = datetime.fromisoformat(min(one["startsAt"] for one in document["alerts"]))
        alert["startsAt"] = (recently + (then - first)).isoformat()
    return document


def test_the_corpus_is_complete() -> None:
    wanted = [
        f"alertmanager-{version}-{scene}-{status}.json"
        for version in VERSIONS
        for scene in SCENES
        for status in ("firing", "resolved")
    ]
    assert sorted(wanted) == [path.name for path in PAYLOADS]


@pytest.mark.parametrize("path", PAYLOADS, ids=lambda path: path.stem)
def test_every_recorded_notification_is_understood_as_it_came(face: Face, path: Path) -> None:
    answer = face.post(path.read_bytes())
    assert answer.status_code == 200, answer.text
    alerts = json.loads(path.read_bytes())["alerts"]
    assert sum(answer.json().values()) == len(alerts)
    heard = face.sidecar.journal.alerts()
    assert sorted(entry.fingerprint for entry in heard) == sorted(alert["fingerprint"] for alert in alerts)
    assert sorted(entry.name for entry in heard) == sorted(alert["labels"]["alertname"] for alert in alerts)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("scene", SCENES)
def test_firing_and_resolved_of_one_alert_meet(
    face: Face, executed: list[Command], version: str, scene: str
) -> None:
    firing, resolved = (recorded(version, scene, status) for status in ("firing", "resolved"))
    begun = {alert["fingerprint"]: alert["startsAt"] for alert in firing["alerts"]}
    for alert in resolved[
        "alerts"
    ]:  # of a truncated notification, another part may have come the second time
        alert["startsAt"] = begun.get(alert["fingerprint"], alert["startsAt"])
    actions = Counter(alert["labels"].get("action", "") for alert in firing["alerts"])
    del actions[""]
    assert face.post(firing).json() == ({"accepted": actions.total()} if actions else {"informed": 1})
    wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
    assert Counter(command.action for command in executed) == actions
    assert face.post(firing).json() == ({"duplicate": actions.total()} if actions else {"informed": 1})
    assert face.post(resolved).json() == {"resolved": len(resolved["alerts"])}
    left = {entry.fingerprint for entry in face.sidecar.journal.firing()}
    assert left == begun.keys() - {alert["fingerprint"] for alert in resolved["alerts"]} - (
        set() if actions else begun.keys()
    )


def test_texts_of_any_kind_reach_the_command(face: Face, executed: list[Command]) -> None:
    face.post(recorded("0.33", "odd-texts", "firing"))
    wait_for(lambda: executed, "executed")
    assert executed[0].reason == "alert Odd: two\nlines <b>&amp;</b>"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_format_is_the_documented_one(version: str) -> None:
    document = recorded(version, "one", "firing")
    assert document["version"] == "4" and document["truncatedAlerts"] == 0
    assert recorded(version, "truncated", "firing")["truncatedAlerts"] > 0
