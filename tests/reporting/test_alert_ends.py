"""When an alert of the sidecar's journal was over, as a report tells it."""

from __future__ import annotations

from pathlib import Path

from obsinfra.control.journal import AlertEntry, Journal
from obsinfra.reporting.gather import _alerts


def test_a_stack_that_was_started_anew_ends_what_fired_before(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    journal.add(
        [
            AlertEntry(heard, "TrainerGone", "mine", "critical", status, "f", began, status)
            for heard, began, status in (
                (110.0, 100.0, "firing"),
                (150.0, 140.0, "resolved"),  # of the Prometheus after the restart
                (210.0, 200.0, "firing"),
                (230.0, 200.0, "resolved"),
                (310.0, 300.0, "firing"),
            )
        ],
        [],
    )
    found = _alerts([], journal, "mine")
    journal.close()
    assert [(alert.at, alert.until) for alert in found] == [(100.0, 150.0), (200.0, 230.0), (300.0, None)]


def test_what_trainer_and_prometheus_both_judged_is_one_row(tmp_path: Path) -> None:
    """Of two hot devices each is one; what lies an hour apart is not the same."""
    hot = {"kind": "alert", "name": "HighGPUTemperature", "severity": "critical", "unit": "°C", "step": 7}
    records = [
        hot | {"at": at, "state": state, "labels": {"device": device}}
        for device, at, state in (
            ("0", 100.0, "firing"),
            ("1", 104.0, "firing"),
            ("2", 110.0, "firing"),  # which Prometheus did not see, and ended long before its next one
            ("0", 160.0, "resolved"),
            ("1", 170.0, "resolved"),
            ("2", 180.0, "resolved"),
        )
    ]
    journal = Journal(tmp_path / "journal.sqlite")
    journal.add(
        [
            AlertEntry(heard, name, "mine", "critical", status, fingerprint, began, "accepted")
            for heard, name, status, fingerprint, began in (
                (101.0, "HighGPUTemperature", "firing", "f0", 100.5),
                (105.0, "HighGPUTemperature", "firing", "f1", 104.5),
                (106.0, "HighMemory", "firing", "f2", 105.0),
                (161.0, "HighGPUTemperature", "resolved", "f0", 100.5),
                (171.0, "HighGPUTemperature", "resolved", "f1", 104.5),
                (3701.0, "HighGPUTemperature", "firing", "f0", 3700.0),
            )
        ],
        [],
    )
    found = _alerts(records, journal, "mine")
    journal.close()
    assert [(alert.at, alert.until, alert.name, alert.judged_by) for alert in found] == [
        (100.0, 161.0, "HighGPUTemperature (device 0)", "trainer, Prometheus"),
        (104.0, 171.0, "HighGPUTemperature (device 1)", "trainer, Prometheus"),
        (105.0, None, "HighMemory", "Prometheus"),
        (110.0, 180.0, "HighGPUTemperature (device 2)", "trainer"),
        (3700.0, None, "HighGPUTemperature", "Prometheus"),
    ]
