"""The mirror's process: it outlives faults of the remote, of itself and of the trainer, and loses nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from faulty_files import QuickFiles
from same import same, small_state
from waiting import wait_for

from obsinfra.backup import background_mirror
from obsinfra.backup.background_mirror import BackgroundMirror, MirrorReport
from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.remote import Remote
from obsinfra.backup.transfer import fetch

SECONDS = 60.0


class Watched:
    """A mirror of `root`/store to `url`, and all that it tells."""

    def __init__(self, root: Path, url: str, *, linger_seconds: float = SECONDS) -> None:
        self.root, self.url = root, url
        self.backup = create_backup_system(root / "store", files=QuickFiles())
        self.log_path = root / "logs" / "mirror.jsonl"
        self.reports: list[MirrorReport] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.mirror = BackgroundMirror(
            root / "store",
            url,
            on_report=self.reports.append,
            on_event=lambda event, facts: self.events.append((event, dict(facts))),
            log_path=self.log_path,
            first_wait_seconds=0.05,
            longest_wait_seconds=0.2,
            linger_seconds=linger_seconds,
        )

    def save(self, step: int, state: dict[str, Any] | None = None) -> Path:
        path = self.backup.save(state or small_state(step), step=step, epoch=0).path
        self.mirror.committed()
        return path

    def started(self) -> psutil.Process:
        self.mirror.start()
        return psutil.Process(wait_for(lambda: self.mirror.pid, "the mirror process runs"))

    def names(self) -> list[str]:
        return [event for event, _ in self.events]

    def steps_there(self) -> list[int]:
        return [int(name[:12]) for name in Remote(self.url).manifests()]

    def nothing_waits(self) -> bool:
        return bool(self.reports) and (self.reports[-1].pending, self.reports[-1].lag_seconds) == (0, 0.0)

    def lines(self) -> list[dict[str, Any]]:
        """What the process noted after the trainer's end."""
        return [json.loads(line) for line in self.log_path.read_text().splitlines()]


@contextlib.contextmanager
def watching(root: Path, url: str, **options: Any) -> Iterator[Watched]:
    watched = Watched(root, url, **options)
    pids: set[int] = set()
    try:
        yield watched
    finally:
        if watched.mirror.pid is not None:
            pids.add(watched.mirror.pid)
        watched.mirror.close()
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        for process in background_mirror._left_behind:
            process.wait(SECONDS)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The remote's folder; while `blocked` stands in its place, it is down."""
    return tmp_path / "remote" / "run"


def down(place: Path) -> None:
    """Nothing can be written below a file."""
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        place.rename(place.parent / "aside")
    place.write_text("down")


def up(place: Path) -> None:
    place.unlink()
    if (place.parent / "aside").exists():
        (place.parent / "aside").rename(place)


def test_what_is_committed_is_copied_and_reported(tmp_path: Path, place: Path) -> None:
    with watching(tmp_path, f"file://{place}") as watched:
        watched.save(1)
        process = watched.started()
        wait_for(lambda: watched.steps_there() == [1] and watched.nothing_waits(), "the first is copied")
        watched.save(2)
        wait_for(lambda: watched.steps_there() == [1, 2] and watched.nothing_waits(), "the second is copied")
        assert process.nice() >= 10 and os.getsid(process.pid) == process.pid
        size = sum(Remote(watched.url).objects().values())
        assert sum(report.copied_bytes for report in watched.reports) == size
        assert sum(report.failures + report.restarts for report in watched.reports) == 0
        assert watched.events == []


def test_the_process_has_no_torch(tmp_path: Path, place: Path) -> None:
    with watching(tmp_path, f"file://{place}") as watched:
        process = watched.started()
        watched.save(1)
        wait_for(lambda: watched.steps_there() == [1], "it works")
        assert not any("torch" in mapped.path for mapped in process.memory_maps())


