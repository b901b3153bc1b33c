"""The kernel itself fails any system call of a commit: the store is old or new, it is said, it goes on."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from kernel_faults import Trace, need_strace, traced
from torch import nn
from waiting import wait_for

import obsinfra
from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.checkpointer import create_checkpointer, wait_for_heir
from obsinfra.catalog import metrics as catalog

SECONDS = 60.0

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _strace() -> None:
    need_strace()


def state(step: int) -> dict[str, Any]:
    """One tensor that never changes, one that is noise, one that compresses."""
    noise = torch.Generator().manual_seed(step)
    return {
        "frozen": torch.arange(300.0),
        "weight": torch.randn(3000, generator=noise),
        "moment": torch.full((3000,), float(step)),
    }


def files(root: Path) -> dict[str, bytes]:
    folders = (root / "objects", root / "manifests")
    return {
        str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()
    }


class Saving:
    """A real checkpointer and its writer process, which works on one tensor after the other."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "store"
        self.log = tmp_path / "strace.log"
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        self.it = create_checkpointer(
            self.root,
            on_event=lambda event, facts: self.events.append((event, facts)),
            threads=1,
            compression="auto",
        )
        self.step = 0
        for _ in range(2):  # a second one, for what the first alone has to do
            self.take()
            self.commit()

    def take(self) -> None:
        self.step += 1
        assert self.it.snapshot(state(self.step), step=self.step, epoch=0, wait=SECONDS)

    def commit(self) -> None:
        """Commit the newest snapshot."""
        assert self.it.commit("regular", "test").wait(SECONDS).step == self.step

    def told(self, event: str) -> list[Mapping[str, Any]]:
        return [facts for name, facts in self.events if name == event]

    def traced(self, *injections: str) -> Any:
        writer = wait_for(lambda: self.it.writer_pid, "a writer")
        return traced(writer, self.log, *injections)

    def how_often(self, call: str) -> tuple[str, int]:
        """The name of a system call here, and how many of it a commit makes."""
        with self.traced() as trace:
            self.take()
            self.commit()
        found = {name: count for name, count in trace.calls().items() if name.startswith(call)}
        assert len(found) == 1, trace.lines()
        return found.popitem()

    def check(self, *, newest: int) -> None:
        """All that is listed is sound, to the last bit; nothing half done lies about."""
        backup = create_backup_system(self.root)
        assert all(result.problem is None for result in backup.verify())
        loaded = backup.load()
        assert loaded.info.step == newest and loaded.skipped == ()
        assert all(torch.equal(loaded.state[name], value) for name, value in state(newest).items())


@pytest.fixture
def saving(tmp_path: Path) -> Iterator[Saving]:
    made = Saving(tmp_path)
    yield made
    made.it.close(0)


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("fsync", errno.EIO),
        ("fsync", errno.ENOSPC),
        ("write", errno.EIO),
        ("write", errno.ENOSPC),
        ("write", errno.EDQUOT),
        ("rename", errno.EIO),
        ("rename", errno.EROFS),
        ("mkdir", errno.EROFS),
        ("mkdir", errno.ENOSPC),
        ("openat", errno.EIO),
        ("openat", errno.EROFS),
        ("openat", errno.EMFILE),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else value,
)
def test_an_error_at_any_call_of_a_commit_leaves_the_old_or_the_new(
    saving: Saving, call: str, code: int
) -> None:
    """Of the calls that write, each one fails the commit; among `openat` are some that only compare."""
    name, count = saving.how_often(call)
    assert count >= (2 if call == "mkdir" else 3), "two chunks and the manifest, at least"
    failures = 0
    for at in range(1, count + 1):
        before, told = files(saving.root), len(saving.told("commit_failed"))
        with saving.traced(f"{name}:error={errno.errorcode[code]}:when={at}") as trace:
            saving.take()
            pending = saving.it.commit("regular", "during")
            try:
                assert pending.wait(SECONDS).step == saving.step
            except OSError as error:
                failures += 1
                assert error.errno == code, at
                assert files(saving.root) == before, f"{name} {at} of {count}"
                (failed,) = saving.told("commit_failed")[told:]
                assert os.strerror(code) in failed["error"]
                saving.check(newest=saving.step - 1)
                if trace.injected:  # the fault is over: the same snapshot, the same writer
                    saving.commit()
        assert trace.injected == (0 if call == "mkdir" and at > trace.calls()[name] else 1), at
        saving.check(newest=saving.step)
    assert saving.it.writer_restarts == 0
    assert failures == count if call not in ("openat", "mkdir") else failures >= 2
    assert not list(saving.root.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("call", "code"), [("fsync", errno.EIO), ("write", errno.ENOSPC), ("rename", errno.EROFS)]
)
def test_a_disk_that_goes_on_failing_harms_nothing_and_the_next_commit_tidies_up(
    saving: Saving, call: str, code: int
) -> None:
    """From the k-th call on all fail, and so does every removal."""
    name, count = saving.how_often(call)
    for at in range(1, count + 1):
        faults = (f"{name}:error={errno.errorcode[code]}:when={at}+", "/^unlink:error=EIO")
        with saving.traced(*faults) as trace:
            saving.take()
            with pytest.raises(OSError) as caught:
                saving.it.commit("regular", "during").wait(SECONDS)
            assert caught.value.errno == code and trace.injected >= 1
            found = create_backup_system(saving.root).load()
            # At the very last call the manifest is in place, and could not be taken back.
            assert found.info.step == saving.step - 1 or (call == "fsync" and at == count)
            saving.check(newest=found.info.step)
        saving.commit()
        saving.check(newest=saving.step)
        assert not list(saving.root.rglob("*.tmp"))
    assert len(saving.told("commit_failed")) == count and saving.it.writer_restarts == 0


