"""Which runs are scraped and get a heartbeat: the live ones, whatever else lies in the folder of runs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from trainer_double import run_folder
from waiting import wait_for

from obsinfra.control import run_watch
from obsinfra.control.run_watch import RunWatch
from obsinfra.run.folder import RunFolder

DEAD = {"0": {"pid": 2**22 + 1, "created": 1.0}}


@pytest.fixture
def states() -> list[dict[str, int]]:
    return []


@pytest.fixture
def watch(
    tmp_path: Path, states: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunWatch]:
    monkeypatch.setattr(run_watch, "HEARTBEAT_SECONDS", 0.05)
    watch = RunWatch(tmp_path, states.append)
    yield watch
    if watch._thread.is_alive():
        watch.stop()


def test_only_live_runs_are_told_to_prometheus_in_the_shape_of_http_sd(
    tmp_path: Path, watch: RunWatch
) -> None:
    urls = {"0": "http://127.0.0.1:9464/metrics", "1": "http://[::1]:9465/metrics"}
    run_folder(tmp_path, "two-ranks", metrics_urls=urls)
    run_folder(tmp_path, "killed", processes=DEAD)
    run_folder(tmp_path, "over", state="finished")
    run_folder(tmp_path, "no-metrics", metrics_urls={})
    watch.start()
    labels = {"run": "two-ranks", "model": "digits", "host": socket.gethostname()}
    assert watch.targets() == [
        {"targets": ["127.0.0.1:9464"], "labels": {**labels, "rank": "0"}},
        {"targets": ["[::1]:9465"], "labels": {**labels, "rank": "1"}},
    ]


def test_prometheus_in_a_container_is_told_how_to_reach_the_loopback_of_this_machine(tmp_path: Path) -> None:
    """A run of another container is reached as it says; one of the sidecar's own host too."""
    urls = {
        "0": "http://127.0.0.1:9464/metrics",
        "1": "http://172.18.0.7:9464/metrics",
        "2": "http://[::1]:9/metrics",
        "3": "http://localhost:1/metrics",
    }
    for run, host in (("far", "elsewhere"), ("near", socket.gethostname())):
        run_folder(tmp_path, run, metrics_urls=urls, host=host).write_progress(1, 0)
    watch = RunWatch(tmp_path, lambda _: None, loopback_host="host.docker.internal")
    told: dict[str, list[str]] = {"far": [], "near": []}
    for target in watch.targets():
        told[target["labels"]["run"]] += target["targets"]
    gateway = "host.docker.internal"
    assert told["far"] == [f"{gateway}:9464", "172.18.0.7:9464", f"{gateway}:9", f"{gateway}:1"]
    assert told["near"] == ["127.0.0.1:9464", "172.18.0.7:9464", "[::1]:9", "localhost:1"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"[" * 100_000,
        json.dumps({"id": "x", "model": "m", "processes": {"0": {}}}).encode(),
        json.dumps({"id": "x", "model": "m", "processes": {"0": {"pid": "abc", "created": 1}}}).encode(),
        json.dumps({"id": "x", "model": "m", "processes": {"0": {"pid": -1, "created": 1}}}).encode(),
        json.dumps({"id": "x", "model": "m", "processes": [1]}).encode(),
        json.dumps({"id": "x", "model": "m", "state": ["running"]}).encode(),
        json.dumps({"id": "x", "model": "m", "state": "x" * 9_000}).encode(),
        json.dumps({"id": "x", "model": {"a": 1}}).encode(),
        json.dumps({"id": "x", "model": "m", "metrics_urls": None}).encode(),
        json.dumps({"id": "x", "model": "m", "metrics_urls": {"0": 5}}).encode(),
        json.dumps({"id": "x", "model": "m", "metrics_urls": {"0": "http://[bad"}}).encode(),
    ],
    ids=lambda content: str(content)[2:70],
)
def test_a_malformed_run_json_hides_no_other_run(
    tmp_path: Path, watch: RunWatch, states: list[dict[str, int]], content: bytes
) -> None:
    run_folder(tmp_path, "a-broken").run_json.write_bytes(content)
    sound = run_folder(tmp_path, "b-sound")
    watch.start()
    assert [target["labels"]["run"] for target in watch.targets()] == ["b-sound"]
    assert sound.heartbeat.exists() and watch.find("b-sound") is not None
    assert states[-1] == {"unreadable": 1, "running": 1}


def test_a_run_json_that_is_a_pipe_keeps_nobody_waiting(tmp_path: Path, watch: RunWatch) -> None:
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "run.json")
    run_folder(tmp_path, "sound")
    watch.start()
    assert [run.folder.id for run in watch.runs()] == ["sound"]
    assert watch.find("pipe") is None


