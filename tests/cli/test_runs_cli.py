"""`obsinfra runs | command …` about runs whose trainer is gone."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import psutil
import pytest
from terminal import Terminal

from obsinfra.run.folder import RunFolder


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run on this host that says it is running, whose process is not there."""
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(tmp_path / "runs" / "alpha")
    folder.create()
    document = {
        "version": 1, "id": "alpha", "model": "digits", "state": "running",
        "started": "2026-01-01T00:00:00+00:00", "host": socket.gethostname(), "world_size": 1,
        "processes": {"0": {"pid": 2**22 + 1, "created": 1.0}}, "metrics_urls": {}, "git_revision": None,
        "epochs": 1, "restarts": 0, "parent": None, "ended": None, "reason": None,
    }  # fmt: skip
    folder.run_json.write_text(json.dumps(document))
    return folder


def test_a_command_to_a_dead_run_is_refused_at_once_and_left_for_the_next_trainer_by_the_inbox(
    killed: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Terminal("command", capsys, monkeypatch)
    refused = run("alpha", "checkpoint", "--timeout", "600")
    assert refused.code == 1 and "the trainer of run alpha is dead" in refused.err
    assert list(killed.inbox.glob("*.json")) == []
    left = run("alpha", "checkpoint", "--door", "inbox", "--timeout", "0.2")
    assert left.code == 1 and "did not answer" in left.err
    assert len(list(killed.inbox.glob("*.json"))) == 1


def test_off_a_terminal_a_run_is_one_line_with_its_whole_name(
    killed: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tactical_mappo-20260101-000000-0000-" + "x" * 60
    killed.root.rename(killed.root.with_name(name))
    monkeypatch.setenv("COLUMNS", "80")
    rows = Terminal("runs", capsys, monkeypatch)().out.splitlines()
    assert [row.split()[:2] for row in rows] == [["run", "state"], [name, "dead"]]


def test_a_trace_of_a_run_without_spans_says_why_there_is_none(
    killed: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed early was watched all the same: monitoring is not what is missing."""
    export = Terminal("trace", capsys, monkeypatch)
    gone = export("export", "alpha")
    assert gone.code == 2 and "--disable-monitoring" not in gone.err
    assert "run alpha ended before its first one" in gone.err
    assert "go on with it by 'obsinfra train --resume alpha'" in gone.err
    me = psutil.Process()
    killed.update_info(processes={"0": {"pid": me.pid, "created": me.create_time()}})
    assert "run alpha has not made one yet" in export("export", "alpha").err
    killed.config_toml.write_text("disable_monitoring = true\n")
    assert "train without --disable-monitoring" in export("export", "alpha").err
