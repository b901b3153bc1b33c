"""Every event a run logs says at which step it was, and in which trace it belongs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from obsinfra.control.client import send_command
from obsinfra.control.command import new_command
from obsinfra.monitoring.logging_config import configure_logging, get_logger, shutdown_logging
from obsinfra.observation import observe

ASKED = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
"""A trace that began elsewhere, in the sidecar say."""


def test_events_carry_step_and_trace_and_a_commands_events_that_of_who_asked(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    run = observe(model, torch.optim.SGD(model.parameters(), lr=0.1), output_dir=tmp_path, metrics_port=0)
    configure_logging(run.folder.logs, run=run.folder.id, model="Linear", terminal=False)
    try:
        command = new_command(run.folder.id, "checkpoint", source="test", traceparent=ASKED)
        for batch in run.steps([torch.ones(1, 2)] * 3):
            get_logger("training").info("seen")
            if run.step == 1:
                send_command(run.folder, command, door="socket", wait_for="accepted")
            run.record(loss=model(batch).sum())
        run.finish()
    finally:
        shutdown_logging()
    own = run.monitor.trace_id
    assert own is not None and len(own) == 32
    events = [
        json.loads(line)
        for channel in ("training", "system")
        for line in (run.folder.logs / f"{channel}.jsonl").read_text().splitlines()
    ]
    seen = [(event["step"], event["trace_id"]) for event in events if event["event"] == "seen"]
    assert seen == [(0, own), (1, own), (2, own)]
    [settled] = [event for event in events if event["event"] == "command"]
    [saved] = [e for e in events if e["event"] == "checkpoint" and e["kind"] == "regular"][:1]
    assert settled["trace_id"] == saved["trace_id"] == "ab" * 16


def test_after_the_run_events_belong_to_no_run(tmp_path: Path) -> None:
    run = observe(nn.Linear(2, 1), output_dir=tmp_path, disable_monitoring=True)
    run.finish()
    configure_logging(tmp_path / "logs", terminal=False)
    get_logger("system").info("later")
    shutdown_logging()
    [event] = [json.loads(line) for line in (tmp_path / "logs" / "system.jsonl").read_text().splitlines()]
    assert "step" not in event and "trace_id" not in event


def test_a_plain_loops_events_are_in_its_folder_and_in_the_programs_own_logging(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(2, 1)
    root = logging.getLogger()
    before = list(root.handlers), root.level
    caplog.set_level("INFO", "obsinfra")
    run = observe(model, output_dir=tmp_path, run="mine", disable_monitoring=True)
    get_logger("training").warning("odd", number=7)
    logging.getLogger("somebody").warning("not ours")
    assert (list(root.handlers), root.level) == before
    run.finish()
    get_logger("training").warning("after its end")
    texts = {
        channel: (run.folder.logs / f"{channel}.jsonl").read_text()
        for channel in ("training", "performance", "errors", "system")
    }
    event = json.loads(texts["training"])
    assert (event["event"], event["number"], event["run"], event["step"]) == ("odd", 7, "mine", 0)
    assert json.loads(texts["errors"]) == event
    assert "run_ended" in texts["system"] and "not ours" not in texts["system"]
    assert "odd number=7" in caplog.messages and "after its end" in caplog.messages


def test_two_runs_at_once_each_log_to_their_own_folder(tmp_path: Path) -> None:
    def channel_of(name: str) -> list[dict[str, Any]]:
        lines = (tmp_path / name / "logs" / "training.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    first, second = (
        observe(nn.Linear(2, 1), output_dir=tmp_path, run=name, disable_monitoring=True)
        for name in ("first", "second")
    )
    for _ in zip(first.steps([1, 2]), second.steps([1]), strict=False):
        get_logger("training").info("of neither")
        first.log_validation({"loss": 0.5})
        second.log_validation({"loss": 0.25})
    first.finish()
    second.log_validation({"loss": 0.125})
    second.finish()
    for name, losses in (("first", [0.5]), ("second", [0.25, 0.125])):
        events = channel_of(name)
        assert {event["run"] for event in events} == {name}
        told = [event for event in events if event["event"] == "validation"]
        assert [event["loss"] for event in told] == losses
        assert all("step" in event for event in told)
        assert [event["event"] for event in events].count("of neither") == 1
        system = (tmp_path / name / "logs" / "system.jsonl").read_text()
        assert system.count('"event": "run_started"') == system.count('"event": "run_ended"') == 1