@pytest.mark.parametrize("call", ["fsync", "write", "rename", "openat"])
def test_a_writer_killed_in_any_call_of_a_commit_is_replaced_and_the_commit_is_made(
    saving: Saving, call: str
) -> None:
    name, count = saving.how_often(call)
    for at in range(1, count + 1):
        deaths = len(saving.told("writer_died"))
        with saving.traced(f"{name}:signal=SIGKILL:when={at}"):
            saving.take()
            saving.commit()
        assert len(saving.told("writer_died")) == deaths + 1, f"{name} {at} of {count}"
        saving.check(newest=saving.step)
        assert not list(saving.root.rglob("*.tmp"))
    assert saving.it.writer_restarts == count and not saving.told("commit_failed")


TRAINER = """
import sys
import torch
from obsinfra.backup.checkpointer import create_checkpointer
checkpointer = create_checkpointer(sys.argv[1], log_path=sys.argv[2], threads=1)
for step in (1, 2):
    checkpointer.snapshot({"w": torch.full((3000,), float(step))}, step=step, epoch=0)
    if step == 1:
        checkpointer.commit("regular", "test").wait()
print(checkpointer.writer_pid, flush=True)
sys.stdin.read()
"""


def started_trainer(root: Path, log: Path) -> tuple[subprocess.Popen[str], int]:
    """A trainer that has one commit and a newer snapshot, and its writer's pid."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(root), str(log)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    return trainer, int(trainer.stdout.readline())


@pytest.mark.parametrize("call", ["fsync", "write", "/^rename"])
def test_what_a_dead_trainer_left_is_tried_again_after_an_error_of_the_disk(
    tmp_path: Path, call: str
) -> None:
    root, log = tmp_path / "store", tmp_path / "writer.jsonl"
    trainer, writer = started_trainer(root, log)
    with traced(writer, tmp_path / "strace.log", f"{call}:error=EIO:when=2") as trace:
        trainer.kill()
        trainer.communicate()
        assert wait_for_heir(root, SECONDS)
    assert trace.injected == 1
    said = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in said] == ["last_commit_failed", "trainer_lost"]
    assert said[0]["attempt"] == 1 and "Input/output error" in said[0]["error"]
    backup = create_backup_system(root)
    loaded = backup.load()
    assert (loaded.info.step, loaded.info.kind) == (2, "emergency") and said[1]["step"] == 2
    assert torch.equal(loaded.state["w"], torch.full((3000,), 2.0))
    assert [result.problem for result in backup.verify()] == [None, None]


def test_a_run_whose_disk_fails_counts_it_says_it_and_saves_at_the_next_interval(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The loop goes on meanwhile; the error is over when strace is gone."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train() -> None:
        for _ in run.steps(range(1)):
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.record(loss=loss)

    def train_until(condition: Any, what: str) -> None:
        wait_for(lambda: train() or condition(), what)

    def failures() -> float:
        return run.monitor.instruments.get(catalog.CHECKPOINT_FAILURES, kind="regular")

    with obsinfra.observe(
        model, optimizer, output_dir=tmp_path, metrics_port=0, checkpoint_seconds=0.2
    ) as run:
        backup = create_backup_system(run.folder.checkpoints)
        train_until(backup.list, "a first checkpoint")
        (writer,) = [
            child.pid
            for child in psutil.Process().children()
            if "obsinfra.backup.writer" in " ".join(child.cmdline())
        ]
        with traced(writer, tmp_path / "strace.log", "fsync:error=EIO") as trace:
            train_until(lambda: failures() >= 2, "two checkpoints that fail")
            at = run.step
            assert all(result.problem is None for result in backup.verify())
        assert trace.injected >= 2
        said = [line for line in caplog.messages if line.startswith("checkpoint_failed")]
        assert len(said) >= 2 and all("Input/output error" in line for line in said)
        train_until(lambda: backup.load().info.step > at, "a checkpoint after the fault")
        assert psutil.pid_exists(writer)
    assert all(result.problem is None for result in backup.verify())


LOADER = """
import sys
from obsinfra.backup.backup_system import create_backup_system
loaded = create_backup_system(sys.argv[1]).load()
print(loaded.info.step, *[passed.problem for passed in loaded.skipped])
"""


@pytest.mark.parametrize("what", ["chunk", "manifest"])
@pytest.mark.parametrize("call", ["read", "openat"])
def test_a_file_that_the_disk_cannot_read_is_passed_over_and_named(
    tmp_path: Path, call: str, what: str
) -> None:
    backup = create_backup_system(tmp_path / "store", compression="auto")
    for step in (1, 2):
        backup.save(state(step), step=step, epoch=0)
    old, new = backup.list()
    bad = new.path if what == "manifest" else backup.store.objects.path(min(new.chunks() - old.chunks()))
    fault = ["-P", str(bad), "-e", f"trace={call}", "-e", f"inject={call}:error=EIO"]
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", str(tmp_path / "log"), *fault, sys.executable, "-c", LOADER,
         str(backup.store.root)],
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert Trace(tmp_path / "log").injected >= 1
    assert done.stdout.startswith("1 ") and "Input/output error" in done.stdout, done.stderr
    assert (new.path.name if what == "manifest" else bad.name[:12]) in done.stdout


def test_a_disk_that_hangs_stops_no_step_and_loses_nothing(saving: Saving) -> None:
    """The writer is held in the middle of a commit, as by a disk that does not answer, until we let it."""
    writer = wait_for(lambda: saving.it.writer_pid, "a writer")
    held_at = saving.step + 1
    with saving.traced("fsync:signal=SIGSTOP:when=2") as trace:
        saving.take()
        pending = saving.it.commit("regular", "slow")
        wait_for(lambda: any("stopped by SIGSTOP" in line for line in trace.lines()), "it hangs")
    saving.step += 1
    assert saving.it.snapshot(state(saving.step), step=saving.step, epoch=0), "the other slot is free"
    for _ in range(50):  # now it holds the only newer state: it is not risked, and nobody waits
        saving.step += 1
        assert not saving.it.snapshot(state(saving.step), step=saving.step, epoch=0)
    assert saving.it.newest_step == held_at + 1
    assert saving.it.snapshot(state(saving.step), step=saving.step, epoch=0, urgent=True)
    emergency = saving.it.commit("emergency", "now")
    assert not pending.done and not emergency.done
    saving.check(newest=held_at - 1)
    os.kill(writer, signal.SIGCONT)
    assert pending.wait(SECONDS).step == held_at and emergency.wait(SECONDS).step == saving.step
    saving.check(newest=saving.step)
    assert saving.it.writer_restarts == 0 and not saving.told("commit_failed")


def test_on_a_slow_disk_a_trainer_killed_in_the_middle_still_leaves_its_newest_snapshot(
    tmp_path: Path,
) -> None:
    """Each call to the disk takes a fifth of a second, so that the commit is sure to be under way."""
    root, log = tmp_path / "store", tmp_path / "writer.jsonl"
    trainer, writer = started_trainer(root, log)
    slow = ("fsync:delay_enter=200000", "/^rename:delay_enter=200000")
    with traced(writer, tmp_path / "strace.log", *slow) as trace:
        trainer.kill()
        trainer.communicate()
        wait_for(lambda: trace.calls()["fsync"] > 0, "it is at it")
        assert [info.step for info in create_backup_system(root).list()] == [1]
        assert wait_for_heir(root, SECONDS)
    loaded = create_backup_system(root).load()
    assert loaded.info.step == 2 and torch.equal(loaded.state["w"], torch.full((3000,), 2.0))
    assert loaded.skipped == ()


def test_the_tracer_lets_the_process_go(saving: Saving) -> None:
    """Else these tests would only ever see a process that is traced."""
    writer = saving.it.writer_pid
    with saving.traced("fsync:signal=SIGSTOP:when=1000"):
        saving.take()
        saving.commit()
    assert "TracerPid:\t0\n" in Path(f"/proc/{writer}/status").read_text()
    os.kill(writer or 0, signal.SIGCONT)
    saving.take()
    saving.commit()
