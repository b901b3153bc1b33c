"""What a save writes and what it does not; what a manifest says; who may read it; too little space."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from faulty_files import WatchedFiles, tree
from same import same, small_state

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.errors import CheckpointError

SMALL_STATE_BYTES = 4 * (400 + 7 + 300)


def test_what_was_saved_is_reported_and_listed(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    backup = create_backup_system(tmp_path / "store", run="run-1")
    saved = backup.save(
        small_state(),
        step=12,
        epoch=3,
        kind="emergency",
        metrics={"loss": 0.25, "grad_norm": float("nan"), "peak": float("inf")},
        reason="loss spike",
        attributes={"source": "host snapshot", "ranks": [0, 1]},
    )
    assert (saved.step, saved.epoch, saved.kind) == (12, 3, "emergency")
    assert (saved.bytes_total, saved.bytes_written) == (SMALL_STATE_BYTES, SMALL_STATE_BYTES)
    assert saved.duration_seconds > 0
    (info,) = create_backup_system(tmp_path / "store").list()
    assert info.path == saved.path and info.path.parent == tmp_path / "store" / "manifests"
    assert (info.id, info.run, info.kind, info.step, info.epoch) == (saved.id, "run-1", "emergency", 12, 3)
    assert info.reason == "loss spike" and info.parent is None
    assert same({"loss": 0.25, "grad_norm": float("nan"), "peak": float("inf")}, info.metrics)
    assert info.attributes == {"resumable": True, "source": "host snapshot", "ranks": [0, 1]}
    assert info.versions["torch"] == torch.__version__ and set(info.versions) == {
        "obsinfra",
        "torch",
        "python",
    }
    assert info.bytes_total == SMALL_STATE_BYTES
    assert before <= datetime.fromisoformat(info.created_at) <= datetime.now(UTC)


def test_the_same_state_is_written_once(tmp_path: Path) -> None:
    backup = create_backup_system(tmp_path)
    backup.save(small_state(), step=1, epoch=0)
    objects = tree(tmp_path / "objects")
    again = backup.save(small_state(), step=2, epoch=0)
    assert (again.bytes_written, again.bytes_total) == (0, SMALL_STATE_BYTES)
    assert tree(tmp_path / "objects") == objects
    assert [info.step for info in backup.list()] == [1, 2]


def test_only_chunks_that_changed_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsinfra.backup.store.CHUNK_BYTES", 1000)
    backup = create_backup_system(tmp_path)
    state = {"embedding": torch.arange(1000.0), "head": torch.ones(50), "steps": 1}
    assert backup.save(state, step=1, epoch=0).bytes_written == 4200
    state["embedding"][600] = -1.0
    state["steps"] = 2
    assert backup.save(state, step=2, epoch=0).bytes_written == 1000
    state["head"][0] = 0.0
    assert backup.save(state, step=3, epoch=0).bytes_written == 200
    assert same(state, backup.load().state)
    assert backup.load(backup.list()[1].path).state["head"][0] == 1.0


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    backup = create_backup_system(tmp_path)
    weight = torch.randn(100)
    saved = backup.save({"embedding": weight, "head": weight}, step=1, epoch=0)
    assert saved.bytes_total == saved.bytes_written == 400
    assert len(backup.list()[0].tensors) == 1


def test_a_loaded_state_is_the_callers_own(tmp_path: Path) -> None:
    """Tensors of one chunk do not share memory, and writing to them does not reach the store."""
    backup = create_backup_system(tmp_path)
    backup.save({"a": torch.zeros(4), "b": torch.zeros(4)}, step=1, epoch=0)
    state = backup.load().state
    state["a"].fill_(1.0)
    assert state["b"].tolist() == [0.0] * 4
    assert backup.load().state["a"].tolist() == [0.0] * 4


def test_parent_is_the_checkpoint_committed_before_whatever_its_step(tmp_path: Path) -> None:
    backup = create_backup_system(tmp_path)
    chain = []
    for step, kind in ((10, "regular"), (10, "best"), (5, "emergency"), (6, "regular")):
        saved = backup.save(small_state(step), step=step, epoch=0, kind=kind)
        chain.append(saved.id)
        older = time.time_ns() - 10**12 + 10**9 * len(chain)  # a second apart, however coarse the clock
        os.utime(saved.path, ns=(older, older))
    parents = {info.id: info.parent for info in backup.list()}
    assert [parents[identity] for identity in chain] == [None, *chain[:-1]]


def test_attributes_that_are_not_json_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    backup = create_backup_system(tmp_path)
    for value in (torch.ones(1), float("nan"), {1, 2}):
        with pytest.raises(CheckpointError, match=r"attributes .*mine.* not JSON"):
            backup.save(small_state(), step=1, epoch=0, attributes={"mine": value})
    assert tree(tmp_path) == {}


def test_only_the_owner_may_read_checkpoints(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        backup = create_backup_system(tmp_path / "runs" / "store")
        backup.save(small_state(), step=1, epoch=0)
    finally:
        os.umask(old)
    root = tmp_path / "runs" / "store"
    found = {path: path.stat().st_mode & 0o777 for path in [root, *root.rglob("*")]}
    assert len(found) > 8
    assert {mode for path, mode in found.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in found.items() if path.is_file()} == {0o600}


def with_free_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    def statvfs(path: object) -> os.statvfs_result:
        return os.statvfs_result((4096, 1024, 10**9, 10**9, free // 1024, 0, 0, 0, 0, 255))

    monkeypatch.setattr("obsinfra.backup.store.os.statvfs", statvfs)


def test_too_little_space_is_refused_with_numbers_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = create_backup_system(tmp_path)
    backup.save(small_state(), step=1, epoch=0)
    before = tree(tmp_path)
    state = {"weight": torch.ones(5_000_000, dtype=torch.uint8)}
    with_free_bytes(monkeypatch, 12 * 10**6)
    with pytest.raises(CheckpointError) as caught:
        backup.save(state, step=2, epoch=0)
    assert f"12 MB free in {tmp_path}; expected 13 MB for this checkpoint" in str(caught.value)
    assert tree(tmp_path) == before
    with_free_bytes(monkeypatch, 14 * 10**6)
    backup.save(state, step=2, epoch=0)
    assert backup.load().info.step == 2


def test_a_commit_is_durable_before_it_is_visible(tmp_path: Path) -> None:
    """Chunks, their names and the folders' names come before the manifest's rename; then that is synced."""
    files = WatchedFiles()
    backup = create_backup_system(tmp_path, files=files)
    saved = backup.save(small_state(), step=1, epoch=0)
    commit = files.operations.index(("rename", saved.path))
    assert files.operations[commit + 1 :] == [("sync", tmp_path / "manifests")]
    earlier = files.operations[:commit]
    for digest in backup.list()[0].chunks():
        named = earlier.index(("rename", tmp_path / "objects" / digest[:2] / digest))
        synced = earlier.index(("sync", tmp_path / "objects" / digest[:2]))
        assert named < synced < earlier.index(("sync", tmp_path / "objects"))
    assert ("sync", tmp_path) in earlier and ("sync", tmp_path.parent) in earlier


def test_impossible_retention_is_refused(tmp_path: Path) -> None:
    for name in ("keep_last", "keep_best", "keep_emergency"):
        with pytest.raises(ValueError, match="at least one"):
            create_backup_system(tmp_path, **{name: 0})
