"""Two trainers save into one store, and one of them is killed: neither takes anything from the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_for

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.checkpointer import wait_for_heir

SECONDS = 60.0

TRAINER = """
import json, sys
import torch
from obsinfra.backup.checkpointer import create_checkpointer
from obsinfra.backup.retention import Retention
root, name, first = sys.argv[1], sys.argv[2], int(sys.argv[3])
checkpointer = create_checkpointer(root, run=name, retention=Retention(keep_last=6))
step = first
while True:
    state = {"w": torch.full((5000,), float(step)), "frozen": torch.arange(5000.0)}
    assert checkpointer.snapshot(state, step=step, epoch=0, wait=60)
    print(json.dumps(["snapshot", step]), flush=True)
    if step % 2 == first % 2:
        checkpointer.commit("regular", "test").wait(60)
        print(json.dumps(["committed", step]), flush=True)
    step += 1
    if sys.stdin.readline() == "":
        break
checkpointer.close()
"""


class Trainer:
    """One that does a step when it is told to."""

    def __init__(self, root: Path, name: str, first: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRAINER, str(root), name, str(first)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.said: list[tuple[str, int]] = []

    def hear(self, event: str) -> int:
        assert self.process.stdout is not None
        while True:
            found, step = json.loads(self.process.stdout.readline())
            self.said.append((found, step))
            if found == event:
                return int(step)

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("on\n")
        self.process.stdin.flush()


@pytest.mark.slow
def test_both_save_and_what_a_killed_one_left_is_saved_beside_the_other(tmp_path: Path) -> None:
    root = tmp_path / "store"
    one, other = Trainer(root, "one", 1), Trainer(root, "other", 1001)
    try:
        for _ in range(3):  # each does a step with a commit and one without, both at the same time
            for trainer in (one, other):
                trainer.hear("committed")
                trainer.go_on()
            for trainer in (one, other):
                trainer.hear("snapshot")
                trainer.go_on()
        last = one.hear("committed")
        one.go_on()
        left = one.hear("snapshot")
        assert left == last + 1
        os.kill(one.process.pid, signal.SIGKILL)
        backup = create_backup_system(root)
        found = wait_for(
            lambda: [info for info in backup.list() if info.kind == "emergency"], "the snapshot is committed"
        )
        assert [(info.run, info.step) for info in found] == [("one", left)]
        assert not wait_for_heir(root, 0), "the other one may still commit"
        other.hear("committed")
        other.go_on()
        assert other.process.poll() is None
    finally:
        for trainer in (one, other):
            trainer.process.kill()
            trainer.process.communicate()
    assert wait_for_heir(root, SECONDS)
    assert all(result.problem is None for result in backup.verify())
    for info in backup.list():
        state = backup.load(info.path).state
        assert (state["w"] == info.step).all() and info.run == ("one" if info.step < 1000 else "other")
    kept = [info.step for info in backup.list() if info.kind == "regular"]
    assert kept == [5, 7, 1001, 1003, 1005, 1007], "of the regular ones six, whoever made them"
