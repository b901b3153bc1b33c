"""The run folder: identity, lock, atomic files."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from obsinfra.errors import ConfigError, RunBusyError
from obsinfra.run.files import write_atomic, write_json_atomic
from obsinfra.run.folder import (
    FRESH_SECONDS,
    RunFolder,
    RunInfo,
    check_run_id,
    find_run,
    new_run_id,
    scan_runs,
)
from obsinfra.run.process import ProcessId

HOLDER = r"""
import sys, os
from pathlib import Path
from obsinfra.run.folder import RunFolder
folder = RunFolder(Path(sys.argv[1])); folder.create(); folder.lock()
if len(sys.argv) > 2 and os.fork() == 0:
    os.write(1, b"child %d\n" % os.getpid())  # one call, so that the two processes' lines stay whole
os.write(1, b"locked\n")
sys.stdin.read()
"""


def test_the_rooms_that_control_something_are_private(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    for room in (folder.control, folder.inbox, folder.acks):
        assert stat.S_IMODE(room.stat().st_mode) == 0o700


def test_a_second_trainer_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    root = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(RunBusyError, match=str(holder.pid)):
            RunFolder(root).lock()
    finally:
        holder.kill()
        holder.wait()
    folder = RunFolder(root)
    folder.lock()
    folder.unlock()


def test_a_forked_child_that_outlives_a_killed_trainer_does_not_keep_the_lock(tmp_path: Path) -> None:
    root = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root), "fork"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    lines = [holder.stdout.readline() for _ in range(3)]
    child = int(next(line for line in lines if line.startswith("child")).split()[1])
    holder.kill()
    holder.wait()
    try:
        assert ProcessId(child, psutil.Process(child).create_time()).alive()
        folder = RunFolder(root)
        folder.lock()
        folder.unlock()
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_same_process_cannot_lock_a_run_twice(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    first.create()
    first.lock()
    with pytest.raises(RunBusyError):
        RunFolder(tmp_path / "run").lock()
    with pytest.raises(RunBusyError):  # the refusal itself must not have dropped the lock
        RunFolder(tmp_path / "run").lock()
    first.unlock()


def test_a_run_whose_process_is_gone_is_dead_and_a_recycled_pid_does_not_revive_it(tmp_path: Path) -> None:
    me, folder = ProcessId.current(), RunFolder(tmp_path / "r")
    info = RunInfo("r", "m", state="running", processes={"0": {"pid": me.pid, "created": me.created}})
    assert folder.present_state(info) == "running"
    recycled = RunInfo(
        "r", "m", state="running", processes={"0": {"pid": me.pid, "created": me.created - 99}}
    )
    assert folder.present_state(recycled) == "dead"
    assert folder.present_state(RunInfo("r", "m", state="finished")) == "finished"


def test_a_run_of_another_host_or_container_lives_while_it_is_locked_or_its_progress_is_fresh(
    tmp_path: Path,
) -> None:
    """Its pids mean nothing here: they are of another namespace."""
    me = ProcessId.current()
    folder = RunFolder(tmp_path / "r")
    folder.create()
    info = RunInfo("r", "m", "running", host="elsewhere", processes={"0": asdict(me)})
    assert folder.present_state(info) == "dead"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        assert folder.present_state(info) == "running"
        with pytest.raises(RunBusyError):  # to ask whether it is locked takes nothing away from its holder
            folder.lock()
    finally:
        holder.communicate()
    assert folder.present_state(info) == "dead"
    folder.write_progress(7, 0)
    assert folder.present_state(info) == "running"
    write_json_atomic(folder.progress_json, {"step": 7, "at": time.time() - FRESH_SECONDS - 1})
    assert folder.present_state(info) == "dead"


def test_run_json_survives_unknown_fields_and_names_what_is_unreadable(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.write_info(RunInfo("run", "digits", epochs=3))
    text = folder.run_json.read_text()
    folder.run_json.write_text(text.replace("{", '{"from_the_future": 1,', 1))
    assert folder.read_info().epochs == 3
    for garbage in ("", "[]", '{"id": 1}', "{"):
        folder.run_json.write_text(garbage)
        with pytest.raises(ConfigError, match=r"run\.json"):
            folder.read_info()


@pytest.mark.parametrize(
    "bad", ["", "..", "a/b", "../x", "a" * 101, ".hidden", "a b", "a\nb", "x..y", "<script>"]
)
def test_run_names_that_could_leave_the_folder_are_refused(bad: str) -> None:
    with pytest.raises(ConfigError):
        check_run_id(bad)


def test_new_run_ids_are_valid_whatever_the_model_is_called() -> None:
    for model in ("digits", "pkg.module:factory", "../../etc", "ü", "", "-" * 200):
        check_run_id(new_run_id(model))


def test_scan_finds_runs_and_skips_the_stack_and_strangers(tmp_path: Path) -> None:
    for name in ("b", "a", ".stack"):
        folder = RunFolder(tmp_path / name)
        folder.create()
        folder.write_info(RunInfo(name, "m"))
    (tmp_path / "stranger").mkdir()
    assert [run.id for run in scan_runs(tmp_path)] == ["a", "b"]
    assert list(scan_runs(tmp_path / "missing")) == []
    assert find_run(tmp_path, "a").id == "a"
    with pytest.raises(ConfigError, match="a, b"):
        find_run(tmp_path, "c")


def test_write_atomic_leaves_the_old_file_when_the_disk_is_full() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")

    def fill(path: str) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            write_atomic(Path(path), b"x" * 1000)
        except OSError:
            os._exit(7)
        os._exit(0)

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write_atomic(path, b"old")
        process = multiprocessing.get_context("fork").Process(target=fill, args=(str(path),))
        process.start()
        process.join()
        assert process.exitcode == 7
        assert path.read_bytes() == b"old"
        assert os.listdir(folder) == ["file"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        '{"id": "r"}',
        '{"id": 3, "model": "m"}',
        '{"id": "r", "model": "m", "state": null}',
        '{"id": "r", "model": "m", "processes": []}',
        '{"id": "r", "model": "m", "processes": {"0": {"pid": "x", "created": 1}}}',
        '{"id": "r", "model": "m", "processes": {"0": {}}}',
        '{"id": "r", "model": "m", "metrics_urls": {"0": 9464}}',
        '{"id": "r", "model": "m", "restarts": "many"}',
        "[" * 100_000,
    ],
)
def test_a_run_json_that_no_trainer_wrote_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match="unreadable"):
        RunFolder(tmp_path).read_info()


def test_a_link_in_a_circle_does_not_hide_the_other_runs(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    folder = RunFolder(tmp_path / "sound")
    folder.create()
    folder.write_info(RunInfo("sound", "m"))
    assert [run.id for run in scan_runs(tmp_path)] == ["sound"]
