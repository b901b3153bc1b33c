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
