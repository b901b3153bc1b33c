"""What the sidecar did about the alerts that fire, and what came of it, as metrics.

The rules look it up, so that the message about an alert tells it. Reads the journal; decides nothing.
"""

from __future__ import annotations

import sqlite3
import time

from obsinfra.catalog.metrics import SIDECAR_ACTION_SECONDS, SIDECAR_ACTION_STEP
from obsinfra.control.journal import ActionTaken, Journal
from obsinfra.control.run_watch import RunWatch
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.sample import Sample

UNDER_WAY = "under_way"
"""The outcome of what has none yet."""

MOST_FIRINGS = 500
"""Of so many the newest are told: what fires in a storm of alerts must not swell a scrape."""

KEPT_SECONDS = 3_600.0
"""What was done about an alert of a run that ended is told so long, should the alert's end go unheard."""


class Outcomes:
    """The metrics of `journal`'s open firings.

    Args:
        journal: what was decided and done.
        watch: which runs live.
    """

    def __init__(self, journal: Journal, watch: RunWatch) -> None:
        self._journal, self._watch = journal, watch
        self._failed = False
        self._log = get_logger("system")

    def samples(self) -> list[Sample]:
        """As of now; none while the journal cannot be read, which is logged once."""
        try:
            taken = self._journal.actions_taken(MOST_FIRINGS)
            self._failed = False
        except sqlite3.Error as error:
            if not self._failed:
                self._log.error("journal_not_read", path="/metrics", error=str(error))
            self._failed = True
            return []
        now = time.time()
        if not taken:
            return []
        live = {run.folder.id for run in self._watch.runs() if run.live}
        samples = []
        for one in taken:
            if one.run in live or now - (one.settled_at or one.received_at) < KEPT_SECONDS:
                samples += _samples(one, now)
        return samples


def _samples(taken: ActionTaken, now: float) -> list[Sample]:
    of = {"run": taken.run, "alert": taken.alert, "action": taken.action}
    outcome, until = taken.outcome, taken.settled_at
    if outcome is None:
        outcome, until = UNDER_WAY, now
    seconds = 0.0 if until is None else max(0.001, until - taken.received_at)  # never 0: it was not held back
    samples = [Sample(SIDECAR_ACTION_SECONDS, of | {"outcome": outcome}, seconds)]
    if taken.step is not None:
        samples.append(Sample(SIDECAR_ACTION_STEP, of, float(taken.step)))
    return samples
