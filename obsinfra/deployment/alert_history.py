"""Which alerts fired when, as Prometheus remembers it. Called by `obsinfra alerts history`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx

from obsinfra.errors import UserError

MAX_POINTS = 10_000
"""Prometheus answers at most 11,000 points a series."""

TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Firing:
    """One stretch of time in which an alert fired.

    Attributes:
        labels: the alert's, `alertname` among them.
        began, ended: UTC, exact to `step_seconds`; `ended` is None while it fires.
        step_seconds: the resolution; a shorter firing between two points is not seen.
    """

    labels: Mapping[str, str]
    began: datetime
    ended: datetime | None
    step_seconds: float


def read_history(
    url: str, seconds: float, *, run: str | None = None, alert: str | None = None
) -> list[Firing]:
    """What fired in the last so many seconds, by beginning.

    Args:
        url: Prometheus, `http://host:port`.
        run, alert: only of this run, only of this name.

    Raises:
        UserError: Prometheus does not answer, or refuses.
    """
    step = max(1, math.ceil(seconds / MAX_POINTS))
    end = math.floor(time.time())
    wanted = {"alertstate": "firing", "run": run, "alertname": alert}
    # A JSON string is a valid PromQL string too.
    chosen = ",".join(
        f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in wanted.items() if value
    )
    document = _ask(
        url, {"query": f"ALERTS{{{chosen}}}", "start": end - int(seconds), "end": end, "step": step}
    )
    try:
        found = [firing for series in document["data"]["result"] for firing in _stretches(series, step, end)]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(
            f"what answers at {url} is no Prometheus ({error!r})",
            "the address of one",
            "correct --prometheus",
        ) from None
    return sorted(found, key=lambda firing: (firing.began, sorted(firing.labels.items())))


def _stretches(series: Mapping[str, Any], step: int, end: int) -> list[Firing]:
    labels = {k: v for k, v in series["metric"].items() if k not in ("__name__", "alertstate")}
    moments = [int(float(moment)) for moment, _ in series["values"]]
    starts = [0] + [i for i in range(1, len(moments)) if moments[i] - moments[i - 1] > step]
    found = []
    for first, after in zip(starts, [*starts[1:], len(moments)], strict=True):
        last = moments[after - 1]
        ended = None if last + step > end else datetime.fromtimestamp(last + step, UTC)
        found.append(Firing(labels, datetime.fromtimestamp(moments[first], UTC), ended, step))
    return found


def _ask(url: str, parameters: Mapping[str, Any]) -> Any:
    try:
        with httpx.Client(trust_env=False, timeout=TIMEOUT_SECONDS) as client:
            answer = client.get(f"{url.rstrip('/')}/api/v1/query_range", params=dict(parameters))
        document = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise UserError(
            f"no answer from Prometheus at {url}: {error}",
            "a running Prometheus",
            "start the stack with 'obsinfra up', or correct --prometheus",
        ) from None
    if not isinstance(document, dict) or document.get("status") != "success":
        raise UserError(f"Prometheus at {url} refused: {str(document)[:300]}")
    return document
