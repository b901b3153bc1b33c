"""A run's spans become a trace that Perfetto and chrome://tracing lay out, even after a crash."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsinfra.errors import DataError
from obsinfra.monitoring.chrome_trace import export_chrome_trace, find_span_files
from obsinfra.monitoring.tracing import create_tracer

START = 1_700_000_000_000_000_000
MS = 1_000_000


def line(name: str, start: int, end: int, *, kind: str = "", rank: int = 0) -> str:
    document = {
        "name": name,
        "trace_id": "a" * 32,
        "span_id": "b" * 16,
        "parent_id": None,
        "start_ns": START + start,
        "end_ns": START + end,
        "attributes": {"obsinfra.span": kind},
        "run": "r1",
        "model": "digits",
        "rank": rank,
    }
    return json.dumps(document) + "\n"


def export(folder: Path, text: str) -> dict[str, Any]:
    source = folder / "spans.jsonl"
    source.write_text(text)
    count = export_chrome_trace([source], folder / "trace.json")
    document = json.loads((folder / "trace.json").read_text())
    assert count == len(complete(document))
    return document


def complete(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in document["traceEvents"] if event["ph"] == "X"]


def assert_nested(events: list[dict[str, Any]]) -> None:
    """What both viewers need: on one track, two events are apart or one lies inside the other."""
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        tracks.setdefault((event["pid"], event["tid"]), []).append(
            (round(event["ts"] * 1000), round((event["ts"] + event["dur"]) * 1000))
        )
    for spans in tracks.values():
        for number, (start, end) in enumerate(spans):
            for other_start, other_end in spans[number + 1 :]:
                apart = other_start >= end or other_end <= start
                inside = (start <= other_start and other_end <= end) or (
                    other_start <= start and end <= other_end
                )
                assert apart or inside


def test_what_the_tracer_writes_is_what_the_trace_shows(tmp_path: Path) -> None:
    """From recorded timestamps through the span file to µs, one process a rank, steps with phases inside."""
    for rank in (0, 1):
        tracer = create_tracer(
            run_id="r1", model="digits", rank=rank, world_size=2, trace_file=tmp_path / "spans.jsonl"
        )
        tracer.start_run(START)
        tracer.start_epoch(0, START)
        tracer.emit_step(
            1,
            0,
            START + 10 * MS,
            START + 30 * MS,
            [("forward", START + 10 * MS, START + 20 * MS), ("backward", START + 20 * MS, START + 29 * MS)],
            {"obsinfra.loss": 0.5},
        )
        tracer.emit("checkpoint", START + 15 * MS, START + 40 * MS, {"obsinfra.kind": "regular"})
        tracer.close(10)
    files = find_span_files(tmp_path)
    assert [path.name for path in files] == ["spans.jsonl", "spans-rank1.jsonl"]
    assert export_chrome_trace(files, tmp_path / "trace.json") == 12

    document = json.loads((tmp_path / "trace.json").read_text())
    events = {(event["pid"], event["name"]): event for event in complete(document)}
    step, forward = events[0, "step 1"], events[0, "forward"]
    assert (step["ts"], step["dur"]) == (10_000, 20_000)
    assert (forward["ts"], forward["dur"]) == (10_000, 10_000)
    assert step["tid"] == forward["tid"] == events[0, "backward"]["tid"]
    assert events[0, "run"]["tid"] == events[0, "epoch 0"]["tid"]
    assert len({events[0, name]["tid"] for name in ("run", "step 1", "checkpoint")}) == 3
    assert step["args"]["obsinfra.loss"] == 0.5
    assert forward["args"]["parent_id"] == step["args"]["span_id"]
    assert (1, "step 1") in events
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in document["traceEvents"]
        if event["ph"] == "M" and event["name"] in ("thread_name", "process_name")
    }
    assert names[0, 0] == "rank 0 · r1 · digits"
    assert names[1, 0] == "rank 1 · r1 · digits"
    assert names[0, step["tid"]] == "steps"
    assert names[0, events[0, "checkpoint"]["tid"]] == "checkpoints"
    assert document["otherData"]["origin_ns"] == str(START)
    assert_nested(complete(document))


def test_a_line_torn_by_a_crash_is_left_out_and_counted(tmp_path: Path) -> None:
    whole = line("step 1", 0, 10, kind="step") + line("step 2", 10, 20, kind="step")
    document = export(tmp_path, whole + line("step 3", 20, 30)[:50])
    assert [event["name"] for event in complete(document)] == ["step 1", "step 2"]
    assert document["otherData"]["unreadable_lines"] == 1


@pytest.mark.parametrize(
    "bad",
    [
        "[]",
        "null",
        "{}",
        '"text"',
        line("x", 10, 5).strip(),
        line("x", 0, 1).replace('"rank": 0', '"rank": "zero"').strip(),
        line("x", 0, 1).replace(str(START), '"then"', 1).strip(),
        "[" * 100_000,
        "\x00\xff",
    ],
)
def test_lines_that_are_no_spans_are_left_out(tmp_path: Path, bad: str) -> None:
    document = export(tmp_path, line("a", 0, 1) + bad + "\n" + line("b", 1, 2))
    assert [event["name"] for event in complete(document)] == ["a", "b"]
    assert document["otherData"]["unreadable_lines"] == 1


def test_overlapping_checkpoints_stand_on_lanes_of_their_own(tmp_path: Path) -> None:
    """Two writes at once, neither within the other: drawn side by side, and the lane is used again later."""
    document = export(
        tmp_path,
        line("checkpoint", 0, 100, kind="checkpoint")
        + line("checkpoint", 50, 150, kind="checkpoint")
        + line("checkpoint", 160, 170, kind="checkpoint"),
    )
    first, second, third = (event["tid"] for event in complete(document))
    assert first == third != second
    assert_nested(complete(document))


def test_a_run_without_spans_is_an_empty_trace(tmp_path: Path) -> None:
    assert complete(export(tmp_path, "")) == []


def test_rotated_files_are_found_oldest_first_and_nothing_else(tmp_path: Path) -> None:
    for name in ("spans.jsonl", "spans.jsonl.1", "spans.jsonl.10", "spans.jsonl.2", "spans-rank1.jsonl"):
        (tmp_path / name).write_text("")
    for name in ("spans.jsonl.tmp", "other.jsonl", "spans.json"):
        (tmp_path / name).write_text("")
    assert [path.name for path in find_span_files(tmp_path)] == [
        "spans.jsonl.10",
        "spans.jsonl.2",
        "spans.jsonl.1",
        "spans.jsonl",
        "spans-rank1.jsonl",
    ]


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*gone\.jsonl"):
        export_chrome_trace([tmp_path / "gone.jsonl"], tmp_path / "trace.json")
    assert not (tmp_path / "trace.json").exists()
    with pytest.raises(DataError, match="cannot write"):
        export_chrome_trace([], tmp_path / "no" / "trace.json")


times = st.integers(0, 30)
spans = st.lists(
    st.tuples(times, times, st.sampled_from(["step", "phase", "checkpoint", "command", "run", "else"])),
    max_size=12,
)


@given(spans)
def test_whatever_the_spans_every_track_nests(
    tmp_path_factory: pytest.TempPathFactory, found: list[tuple[int, int, str]]
) -> None:
    folder = tmp_path_factory.mktemp("trace")
    text = "".join(line("x", min(a, b), max(a, b), kind=kind) for a, b, kind in found)
    document = export(folder, text)
    assert len(complete(document)) == len(found)
    assert_nested(complete(document))
    starts = [event["ts"] for event in complete(document)]
    assert all(earlier <= later for earlier, later in pairwise(starts))


def test_of_the_sidecars_spans_those_of_the_runs_own_traces_are_shown_beside_it(tmp_path: Path) -> None:
    """A command's trace begins in the sidecar; alerts of other runs have no place in this run's picture."""
    run, sidecar = tmp_path / "spans.jsonl", tmp_path / "sidecar.jsonl"
    run.write_text(line("command stop", 5 * MS, 6 * MS, kind="command"))
    elsewhere = line("alert Other", 0, MS, kind="alert").replace("a" * 32, "c" * 32)
    sidecar.write_text(
        line("alert HighMemory", MS, 2 * MS, kind="alert").replace('"r1"', '"sidecar"') + elsewhere
    )
    assert export_chrome_trace([run], tmp_path / "trace.json", beside=[sidecar]) == 2
    document = json.loads((tmp_path / "trace.json").read_text())
    assert {event["name"] for event in complete(document)} == {"command stop", "alert HighMemory"}
    processes = {
        event["pid"]: event["args"]["name"]
        for event in document["traceEvents"]
        if event["name"] == "process_name"
    }
    assert sorted(processes.values()) == ["rank 0 · r1 · digits", "sidecar"]