def test_a_remote_that_is_down_is_told_once_and_lag_and_failures_grow(tmp_path: Path, place: Path) -> None:
    down(place)
    with watching(tmp_path, f"file://{place}") as watched:
        watched.started()
        watched.save(1)
        wait_for(lambda: "checkpoint_remote_failing" in watched.names(), "it is seen to be down")
        wait_for(lambda: watched.reports[-1].lag_seconds > 1, "the lag grows")
        assert watched.reports[-1].pending == 1
        assert sum(report.failures for report in watched.reports) >= 3
        up(place)
        wait_for(lambda: watched.steps_there() == [1] and watched.nothing_waits(), "it is copied then")
        assert watched.names() == ["checkpoint_remote_failing", "checkpoint_remote_recovered"]


def test_down_in_the_middle_of_a_copy_and_up_again(tmp_path: Path, place: Path) -> None:
    state = {f"layer{number}": torch.full((50, 50), float(number)) for number in range(400)}
    with watching(tmp_path, f"file://{place}") as watched:
        watched.save(1, state)
        process = watched.started()
        objects = place / "objects"
        wait_for(lambda: len(list(objects.glob("*/*"))) > 20, "it is under way")
        stop(process)
        down(place)
        process.resume()
        wait_for(lambda: "checkpoint_remote_failing" in watched.names(), "it is seen")
        assert not list((place.parent / "aside").glob("manifests/*"))
        up(place)
        wait_for(lambda: watched.steps_there() == [1] and watched.nothing_waits(), "it goes on")
        assert same(state, create_backup_system(tmp_path / "back").load(fetched(watched, tmp_path)).state)


def stop(process: psutil.Process) -> None:
    """Suspend it, and wait until none of its threads is in a system call any more."""
    process.suspend()
    tasks = Path(f"/proc/{process.pid}/task")

    def states() -> set[str]:
        return {path.read_text().rpartition(")")[2].split()[0] for path in tasks.glob("*/stat")}

    wait_for(lambda: states() == {"T"}, "all of it stands still")


def fetched(watched: Watched, tmp_path: Path) -> Path:
    return fetch(watched.url, tmp_path / "back")


def test_killed_in_the_middle_of_a_copy_another_goes_on(tmp_path: Path, place: Path) -> None:
    state = {f"layer{number}": torch.full((50, 50), float(number)) for number in range(2000)}
    with watching(tmp_path, f"file://{place}") as watched:
        watched.save(1, state)
        process = watched.started()
        wait_for(lambda: len(list((place / "objects").glob("*/*"))) > 20, "it is under way")
        stop(process)
        first = {path: path.stat() for path in (place / "objects").glob("*/*")}
        assert not list(place.glob("manifests/*"))
        process.kill()
        wait_for(lambda: watched.steps_there() == [1] and watched.nothing_waits(), "another one ends it")
        whole = {path: then.st_mtime_ns for path, then in first.items() if then.st_size == 10_000}
        assert len(whole) > 10 and all(path.stat().st_mtime_ns == then for path, then in whole.items()), (
            "what was there is not copied again"
        )
        assert watched.names() == ["checkpoint_mirror_died"]
        assert watched.events[0][1]["exit_code"] == -signal.SIGKILL
        assert sum(report.restarts for report in watched.reports) == 1
        assert same(state, create_backup_system(tmp_path / "back").load(fetched(watched, tmp_path)).state)


