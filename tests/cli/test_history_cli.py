"""`obsinfra history`: one story of a run out of journal, logs and folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from obsinfra.cli.main import app
from obsinfra.control.command import Ack, new_command
from obsinfra.control.journal import AlertEntry, CommandEntry, Journal
from obsinfra.errors import ConfigError
from obsinfra.run.folder import RunFolder, RunInfo


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "r1")
    made.create()
    made.write_info(RunInfo("r1", "digits", state="running"))
    return made


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """The journal of a sidecar that is not running: an alert, its command, and somebody else's."""
    state = tmp_path / ".stack" / "sidecar"
    state.mkdir(parents=True)
    journal = Journal(state / "journal.sqlite")
    now = time.time()
    entries = []
    for number, (run, outcome) in enumerate([("r1", "done"), ("r1", "failed"), ("r2", "done")]):
        command = new_command(
            run, "checkpoint", source="sidecar", reason="alert SlowStep: 12 s", id=f"am-{number}"
        )
        entries.append(CommandEntry(command, "SlowStep", now - 9, now - 8 + number))
        ack = Ack(command.id, outcome, step=40 + number, error="disk [full]" if outcome == "failed" else None)  # type: ignore[arg-type]
        journal.add([], [entries[-1]])
        journal.settle(command.id, outcome, ack)
    journal.add(
        [
            AlertEntry(
                now - 8.5, "SlowStep", "r1", "warning", "firing", "f", now - 9, "accepted", "checkpoint"
            )
        ],
        [],
    )
    journal.close()
    return state


def log(folder: RunFolder, channel: str, *events: dict[str, object]) -> None:
    with (folder.logs / f"{channel}.jsonl").open("a") as file:
        for event in events:
            file.write(json.dumps({"timestamp": "2026-01-02T03:04:05+00:00", **event}) + "\n")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsinfra.cli.history.console", Console(width=200))


