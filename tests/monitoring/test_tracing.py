"""Spans reach a real OTLP receiver and a file as the tree they describe; no receiver holds training up."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from otlp_receiver import Receiver, wait_for

from obsinfra.alerting.messages import jaeger_search
from obsinfra.errors import ConfigError
from obsinfra.monitoring.tracing import (
    TraceParent,
    Tracer,
    collector_answers,
    create_tracer,
    format_traceparent,
    null_tracer,
    parse_traceparent,
)

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND


@pytest.fixture(autouse=True)
def _no_otel_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as running:
        yield running


def tracer_to(endpoint: str | None = None, file: Path | None = None, **more: Any) -> Tracer:
    return create_tracer(run_id="r1", model="digits", endpoint=endpoint, trace_file=file, **more)


def trace_one_step(tracer: Tracer, **more: Any) -> str:
    return tracer.emit_step(
        7,
        3,
        START + 10,
        START + 90,
        [("forward", START + 10, START + 40), ("backward", START + 40, START + 80)],
        {"obsinfra.loss": 0.5},
        **more,
    )


def closed_port() -> str:
    """An address nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_tree_is_run_epoch_step_phases(receiver: Receiver) -> None:
    """Every span has the parent, the times and the attributes it was recorded with, in one trace."""
    tracer = tracer_to(receiver.endpoint, rank=2, world_size=4)
    tracer.start_run(START, {"obsinfra.device": "cpu"})
    tracer.start_epoch(3, START + 5)
    trace_id = trace_one_step(tracer, reason="slow")
    tracer.end_epoch(START + 100)
    tracer.close(10)

    run, epoch, step = (receiver.named(name) for name in ("run", "epoch 3", "step 7"))
    forward, backward = receiver.named("forward"), receiver.named("backward")
    assert {span.trace_id for span in receiver.spans} == {trace_id}
    assert run.parent_id == ""
    assert epoch.parent_id == run.span_id
    assert step.parent_id == epoch.span_id
    assert (forward.parent_id, backward.parent_id) == (step.span_id, step.span_id)
    assert (epoch.start_ns, epoch.end_ns) == (START + 5, START + 100)
    assert (step.start_ns, step.end_ns) == (START + 10, START + 90)
    assert (backward.start_ns, backward.end_ns) == (START + 40, START + 80)
    assert run.attributes["obsinfra.device"] == "cpu"
    assert step.attributes == {
        "obsinfra.span": "step",
        "obsinfra.step": 7,
        "obsinfra.epoch": 3,
        "obsinfra.reason": "slow",
        "obsinfra.loss": 0.5,
    }
    assert step.resource["service.name"] == "obsinfra"
    link = parse_qs(urlsplit(jaeger_search("http://jaeger:16686").replace("{run}", "r1")).query)
    assert link["service"] == [step.resource["service.name"]]
    assert json.loads(link["tags"][0]).items() <= step.resource.items()
    assert step.resource["service.instance.id"] == "r1/2"
    assert step.resource["host.name"] == socket.gethostname()
    assert step.resource["process.pid"] == os.getpid()
    assert (tracer.created, tracer.exported, tracer.dropped, tracer.errors) == (5, 5, 0, 0)


def test_a_step_reported_late_belongs_to_its_own_epoch(receiver: Receiver) -> None:
    tracer = tracer_to(receiver.endpoint)
    tracer.start_run(START)
    tracer.start_epoch(3, START)
    tracer.start_epoch(4, START + 100)
    trace_one_step(tracer)
    tracer.close(10)
    assert receiver.named("step 7").parent_id == receiver.named("epoch 3").span_id
    assert receiver.named("epoch 3").end_ns == START + 100


def test_a_nonfinite_step_is_marked_as_an_error(receiver: Receiver) -> None:
    tracer = tracer_to(receiver.endpoint)
    trace_one_step(tracer, reason="nonfinite")
    tracer.close(10)
    assert receiver.named("step 7").status == 2
    assert receiver.named("forward").status == 0