def test_the_lag_grows_while_there_is_no_process(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with watching(tmp_path, f"file://{place}") as watched:
        watched.mirror.start()
        watched.save(1)
        wait_for(lambda: watched.reports and watched.reports[-1].lag_seconds > 1, "the lag grows")
        assert watched.reports[-1].pending == 1 and "checkpoint_mirror_unavailable" in watched.names()
        monkeypatch.undo()
        wait_for(lambda: watched.steps_there() == [1] and watched.nothing_waits(), "copied once it can be")


def test_after_close_it_goes_on_until_all_is_copied_then_ends(tmp_path: Path, place: Path) -> None:
    down(place)
    with watching(tmp_path, f"file://{place}") as watched:
        process = watched.started()
        watched.save(1)
        wait_for(lambda: watched.reports and watched.reports[-1].pending == 1, "it is queued")
        watched.mirror.close()
        assert "obsinfra-mirror" not in [thread.name for thread in threading.enumerate()]
        assert process.is_running()
        up(place)
        (left,) = [left for left in background_mirror._left_behind if left.pid == process.pid]
        assert left.wait(SECONDS) == 0
        assert watched.steps_there() == [1] and watched.lines()[-1]["event"] == "all_copied"


def test_it_gives_up_after_a_bounded_time_and_the_next_one_takes_up_what_is_left(
    tmp_path: Path, place: Path
) -> None:
    down(place)
    with watching(tmp_path, f"file://{place}", linger_seconds=0.5) as watched:
        process = watched.started()
        watched.save(1)
        wait_for(lambda: watched.reports and watched.reports[-1].pending == 1, "it is queued")
        watched.mirror.close()
        wait_for(lambda: not psutil.pid_exists(process.pid) or process.status() == "zombie", "it gives up")
        last = watched.lines()[-1]
        assert (last["event"], last["why"], last["pending"]) == ("given_up", "time is up", 1)
    (note,) = (tmp_path / "store" / "outbox").rglob("*.json")
    up(place)
    with watching(tmp_path, f"file://{place}") as watched:
        watched.started()
        wait_for(lambda: watched.steps_there() == [1] and watched.nothing_waits(), "the next one copies it")
        assert max(report.lag_seconds for report in watched.reports) > 0.5 or not note.exists()


def test_one_that_lingers_hands_over_to_the_next(tmp_path: Path, place: Path) -> None:
    down(place)
    with watching(tmp_path, f"file://{place}") as first:
        old = first.started()
        first.save(1)
        wait_for(lambda: first.reports and first.reports[-1].pending == 1, "it is queued")
        first.mirror.close()
        with watching(tmp_path, f"file://{place}") as second:
            second.started()
            wait_for(lambda: not old.is_running() or old.status() == "zombie", "the old one makes way")
            wait_for(lambda: second.reports and second.reports[-1].pending == 1, "the new one has the queue")
            up(place)
            wait_for(lambda: second.steps_there() == [1] and second.nothing_waits(), "and copies it")
            assert "handed_over" in [line["event"] for line in second.lines()]


def test_sigterm_ends_it_only_after_the_trainer(tmp_path: Path, place: Path) -> None:
    """A host that shuts down signals all processes at once: the trainer's last checkpoint is yet to come."""
    down(place)
    with watching(tmp_path, f"file://{place}") as watched:
        process = watched.started()
        watched.save(1)
        wait_for(lambda: watched.reports and watched.reports[-1].pending == 1, "it runs")
        process.terminate()
        watched.save(2)
        wait_for(lambda: watched.reports[-1].pending == 2, "it goes on")
        watched.mirror.close()

        def ended() -> bool:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
            return not process.is_running() or process.status() == "zombie"

        wait_for(ended, "then it obeys")
        assert watched.lines()[-1]["why"] == "SIGTERM" and watched.names()[-1:] != ["checkpoint_mirror_died"]


def test_a_run_folder_that_was_removed_does_not_come_back(tmp_path: Path, place: Path) -> None:
    root = tmp_path / "runs" / "r"
    with watching(root, f"file://{place}") as watched:
        process = watched.started()
        watched.save(1)
        wait_for(watched.nothing_waits, "it works")
        shutil.rmtree(root)
        watched.mirror.close()
        (left,) = [left for left in background_mirror._left_behind if left.pid == process.pid]
        left.wait(SECONDS)
        assert not root.exists()


def test_nobody_waits_for_a_process_that_hangs(tmp_path: Path, place: Path) -> None:
    with watching(tmp_path, f"file://{place}") as watched:
        process = watched.started()
        watched.save(1)
        wait_for(watched.nothing_waits, "it works")
        stop(process)
        for step in range(2, 12):
            watched.save(step)
        wait_for(lambda: watched.reports[-1].pending == 10 and watched.reports[-1].lag_seconds > 1, "the lag")
        process.resume()
        wait_for(lambda: len(watched.steps_there()) == 11 and watched.nothing_waits(), "it catches up")


def test_a_forked_child_does_not_keep_it_alive(tmp_path: Path, place: Path) -> None:
    """A data loader's worker, say, that outlives the trainer."""
    with watching(tmp_path, f"file://{place}") as watched:
        process = watched.started()
        watched.save(1)
        wait_for(watched.nothing_waits, "it works")
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(read, 1)
            os._exit(0)
        try:
            watched.mirror._companion.connection.close()  # type: ignore[union-attr]  # as the trainer's death does
            wait_for(lambda: not process.is_running() or process.status() == "zombie", "it sees the end")
        finally:
            os.write(write, b"x")
            os.waitpid(child, 0)


TRAINER = """
import sys, time, torch
from pathlib import Path
from obsinfra.backup.background_mirror import BackgroundMirror
from obsinfra.backup.checkpointer import create_checkpointer
root, url = Path(sys.argv[1]), sys.argv[2]
mirror = BackgroundMirror(root / "store", url, on_report=lambda r: None, on_event=lambda e, f: None,
                          log_path=root / "logs" / "mirror.jsonl", first_wait_seconds=0.05,
                          longest_wait_seconds=0.2, linger_seconds=60)
mirror.start()
checkpointer = create_checkpointer(root / "store", log_path=root / "logs" / "writer.jsonl")
checkpointer.snapshot({"w": torch.full((1000,), 1.0)}, step=1, epoch=0)
checkpointer.commit("regular", "first").wait(60)
checkpointer.snapshot({"w": torch.full((1000,), 2.0)}, step=2, epoch=0)
while mirror.pid is None:
    time.sleep(0.01)
print(mirror.pid, flush=True)
sys.stdin.read()
"""


def test_after_a_sigkill_of_the_trainer_what_its_writer_commits_is_copied_too(
    tmp_path: Path, place: Path
) -> None:
    down(place)
    url = f"file://{place}"
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path), url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert trainer.stdout is not None
    mirror = psutil.Process(int(trainer.stdout.readline()))
    try:
        trainer.kill()
        trainer.wait()
        wait_for(
            lambda: len(list((tmp_path / "store" / "manifests").glob("*.json"))) == 2, "the heir commits"
        )
        assert mirror.is_running()
        up(place)
        wait_for(lambda: not mirror.is_running() or mirror.status() == "zombie", "it ends when all is there")
        assert [int(name[:12]) for name in Remote(url).manifests()] == [1, 2]
        path = fetch(url, tmp_path / "back")
        loaded = create_backup_system(tmp_path / "back").load(path)
        assert same({"w": torch.full((1000,), 2.0)}, loaded.state) and loaded.info.kind == "emergency"
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            mirror.kill()


IN_A_CONTAINER = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]

FIRST_PROCESS = """
import os, sys, torch
from pathlib import Path
from obsinfra.backup.background_mirror import BackgroundMirror
from obsinfra.backup.backup_system import create_backup_system
assert os.getpid() == 1
root = Path(sys.argv[1])
mirror = BackgroundMirror(root / "store", sys.argv[2], on_report=lambda r: None, on_event=lambda e, f: None)
create_backup_system(root / "store").save({"w": torch.ones(9)}, step=1, epoch=0)
mirror.start()
while mirror.pid is None:
    pass
mirror.close()
"""


def test_the_first_process_of_a_container_waits_for_its_mirror(tmp_path: Path, place: Path) -> None:
    """With it the kernel ends all others."""
    if shutil.which("unshare") is None or subprocess.run([*IN_A_CONTAINER, "true"], check=False).returncode:
        pytest.skip("no process namespace can be made here")
    command = [*IN_A_CONTAINER, sys.executable, "-c", FIRST_PROCESS, str(tmp_path), f"file://{place}"]
    assert subprocess.run(command, timeout=SECONDS, check=False).returncode == 0
    assert len(Remote(f"file://{place}").manifests()) == 1