def test_an_address_that_is_none_does_not_spoil_the_list(tmp_path: Path, watch: RunWatch) -> None:
    """Prometheus refuses the whole list for one target without an address or a label that is no text."""
    run_folder(tmp_path, "odd", metrics_urls={"0": "nonsense"})
    run_folder(tmp_path, "sound")
    watch.start()
    assert [target["labels"]["run"] for target in watch.targets()] == ["sound"]


def test_a_copied_folder_is_known_by_its_own_name(tmp_path: Path, watch: RunWatch) -> None:
    run_folder(tmp_path, "copy", id="original")
    watch.start()
    assert [target["labels"]["run"] for target in watch.targets()] == ["copy"]
    assert watch.find("original") is None


@pytest.mark.parametrize("name", ["", ".", "..", "../r1", "r1/", "r1/control", "/", "r1\0", "x" * 10_000])
def test_no_label_finds_a_folder_that_the_scan_did_not(tmp_path: Path, watch: RunWatch, name: str) -> None:
    run_folder(tmp_path)
    watch.start()
    assert watch.find("r1") is not None and watch.find(name) is None


def test_the_heartbeat_is_there_only_while_prometheus_asks(
    tmp_path: Path, watch: RunWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, dead = run_folder(tmp_path), run_folder(tmp_path, "killed", processes=DEAD)
    watch.start()
    assert watch.find("r1") is not None and not watch.prometheus_asks
    assert not folder.heartbeat.exists()
    watch.targets()
    assert watch.prometheus_asks and folder.sidecar_alive(time.time())
    first = folder.heartbeat.read_text()
    wait_for(lambda: folder.heartbeat.read_text() != first, "renewed")
    assert not dead.heartbeat.exists()
    monkeypatch.setattr(run_watch, "PROMETHEUS_SILENT_SECONDS", 0.0)
    assert not watch.prometheus_asks
    assert watch.find("nothing") is None  # a scan after the silence began
    stale = folder.heartbeat.read_text()
    assert watch.find("nothing") is None
    assert folder.heartbeat.read_text() == stale


def test_no_heartbeat_while_alerts_would_not_come(tmp_path: Path) -> None:
    folder, come = run_folder(tmp_path), threading.Event()
    watch = RunWatch(tmp_path, lambda _: None, come.is_set)
    watch.start()
    try:
        watch.targets()
        assert watch.prometheus_asks and not folder.heartbeat.exists()
        come.set()
        wait_for(lambda: folder.sidecar_alive(time.time()), "the first heartbeat")
        come.clear()
        wait_for(lambda: not folder.sidecar_alive(time.time()), "the last one is stale")
    finally:
        watch.stop()


def test_stop_ends_the_thread_and_takes_the_heartbeats_away(tmp_path: Path, watch: RunWatch) -> None:
    folder = run_folder(tmp_path)
    watch.start()
    watch.targets()
    assert folder.heartbeat.exists()
    watch.stop()
    assert not folder.heartbeat.exists()
    assert "obsinfra-run-watch" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("progress", "live"),
    [
        ({"at": "now"}, True),
        ({"at": 1.0}, False),
        ({"at": None}, False),
        ({}, False),
        ([], False),
        (None, False),
    ],
)
def test_a_run_of_another_host_lives_by_its_progress(
    tmp_path: Path, watch: RunWatch, progress: Any, live: bool
) -> None:
    folder = run_folder(tmp_path, host="another-host", processes=DEAD)
    if progress is not None:
        if isinstance(progress, dict) and progress.get("at") == "now":
            progress = {"at": time.time()}
        (folder.root / "progress.json").write_text(json.dumps(progress))
    watch.start()
    assert bool(watch.targets()) == live


def test_no_folder_of_runs_yet_is_no_error(tmp_path: Path) -> None:
    watch = RunWatch(tmp_path / "later", lambda _: None)
    watch.start()
    assert watch.targets() == []
    run_folder(tmp_path / "later")
    assert watch.find("r1") is not None
    watch.stop()


# ---- which runs are up ---------------------------------------------------------------------------------


def up(watch: RunWatch) -> dict[str, float]:
    return {sample.labels["run"]: sample.value for sample in watch.run_up()}