def test_a_command_joins_the_senders_trace_and_links_the_run(receiver: Receiver) -> None:
    """alert → sidecar → command → checkpoint is one trace; the run is reachable by the link."""
    told = format_traceparent("a" * 32, "b" * 16)
    tracer = tracer_to(receiver.endpoint)
    tracer.start_run(START)
    own = tracer.emit("command checkpoint", START, START + 50, {"obsinfra.outcome": "done"}, told)
    tracer.emit("checkpoint", START + 10, START + 40, {"obsinfra.path": None}, own)
    tracer.close(10)

    command, checkpoint = receiver.named("command checkpoint"), receiver.named("checkpoint")
    run = receiver.named("run")
    assert (command.trace_id, command.parent_id) == ("a" * 32, "b" * 16)
    assert command.links == [(run.trace_id, run.span_id)]
    assert own == f"00-{'a' * 32}-{command.span_id}-01"
    assert (checkpoint.trace_id, checkpoint.parent_id) == ("a" * 32, command.span_id)
    assert command.attributes["obsinfra.span"] == "command"
    assert "obsinfra.path" not in checkpoint.attributes


@pytest.mark.parametrize("told", [None, "", "rubbish", f"00-{'0' * 32}-{'b' * 16}-01"])
def test_without_a_valid_sender_a_span_belongs_to_the_run(receiver: Receiver, told: str | None) -> None:
    tracer = tracer_to(receiver.endpoint)
    tracer.start_run(START)
    tracer.emit("checkpoint", START, START + 50, {}, told)
    tracer.close(10)
    assert receiver.named("checkpoint").parent_id == receiver.named("run").span_id


def test_the_callers_own_current_span_is_no_parent(receiver: Receiver) -> None:
    from opentelemetry.sdk.trace import TracerProvider

    tracer = tracer_to(receiver.endpoint)
    with TracerProvider().get_tracer("user").start_as_current_span("theirs"):
        tracer.start_run(START)
    tracer.close(10)
    assert receiver.named("run").parent_id == ""


def test_spans_are_kept_in_a_file_too(receiver: Receiver, tmp_path: Path) -> None:
    file = tmp_path / "traces" / "spans.jsonl"
    tracer = tracer_to(receiver.endpoint, file)
    tracer.start_run(START)
    tracer.start_epoch(3, START)
    trace_id = trace_one_step(tracer)
    tracer.close(10)
    written = {line["name"]: line for line in lines_of(file)}
    assert set(written) == {"run", "epoch 3", "step 7", "forward", "backward"}
    step = written["step 7"]
    assert step["trace_id"] == trace_id
    assert step["span_id"] == receiver.named("step 7").span_id
    assert step["parent_id"] == written["epoch 3"]["span_id"]
    assert (step["start_ns"], step["end_ns"]) == (START + 10, START + 90)
    assert (step["run"], step["model"], step["rank"], step["pid"]) == ("r1", "digits", 0, os.getpid())


def test_values_json_does_not_have_are_written_as_text(tmp_path: Path) -> None:
    file = tmp_path / "spans.jsonl"
    tracer = tracer_to(file=file)
    tracer.emit_step(1, 0, START, START + 1, [], {"obsinfra.loss": float("nan"), "path": Path("/x")})
    tracer.close(10)
    assert lines_of(file)[0]["attributes"]["obsinfra.loss"] == "nan"
    assert lines_of(file)[0]["attributes"]["path"] == "/x"


def test_a_resumed_run_appends_after_a_torn_line(tmp_path: Path) -> None:
    """A process killed while writing leaves half a line; what follows stays readable."""
    file = tmp_path / "spans.jsonl"
    first = tracer_to(file=file)
    first.start_run(START)
    first.close(10)
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:40])
    second = tracer_to(file=file)
    second.start_run(START + SECOND)
    second.close(10)
    kept = file.read_text().splitlines()
    assert json.loads(kept[0])["start_ns"] == START
    assert json.loads(kept[2])["start_ns"] == START + SECOND


def test_ranks_write_files_of_their_own(tmp_path: Path) -> None:
    tracer = tracer_to(file=tmp_path / "spans.jsonl", rank=3, world_size=4)
    tracer.start_run(START)
    tracer.close(10)
    assert [path.name for path in tmp_path.iterdir()] == ["spans-rank3.jsonl"]


def test_without_a_receiver_tracing_is_off() -> None:
    """Nothing is made that would go nowhere, and a traceparent passes through."""
    tracer = tracer_to()
    assert tracer is null_tracer()
    told = format_traceparent("a" * 32, "b" * 16)
    assert tracer.emit("checkpoint", START, START, {}, told) == told
    assert trace_one_step(tracer) == ""
    assert tracer.created == 0