def ask(*arguments: str) -> str:
    found = CliRunner().invoke(app, ["history", *arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def test_one_story_with_who_what_when_outcome_and_why(folder: RunFolder, journal: Path) -> None:
    log(folder, "system", {"event": "run_started", "model": "digits", "resumed_from_step": None})
    log(
        folder,
        "system",
        {
            "event": "command",
            "action": "stop",
            "id": "cli-1",
            "source": "cli",
            "outcome": "done",
            "at_step": 60,
        },
        {"event": "command", "action": "checkpoint", "id": "am-0", "source": "sidecar", "outcome": "done"},
    )
    log(
        folder,
        "errors",
        {"event": "alert_firing", "alert": "HighMemory", "acts": "in-process", "action": None},
    )
    lines = [
        json.loads(line) for line in ask("r1", "--output-dir", str(folder.root.parent), "--json").splitlines()
    ]
    assert [(line["kind"], line["who"], line["what"], line["outcome"], line["step"]) for line in lines] == [
        ("start", "trainer", "training digits", "", None),
        ("command", "cli", "stop", "done", 60),
        ("alert", "in-process", "HighMemory fires", "", None),
        ("alert", "alertmanager", "SlowStep fires", "accepted", None),
        ("command", "sidecar", "checkpoint", "done", 40),
        ("command", "sidecar", "checkpoint", "failed", 41),
    ]
    assert lines == sorted(lines, key=lambda line: line["at"])
    assert lines[-1]["why"] == "alert SlowStep: 12 s; disk [full]"
    text = ask("latest", "--output-dir", str(folder.root.parent))
    assert "disk [full]" in text and "checkpoint" in text and "cli" in text


def test_what_is_asked_for_is_told_and_no_more(folder: RunFolder, journal: Path) -> None:
    place = ["--output-dir", str(folder.root.parent), "--json"]
    log(folder, "system", {"event": "run_started", "model": "digits"})
    assert len(ask("r1", *place, "-n", "2").splitlines()) == 2
    kinds = {
        json.loads(line)["kind"]
        for line in ask("r1", *place, "--kind", "alert", "--kind", "start").splitlines()
    }
    assert kinds == {"alert", "start"}
    assert "start" not in {
        json.loads(line)["kind"] for line in ask("r1", *place, "--since", "1h").splitlines()
    }
    assert "r2" not in ask("r1", *place)


def test_an_earlier_run_of_the_same_name_is_another_story(folder: RunFolder, journal: Path) -> None:
    started = datetime.now(UTC) + timedelta(minutes=5)
    folder.write_info(RunInfo("r1", "digits", state="running", started=started.isoformat()))
    kinds = [
        json.loads(line)["kind"]
        for line in ask("r1", "--output-dir", str(folder.root.parent), "--json").splitlines()
    ]
    assert kinds == ["start"]


def test_a_run_without_a_sidecar_has_a_history_too(folder: RunFolder) -> None:
    assert "training digits" in ask("r1", "--output-dir", str(folder.root.parent))
    assert not (folder.root.parent / ".stack").exists()


def test_only_the_end_of_an_endless_log_is_read(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsinfra.control.history.MAX_LOG_BYTES", 4_000)
    for number in range(200):
        log(folder, "training", {"event": "checkpoint", "kind": "regular", "step": number, "path": "x"})
    steps = [
        json.loads(line)["step"]
        for line in ask(
            "r1", "--output-dir", str(folder.root.parent), "--json", "--kind", "checkpoint"
        ).splitlines()
    ]
    assert 10 < len(steps) < 60 and steps == list(range(200 - len(steps), 200))


def test_the_log_before_the_rotation_belongs_to_it(folder: RunFolder) -> None:
    log(folder, "training", {"event": "checkpoint", "kind": "regular", "step": 1, "path": "x"})
    (folder.logs / "training.jsonl").rename(folder.logs / "training.jsonl.1")
    log(folder, "training", {"event": "checkpoint", "kind": "regular", "step": 2, "path": "y"})
    found = ask("r1", "--output-dir", str(folder.root.parent), "--json", "--kind", "checkpoint").splitlines()
    assert [json.loads(line)["step"] for line in found] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nobody"], "no run 'nobody'"),
        (["r1", "--since", "yesterday"], "--since 'yesterday'; expected a number with s, m, h or d"),
        (["r1", "--kind", "gossip"], "kind 'gossip'; expected one of start, restart,"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder: RunFolder, arguments: list[str], says: str) -> None:
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "obsinfra.cli.main",
            "history",
            *arguments,
            f"--output-dir={folder.root.parent}",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "300"},
    )
    assert found.returncode == 2 and says in found.stderr and found.stderr.count("\n") == 1


def test_a_journal_that_is_none_is_named(folder: RunFolder, tmp_path: Path) -> None:
    state = tmp_path / ".stack" / "sidecar"
    state.mkdir(parents=True)
    (state / "journal.sqlite").write_bytes(b"no database at all, but long enough to look like one" * 50)
    with pytest.raises(ConfigError) as raised:
        ask("r1", "--output-dir", str(tmp_path))
    assert "journal.sqlite" in str(raised.value)


def test_a_journal_with_a_damaged_middle_is_named(folder: RunFolder, journal: Path) -> None:
    database = journal / "journal.sqlite"
    raw = bytearray(database.read_bytes())
    for page in range(4096, len(raw), 4096):
        raw[page : page + 512] = b"\xff" * 512
    database.write_bytes(raw)
    with pytest.raises(ConfigError, match=r"cannot read .*journal\.sqlite"):
        ask("r1", "--output-dir", str(folder.root.parent))


def test_a_journal_of_the_first_version_is_read(folder: RunFolder, tmp_path: Path) -> None:
    import sqlite3

    state = tmp_path / ".stack" / "sidecar"
    state.mkdir(parents=True)
    database = sqlite3.connect(state / "journal.sqlite")
    database.executescript(
        "CREATE TABLE alerts (received_at REAL NOT NULL, name TEXT NOT NULL, run TEXT NOT NULL,"
        " severity TEXT NOT"
        " NULL, status TEXT NOT NULL, fingerprint TEXT NOT NULL, starts_at REAL NOT NULL, decision"
        " TEXT NOT NULL);"
        "CREATE TABLE commands (id TEXT PRIMARY KEY, run TEXT NOT NULL, action TEXT NOT NULL,"
        " alert TEXT NOT NULL,"
        " starts_at REAL NOT NULL, received_at REAL NOT NULL, command TEXT NOT NULL, outcome TEXT, ack TEXT,"
        " settled_at REAL);"
        "INSERT INTO alerts VALUES (5, 'SlowStep', 'r1', 'warning', 'firing', 'f', 4, 'informed');"
    )
    database.close()
    folder.update_info(started="1970-01-01T00:00:00+00:00")
    assert "SlowStep fires" in ask("r1", "--output-dir", str(tmp_path))
