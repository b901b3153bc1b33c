"""A run's span files as one Chrome trace, which https://ui.perfetto.dev and chrome://tracing open.

For `obsinfra trace export`. The format: "Trace Event Format", complete events (`ph` X), times in µs.
Reads what `span_delivery.FileDelivery` writes; knows no OpenTelemetry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from obsinfra.errors import DataError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.run.files import write_atomic

TRACKS = {"run": 1, "epoch": 1, "step": 2, "phase": 2, "checkpoint": 3, "command": 4}
"""Track of each kind of span, from the top down; phases lie inside their step."""

TRACK_NAMES = {1: "run and epochs", 2: "steps", 3: "checkpoints", 4: "commands", 5: "other"}
OTHER_TRACK = 5
BESIDE = 1_000_000
"""Process number of the program beside the run, behind all ranks."""

LANES = 100
"""Spans of a track that overlap without one containing the other go to further lanes of it."""


@dataclass(frozen=True, slots=True)
class _Span:
    rank: int
    name: str
    start_ns: int
    end_ns: int
    kind: str
    document: dict[str, Any]


def find_span_files(folder: Path) -> list[Path]:
    """Every span file in a run's `traces` folder, rotated ones and other ranks' included, oldest first."""

    def age(path: Path) -> tuple[str, int]:
        stem, _, number = path.name.partition(".jsonl")
        return stem, -int(number.lstrip(".") or 0)

    found = (path for path in folder.glob("spans*.jsonl*") if re.search(r"\.jsonl(\.\d+)?$", path.name))
    return sorted(found, key=age)


def export_chrome_trace(spans_files: Sequence[Path], out: Path, *, beside: Sequence[Path] = ()) -> int:
    """Write the spans of all `spans_files` to `out`, whole or not at all.

    Lines that are no spans (a process was killed while writing) are left out, counted in the trace's
    `otherData.unreadable_lines` and logged. Times are relative to `otherData.origin_ns`.

    Args:
        spans_files: JSON lines as the tracer writes them, of any number of ranks and restarts.
        out: the trace; its folder must exist.
        beside: span files of another program (the sidecar); of these, what belongs to a trace that the run
            takes part in is shown as a process of its own.

    Returns:
        Spans written.

    Raises:
        DataError: a file cannot be read, or `out` cannot be written.
    """
    spans: list[_Span] = []
    unreadable = 0
    for path in spans_files:
        for span in _read(path):
            if span is None:
                unreadable += 1
            else:
                spans.append(span)
    traces = {span.document.get("trace_id") for span in spans}
    for path in beside:
        spans += [
            replace(span, rank=BESIDE)
            for span in _read(path)
            if span is not None and span.document.get("trace_id") in traces
        ]
    if unreadable:
        get_logger("system").warning("spans_unreadable", lines=unreadable)
    # Parents before children where both start together, so that a lane nests them.
    spans.sort(key=lambda span: (span.rank, span.start_ns, -span.end_ns))
    origin = min((span.start_ns for span in spans), default=0)
    document = {
        "traceEvents": [*_names(spans), *_events(spans, origin)],
        "displayTimeUnit": "ms",
        "otherData": {"origin_ns": str(origin), "unreadable_lines": unreadable, "producer": "obsinfra"},
    }
    try:
        write_atomic(out, json.dumps(document, separators=(",", ":"), allow_nan=False), mode=0o644)
    except OSError as error:
        raise DataError(
            f"cannot write {out}: {error.strerror or error}",
            "a file in an existing, writable folder",
            "choose another --out",
        ) from error
    return len(spans)


def _read(path: Path) -> Iterator[_Span | None]:
    """The spans of one file; None for each line that is none."""
    try:
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    yield _span(line)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", "a run's span file") from error


def _span(line: bytes) -> _Span | None:
    try:
        document = json.loads(line)
        start, end = document["start_ns"], document["end_ns"]
        if type(start) is not int or type(end) is not int or end < start:
            return None
        kind = str(document["attributes"].get("obsinfra.span", ""))
        return _Span(int(document["rank"]), str(document["name"]), start, end, kind, document)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _track(span: _Span) -> int:
    return TRACKS.get(span.kind, OTHER_TRACK)


def _names(spans: Sequence[_Span]) -> Iterator[dict[str, Any]]:
    """Metadata events: what processes (ranks) and threads (tracks) are called, and their order."""
    last = {span.rank: span for span in spans}
    for rank, span in sorted(last.items()):
        about = span.document
        run = str(about.get("run", ""))
        name = run if rank == BESIDE else f"rank {rank} · {run} · {about.get('model', '')}"
        yield {"ph": "M", "pid": rank, "tid": 0, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": rank, "tid": 0, "name": "process_sort_index", "args": {"sort_index": rank}}


def _events(spans: Sequence[_Span], origin: int) -> Iterator[dict[str, Any]]:
    """Complete events, and the names of the lanes they turn out to need."""
    lanes: dict[tuple[int, int], list[list[int]]] = {}
    for span in spans:
        track = _track(span)
        open_lanes = lanes.setdefault((span.rank, track), [])
        number = _lane(open_lanes, span)
        tid = track * LANES + number
        if number == len(open_lanes):
            open_lanes.append([])
            name = TRACK_NAMES[track] + (f" ({number + 1})" if number else "")
            yield {"ph": "M", "pid": span.rank, "tid": tid, "name": "thread_name", "args": {"name": name}}
            yield {
                "ph": "M",
                "pid": span.rank,
                "tid": tid,
                "name": "thread_sort_index",
                "args": {"sort_index": tid},
            }
        open_lanes[number].append(span.end_ns)
        about = span.document
        ids = {key: about.get(key) for key in ("trace_id", "span_id", "parent_id")}
        yield {
            "ph": "X",
            "pid": span.rank,
            "tid": tid,
            "name": span.name,
            "cat": span.kind or "span",
            "ts": (span.start_ns - origin) / 1000,
            "dur": (span.end_ns - span.start_ns) / 1000,
            "args": {**about["attributes"], **ids},
        }


def _lane(lanes: list[list[int]], span: _Span) -> int:
    """The first lane where `span` overlaps nothing, or lies inside what it overlaps; len(lanes) when none.

    A lane is the stack of ends of the spans open at `span`'s start; those that ended are taken off.
    """
    for number, ends in enumerate(lanes):
        while ends and ends[-1] <= span.start_ns:
            ends.pop()
        if not ends or ends[-1] >= span.end_ns:
            return number
    return len(lanes)