def test_the_standard_off_switch_is_obeyed(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracer_to(receiver.endpoint, tmp_path / "spans.jsonl") is null_tracer()


def test_the_standard_variables_name_the_collector(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint + "/")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20abc")
    tracer = tracer_to()
    tracer.start_run(START)
    tracer.close(10)
    assert receiver.requests[-1]["path"] == "/v1/traces"
    assert receiver.requests[-1]["Authorization"] == "Bearer abc"
    assert receiver.named("run").end_ns > START


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://host:4317", "http://", "http://h:99999"])
def test_an_impossible_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="OTLP collector"):
        tracer_to(endpoint)


def test_the_probe_tells_a_collector_from_anything_else(receiver: Receiver) -> None:
    assert collector_answers(receiver.endpoint)
    receiver.status = 404
    assert not collector_answers(receiver.endpoint)
    receiver.status = 0
    assert not collector_answers(receiver.endpoint)
    assert not collector_answers(closed_port())


@pytest.mark.parametrize("failure", ["refused", "silent", "500", "not http"])
def test_a_dead_collector_costs_spans_and_no_time(failure: str, receiver: Receiver, tmp_path: Path) -> None:
    """Nothing blocks while spans are made or at the end; each span is delivered or counted as lost."""
    endpoint = receiver.endpoint
    listener: socket.socket | None = None
    if failure == "refused":
        endpoint = closed_port()
    elif failure == "not http":
        listener = socket.create_server(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=_babble, args=(listener,), daemon=True).start()
    else:
        receiver.status = 0 if failure == "silent" else 500
    file = tmp_path / "spans.jsonl"
    tracer = tracer_to(endpoint, file)
    finished = threading.Event()

    def train() -> None:
        tracer.start_run(START)
        for _ in range(2_000):
            trace_one_step(tracer)
        tracer.close(1.0)
        finished.set()

    threading.Thread(target=train, daemon=True).start()
    assert finished.wait(60), "tracing blocked its caller"
    if listener is not None:
        listener.close()
    assert tracer.created == 6_001
    assert tracer.exported == 0
    assert tracer.dropped >= 6_001
    assert len(lines_of(file)) + tracer.dropped == 2 * tracer.created


