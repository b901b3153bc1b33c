"""The writer process by itself: its manners, its answers, and what it does when the trainer is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from same import same

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.shared_snapshot import SharedSnapshots
from obsinfra.backup.slot import SnapshotHead
from obsinfra.backup.writer import Lines, Order, WriterConfig


class Trainer:
    """What the writer sees of a trainer: two slots, a line, a lock."""

    def __init__(self, root: Path, **config: Any) -> None:
        self.root = root
        self.log_path = root / "logs" / "writer.jsonl"
        self.snapshots = SharedSnapshots(root)
        ours, theirs = socket.socketpair()
        ours.settimeout(60)
        lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT)
        told = WriterConfig(
            str(root / "store"), theirs.fileno(), self.snapshots.fds, lock, 4711,
            log_path=str(self.log_path), **config,
        )  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "obsinfra.backup.writer", json.dumps(asdict(told))],
            pass_fds=(theirs.fileno(), *self.snapshots.fds, lock),
            stderr=subprocess.PIPE,
        )
        theirs.close()
        os.close(lock)
        self.connection, self.lines = ours, Lines(ours)
        hello = self.lines.receive()
        assert hello == {"op": "hello", "pid": self.process.pid}

    def take(self, step: int, *, sound: bool = True) -> int:
        slot = self.snapshots.next_slot()
        state = {"w": torch.full((1000,), float(step)), "frozen": torch.arange(999)}
        self.snapshots.take(slot, state, SnapshotHead("r", step, 1, 0.0), sound=sound)
        return slot

    def order(self, slot: int, sequence: int, **more: Any) -> dict[str, Any]:
        order = Order(more.pop("id", 1), slot, sequence, more.pop("kind", "regular"), "asked", more)
        self.lines.send({"op": "commit", **asdict(order)})
        answer = self.lines.receive()
        assert answer is not None
        return answer

    def dies(self) -> list[dict[str, Any]]:
        """Close the line without a goodbye; what the writer logged once it has ended."""
        self.connection.close()
        assert self.process.wait(60) == 0
        lines = self.log_path.read_text().splitlines() if self.log_path.exists() else []
        return [json.loads(line) for line in lines]

    def steps(self) -> list[tuple[str, int]]:
        return [(info.kind, info.step) for info in create_backup_system(self.root / "store").list()]

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.communicate()
        self.snapshots.close()


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    made = Trainer(tmp_path)
    yield made
    made.end()


def test_it_is_modest(trainer: Trainer) -> None:
    process = psutil.Process(trainer.process.pid)
    assert process.nice() == min(19, psutil.Process().nice() + 10)
    assert process.ionice().ioclass == psutil.IOPRIO_CLASS_IDLE


def test_it_never_loads_torch_or_numpy_and_stays_small(trainer: Trainer) -> None:
    big = {"w": torch.randn(50_000_000)}
    trainer.snapshots.take(0, big, SnapshotHead("r", 1, 1, 0.0), sound=True)
    assert trainer.order(0, 1)["op"] == "committed"
    maps = Path(f"/proc/{trainer.process.pid}/maps").read_text()
    assert "torch" not in maps and "numpy" not in maps
    rss, _, shared, *_ = psutil.Process(trainer.process.pid).memory_info()
    assert 0 < rss - shared < 150e6 and psutil.Process(trainer.process.pid).memory_full_info().uss < 150e6


def test_it_answers_with_what_it_committed(trainer: Trainer) -> None:
    done = trainer.order(trainer.take(5), 1, id=9, note="x")
    assert (done["op"], done["order"]) == ("committed", 9)
    loaded = create_backup_system(trainer.root / "store").load()
    assert str(loaded.info.path) == done["done"]["path"] and loaded.info.reason == "asked"
    assert (loaded.info.run, loaded.info.step, loaded.info.kind) == ("r", 5, "regular")
    assert loaded.info.attributes == {"resumable": True, "note": "x"}
    assert same({"w": torch.full((1000,), 5.0), "frozen": torch.arange(999)}, loaded.state)
    assert done["done"]["bytes_written"] == 4000 + 999 * 8
    assert trainer.order(trainer.take(6), 2)["done"]["bytes_written"] == 4000, "the rest is there already"


def test_it_refuses_a_slot_that_does_not_hold_what_was_asked(trainer: Trainer) -> None:
    assert "does not hold snapshot 1" in trainer.order(0, 1)["user"][0]
    trainer.take(1)
    assert "does not hold snapshot 7" in trainer.order(0, 7)["user"][0]
    assert trainer.order(0, 1)["op"] == "committed", "and goes on"


def test_a_bug_of_ours_is_an_answer_and_a_line_in_the_log(trainer: Trainer) -> None:
    trainer.take(1)
    assert "the writer failed" in trainer.order(7, 1)["user"][0]
    assert trainer.order(0, 1)["op"] == "committed"
    assert "IndexError" in trainer.log_path.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_signals_meant_for_the_trainer_do_not_end_it(trainer: Trainer, number: int) -> None:
    os.kill(trainer.process.pid, number)
    assert trainer.order(trainer.take(1), 1)["op"] == "committed"


def test_after_a_goodbye_it_ends_and_commits_nothing(trainer: Trainer) -> None:
    trainer.take(1)
    trainer.lines.send({"op": "goodbye"})
    assert trainer.dies() == [] and trainer.steps() == []


def test_a_lost_trainers_newest_snapshot_is_committed(trainer: Trainer) -> None:
    assert trainer.order(trainer.take(1), 1)["op"] == "committed"
    trainer.take(2)
    trainer.take(3)
    (line,) = trainer.dies()
    assert trainer.steps() == [("regular", 1), ("emergency", 3)]
    info = create_backup_system(trainer.root / "store").load().info
    assert info.reason == "the trainer (process 4711) ended without closing its checkpoints"
    assert (line["event"], line["trainer"], line["committed"]) == ("trainer_lost", 4711, str(info.path))


def test_an_order_on_its_way_when_the_trainer_dies_is_obeyed_first(trainer: Trainer) -> None:
    slot = trainer.take(1)
    trainer.lines.send({"op": "commit", **asdict(Order(1, slot, 1, "regular", "asked"))})
    (line,) = trainer.dies()
    assert trainer.steps() == [("regular", 1)] and line["why"] == "its newest is committed"


def test_a_snapshot_that_is_durable_is_not_committed_again(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, committed=2)  # as after the death of a writer that had committed it
    trainer.take(1)
    trainer.take(2)
    (line,) = trainer.dies()
    assert trainer.steps() == [] and line["committed"] is None
    trainer.end()


def test_a_best_checkpoint_is_none_to_resume_from(trainer: Trainer) -> None:
    assert trainer.order(trainer.take(1), 1, kind="best", resumable=False)["op"] == "committed"
    trainer.dies()
    assert trainer.steps() == [("best", 1), ("emergency", 1)] or trainer.steps() == [
        ("emergency", 1),
        ("best", 1),
    ]


def test_only_a_sound_snapshot_is_committed(trainer: Trainer) -> None:
    trainer.take(1)
    trainer.take(2, sound=False)
    trainer.dies()
    assert trainer.steps() == [("emergency", 1)]


def test_without_a_sound_snapshot_it_says_so(trainer: Trainer) -> None:
    trainer.take(1, sound=False)
    (line,) = trainer.dies()
    assert trainer.steps() == [] and line["why"] == "it left no sound snapshot"


def test_a_snapshot_that_was_being_overwritten_is_passed_over(trainer: Trainer) -> None:
    trainer.take(1)
    slot = trainer.take(2)
    # As a trainer leaves it that was killed in the middle of a copy.
    os.pwrite(trainer.snapshots.fds[slot], bytes(64), 0)
    trainer.dies()
    assert trainer.steps() == [("emergency", 1)]


def test_a_snapshot_whose_description_is_damaged_is_passed_over(trainer: Trainer) -> None:
    trainer.take(1)
    slot = trainer.take(2)
    size = os.fstat(trainer.snapshots.fds[slot]).st_size
    os.pwrite(trainer.snapshots.fds[slot], b"#" * (size - 4096 - 12096), 4096 + 12096)
    lines = trainer.dies()
    assert trainer.steps() == [("emergency", 1)]
    assert [line["event"] for line in lines][-1] == "trainer_lost"
