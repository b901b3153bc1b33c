"""The last slow steps of a run, out of its span files. Read by the sidecar's page and by reports.

A step is slow by the recorder's own judgement when it was traced (`obsinfra.reason`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obsinfra.monitoring.chrome_trace import find_span_files

TAIL_BYTES = 2 << 20
"""Of a span file, from its end backwards: some thousand steps. Older ones are in the trace export."""

ALL_BYTES = 16 << 20
"""Of all ranks' span files together."""

_PHASE = '"obsinfra.span": "phase"'
_SLOW = '"obsinfra.reason": "slow"'


@dataclass(frozen=True, slots=True)
class SlowStep:
    """One slow step.

    Attributes:
        at: when it ended, epoch seconds.
        step, epoch, rank: which.
        seconds: how long it took.
        phases: seconds by phase, the longest first; what they leave of `seconds` was outside any phase.
        trace_id: of its trace, 32 hex digits.
    """

    at: float
    step: int
    epoch: int
    rank: int
    seconds: float
    phases: Mapping[str, float]
    trace_id: str


def slow_steps(traces: Path, limit: int = 20) -> list[SlowStep]:
    """The last slow steps of all ranks, newest first.

    Args:
        traces: the run's folder of span files.
        limit: at most so many.
    """
    files = [path for path in find_span_files(traces) if path.suffix == ".jsonl"]
    share = min(TAIL_BYTES, ALL_BYTES // max(1, len(files)))
    found = [step for path in files for step in _of_file(path, share)]
    return sorted(found, key=lambda step: step.at, reverse=True)[:limit]


def _of_file(path: Path, share: int) -> list[SlowStep]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - share))
            raw = file.read(share)
    except OSError:
        return []
    if size > share:
        raw = raw.partition(b"\n")[2]
    lines = raw.decode(errors="replace").splitlines()
    slow = {span["span_id"]: span for line in lines if _SLOW in line and (span := _span(line)) is not None}
    phases: dict[str, dict[str, float]] = {id: {} for id in slow}
    for line in lines:
        if _PHASE in line and (span := _span(line)) is not None and span.get("parent_id") in phases:
            own = phases[span["parent_id"]]
            own[str(span["name"])] = own.get(str(span["name"]), 0.0) + _seconds(span)
    steps = []
    for id, span in slow.items():
        attributes = span["attributes"]
        try:
            steps.append(
                SlowStep(
                    at=span["end_ns"] / 1e9,
                    step=int(attributes["obsinfra.step"]),
                    epoch=int(attributes["obsinfra.epoch"]),
                    rank=int(span.get("rank", 0)),
                    seconds=_seconds(span),
                    phases=dict(sorted(phases[id].items(), key=lambda item: -item[1])),
                    trace_id=str(span["trace_id"]),
                )
            )
        except (KeyError, TypeError, ValueError):
            continue
    return steps


def _span(line: str) -> dict[str, Any] | None:
    """The span of a line; None where it is none, as the last one of a killed trainer may be."""
    try:
        span = json.loads(line)
        sound = (
            isinstance(span["span_id"], str)
            and isinstance(span["attributes"], dict)
            and isinstance(span["start_ns"], int)
            and isinstance(span["end_ns"], int)
        )
    except (ValueError, KeyError, TypeError):
        return None
    return span if sound else None


def _seconds(span: Mapping[str, Any]) -> float:
    return max(0.0, float(span["end_ns"] - span["start_ns"]) / 1e9)