def test_a_run_is_up_while_its_trainer_lives_and_down_once_it_died_without_a_word(
    tmp_path: Path, watch: RunWatch
) -> None:
    folder = run_folder(tmp_path)
    run_folder(tmp_path, "over", state="finished")
    watch.start()
    assert up(watch) == {"r1": 1.0}
    assert watch.run_up()[0].labels == {"run": "r1", "model": "digits"}
    folder.update_info(processes=DEAD)
    wait_for(lambda: up(watch) == {"r1": 0.0}, "seen as down")
    assert watch.targets() == []
    folder.update_info(processes=run_folder(tmp_path, "other").read_info().processes)
    wait_for(lambda: up(watch) == {"r1": 1.0, "other": 1.0}, "resumed")
    folder.update_info(state="failed")
    wait_for(lambda: up(watch) == {"other": 1.0}, "ended, so no longer told")


@pytest.mark.parametrize(("ago", "told"), [(60.0, True), (3_500.0, True), (3_700.0, False)])
def test_a_death_before_the_sidecars_start_is_told_for_an_hour(
    tmp_path: Path, watch: RunWatch, ago: float, told: bool
) -> None:
    folder = run_folder(tmp_path, processes=DEAD)
    os.utime(folder.run_json, (time.time() - 9_000, time.time() - 9_000))
    (folder.root / "progress.json").write_text(json.dumps({"at": time.time() - ago, "step": 5}))
    watch.start()
    assert up(watch) == ({"r1": 0.0} if told else {})


def test_a_run_seen_alive_is_told_down_from_its_death_on_however_old_its_progress(
    tmp_path: Path, watch: RunWatch
) -> None:
    """A hung trainer notes no progress for hours; then somebody kills it."""
    folder = run_folder(tmp_path)
    watch.start()
    folder.update_info(processes=DEAD)
    os.utime(folder.run_json, (time.time() - 9_000, time.time() - 9_000))
    wait_for(lambda: up(watch) == {"r1": 0.0}, "seen as down")


def test_a_killed_process_drops_out_by_itself(tmp_path: Path, watch: RunWatch) -> None:
    """Nothing is written when a process is killed: the scan has to notice."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as trainer:
        created = psutil.Process(trainer.pid).create_time()
        run_folder(tmp_path, processes={"0": {"pid": trainer.pid, "created": created}})
        watch.start()
        assert len(watch.targets()) == 1
        trainer.kill()
        wait_for(lambda: watch.targets() == [] and up(watch) == {"r1": 0.0}, "dropped")


# ---- inotify -------------------------------------------------------------------------------------------


def slow_watch(tmp_path: Path) -> RunWatch:
    return RunWatch(tmp_path, lambda _: None)


def test_inotify_tells_of_new_runs_changed_runs_and_removed_runs_between_two_polls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_watch, "HEARTBEAT_SECONDS", 3_600.0)
    watch = slow_watch(tmp_path)
    watch.start()
    try:
        folder = run_folder(tmp_path)
        wait_for(lambda: [run.folder.id for run in watch.runs()] == ["r1"], "found")
        folder.update_info(state="finished")
        wait_for(lambda: watch.runs()[0].info.state == "finished", "read again")
        shutil.rmtree(folder.root)
        wait_for(lambda: watch.runs() == [], "gone")
        run_folder(tmp_path)
        wait_for(lambda: [run.folder.id for run in watch.runs()] == ["r1"], "found again")
    finally:
        watch.stop()


@pytest.mark.parametrize("broken", ["no inotify", "no watches left"])
def test_polling_finds_runs_where_inotify_does_not_work(
    tmp_path: Path, watch: RunWatch, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    if broken == "no inotify":
        os.close(watch._events._fd)
        watch._events._fd = -1
    else:
        monkeypatch.setattr(watch._events, "_add", lambda path, mask: None)
    watch.start()
    assert not watch._events.works
    run_folder(tmp_path)
    wait_for(lambda: [run.folder.id for run in watch.runs()] == ["r1"], "found by polling")


def test_a_watch_gives_back_its_descriptors(tmp_path: Path) -> None:
    before = psutil.Process().num_fds()
    watch = slow_watch(tmp_path)
    run_folder(tmp_path)
    watch.start()
    assert psutil.Process().num_fds() > before
    watch.stop()
    assert psutil.Process().num_fds() == before


def test_a_run_json_that_was_not_replaced_is_not_read_again(
    tmp_path: Path, watch: RunWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand finished runs must not cost a thousand reads every two seconds."""
    folder = run_folder(tmp_path)
    watch.start()
    reads: list[str] = []
    read_info = RunFolder.read_info
    monkeypatch.setattr(RunFolder, "read_info", lambda self: (reads.append(self.id), read_info(self))[1])
    watch._scan()
    assert reads == []
    folder.write_info(replace(read_info(folder), model="other"))
    reads.clear()
    watch._scan()
    assert watch.runs()[0].info.model == "other" and len(reads) <= 1