def _babble(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.sendall(b"220 mail.example ESMTP\r\n")
        connection.close()


def test_a_failing_collector_is_logged_once(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.status = 400
    tracer = tracer_to(receiver.endpoint)
    for number in range(3):
        trace_one_step(tracer)
        wait_for(lambda number=number: tracer.errors > number, "a counted failure")
    tracer.close(10)
    assert tracer.errors == 3
    assert tracer.dropped == 9
    said = [record for record in caplog.records if "spans_not_delivered" in record.getMessage()]
    assert len(said) == 1
    assert all("opentelemetry" not in record.name for record in caplog.records)


def test_a_collector_that_comes_back_is_used_again(receiver: Receiver) -> None:
    """503 is tried again, so a restarting collector loses nothing."""
    receiver.status = 503
    tracer = tracer_to(receiver.endpoint)
    trace_one_step(tracer)
    wait_for(lambda: receiver.requests, "a refused attempt")
    receiver.status = 200
    wait_for(lambda: tracer.exported == 3, "the spans to be delivered after all")
    tracer.close(10)
    assert (tracer.exported, tracer.dropped) == (3, 0)


def test_spans_a_collector_refuses_are_counted(receiver: Receiver) -> None:
    receiver.rejected = 2
    tracer = tracer_to(receiver.endpoint)
    trace_one_step(tracer)
    tracer.close(10)
    assert (tracer.exported, tracer.dropped, tracer.errors) == (1, 2, 0)


def test_a_full_disk_is_counted_and_not_raised(tmp_path: Path) -> None:
    full = tmp_path / "spans.jsonl"
    full.symlink_to("/dev/full")
    tracer = tracer_to(file=full)
    trace_one_step(tracer)
    tracer.close(10)
    assert (tracer.dropped, tracer.errors) == (3, 1)


def test_the_span_file_is_bounded(tmp_path: Path) -> None:
    from obsinfra.monitoring.rotating_file import RotatingFile

    file = RotatingFile(tmp_path / "spans.jsonl", max_bytes=100, backups=2)
    for number in range(100):
        file.append(b"%030d" % number)
    file.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "spans.jsonl",
        "spans.jsonl.1",
        "spans.jsonl.2",
    ]
    newest_first = [tmp_path / name for name in ("spans.jsonl", "spans.jsonl.1", "spans.jsonl.2")]
    assert all(path.stat().st_size <= 100 for path in newest_first)
    kept = [int(line) for path in reversed(newest_first) for line in path.read_text().split()]
    assert kept == list(range(kept[0], 100))
    assert len(kept) >= 7


def test_tracing_leaves_the_random_generator_alone(receiver: Receiver, tmp_path: Path) -> None:
    """Python's global generator belongs to training: its state is checkpointed and must resume exactly."""
    receiver.status = 503
    random.seed(1)
    before = random.getstate()
    tracer = tracer_to(receiver.endpoint, tmp_path / "spans.jsonl", probe=True)
    tracer.start_run(START)
    trace_one_step(tracer)
    tracer.emit("checkpoint", START, START)
    wait_for(lambda: len(receiver.requests) >= 2, "a retry")
    receiver.status = 200
    tracer.close(10)
    assert random.getstate() == before


def test_closing_ends_every_thread_and_twice_is_fine(receiver: Receiver, tmp_path: Path) -> None:
    tracer = tracer_to(receiver.endpoint, tmp_path / "spans.jsonl")
    names = {thread.name for thread in threading.enumerate()}
    assert {"obsinfra-otlp", "obsinfra-spans"} <= names
    tracer.close(10)
    tracer.close(10)
    assert not {"obsinfra-otlp", "obsinfra-spans"} & {thread.name for thread in threading.enumerate()}
    assert trace_one_step(tracer) == ""


def test_a_forked_child_neither_traces_nor_blocks(tmp_path: Path) -> None:
    """A data-loader worker inherits the tracer: it writes nothing, starts no thread, and can end."""
    code = f"""
import os, sys, threading
from pathlib import Path
from obsinfra.monitoring.tracing import create_tracer
tracer = create_tracer(run_id="r", model="m", trace_file=Path({str(tmp_path / "spans.jsonl")!r}))
tracer.start_run(1)
pid = os.fork()
if pid == 0:
    said = tracer.emit_step(1, 0, 1, 2, [])
    tracer.close(5)
    os._exit(0 if said == "" and threading.active_count() == 1 else 3)
_, status = os.waitpid(pid, 0)
tracer.close(5)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=120, check=False)
    assert done.returncode == 0
    assert [line["name"] for line in lines_of(tmp_path / "spans.jsonl")] == ["run"]


def test_opentelemetry_is_imported_only_when_spans_have_somewhere_to_go() -> None:
    code = (
        "import sys; from obsinfra.monitoring.tracing import create_tracer; "
        "create_tracer(run_id='r', model='m'); "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        (f"00-{'a' * 32}-{'b' * 16}-01", TraceParent("a" * 32, "b" * 16, True)),
        (f"00-{'a' * 32}-{'b' * 16}-00", TraceParent("a" * 32, "b" * 16, False)),
        (f"cc-{'a' * 32}-{'b' * 16}-03-more", TraceParent("a" * 32, "b" * 16, True)),
        (f"00-{'a' * 32}-{'b' * 16}-01-more", None),
        (f"ff-{'a' * 32}-{'b' * 16}-01", None),
        (f"00-{'A' * 32}-{'b' * 16}-01", None),
        (f"00-{'a' * 31}-{'b' * 16}-01", None),
        (f"00-{'0' * 32}-{'b' * 16}-01", None),
        (f"00-{'a' * 32}-{'0' * 16}-01", None),
        (f"00-{'a' * 32}-{'b' * 16}-01\n", None),
        ("", None),
        (None, None),
    ],
)
def test_traceparent_is_read_as_w3c_says(text: str | None, meaning: TraceParent | None) -> None:
    assert parse_traceparent(text) == meaning


def test_traceparent_goes_there_and_back() -> None:
    for sampled in (True, False):
        text = format_traceparent("1" * 32, "2" * 16, sampled=sampled)
        assert parse_traceparent(text) == TraceParent("1" * 32, "2" * 16, sampled)
    with pytest.raises(ValueError, match="32 and 16"):
        format_traceparent("xyz", "2" * 16)
