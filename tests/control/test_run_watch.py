"""Which runs are scraped and get a heartbeat: the live ones, whatever else lies in the folder of runs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trainer_double import run_folder
from waiting import wait_for

from obsinfra.control import run_watch
from obsinfra.control.run_watch import RunWatch

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
    labels = {"run": "two-ranks", "model": "digits"}
    assert watch.targets() == [
        {"targets": ["127.0.0.1:9464"], "labels": {**labels, "rank": "0"}},
        {"targets": ["[::1]:9465"], "labels": {**labels, "rank": "1"}},
    ]


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
