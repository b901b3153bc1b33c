"""Pruning keeps what it promises and the newest sound checkpoint in any case; loading finds that one."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import pytest
import torch
import torch.distributed.checkpoint as dcp
from faulty_files import DyingFiles, FileLayer, PowerCut, QuickFiles
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from same import same, small_state

from obsinfra.backup.backup_system import BackupSystem, create_backup_system
from obsinfra.backup.dcp import ObsinfraWriter
from obsinfra.errors import CheckpointError

Kind = Literal["regular", "emergency", "best", "final"]


def save(backup: BackupSystem, step: int, kind: Kind = "regular", seed: int | None = None) -> Path:
    state = small_state(step if seed is None else seed)
    return backup.save(state, step=step, epoch=0, kind=kind, attributes={"resumable": kind != "best"}).path


def damage_chunks(backup: BackupSystem, path: Path) -> set[str]:
    """Damage the chunks that are this checkpoint's alone (all its seeds have one in common)."""
    infos = backup.list()
    (mine,) = [info for info in infos if info.path == path]
    others = {digest for info in infos if info.path != path for digest in info.chunks()}
    damaged = mine.chunks() - others or mine.chunks()
    for digest in damaged:
        file = backup.store.objects.root / digest[:2] / digest
        file.write_bytes(b"\0" * file.stat().st_size)
    return damaged


def objects(backup: BackupSystem) -> set[str]:
    return {path.name for path in backup.store.objects.root.rglob("*") if path.is_file()}


def whole(names: set[str]) -> set[str]:
    """Without what a crash left half-written, which is nobody's."""
    return {name for name in names if not name.endswith(".tmp")}


def wanted(backup: BackupSystem) -> set[str]:
    return {digest for info in backup.list() for digest in info.chunks()}


def test_the_newest_of_each_kind_are_kept_and_only_their_chunks(tmp_path: Path) -> None:
    backup = create_backup_system(tmp_path, keep_last=2, keep_best=1, keep_emergency=3)
    kinds: list[Kind] = ["regular", "best", "emergency", "final"]
    paths = {(kind, step): save(backup, step, kind) for step in range(1, 5) for kind in kinds}
    removed = backup.prune()
    kept = {
        ("regular", 3), ("regular", 4), ("final", 3), ("final", 4), ("best", 4),
        ("emergency", 2), ("emergency", 3), ("emergency", 4),
    }  # fmt: skip
    assert {(info.kind, info.step) for info in backup.list()} == kept
    assert sorted(removed) == sorted(path for who, path in paths.items() if who not in kept)
    assert objects(backup) == wanted(backup)
    for info in backup.list():
        assert same(small_state(info.step), backup.load(info.path).state)
    assert backup.prune() == []


def test_emergencies_stay_until_confirmed_by_default(tmp_path: Path) -> None:
    backup = create_backup_system(tmp_path, files=QuickFiles())
    emergencies = [save(backup, step, "emergency") for step in range(1, 9)]
    assert backup.prune() == []
    for path in emergencies[:6]:
        backup.confirm(path)
    assert backup.prune() == emergencies[:3], "a confirmed one is as a regular one, of which three are kept"


def save_distributed(backup: BackupSystem, step: int) -> Path:
    """One of `torch.distributed.checkpoint`, as `dcp.save` in a single process makes it."""
    writer = ObsinfraWriter(backup.store.root, step=step)
    dcp.save({"w": torch.full((100,), float(step))}, storage_writer=writer, no_dist=True)
    assert writer.saved is not None
    return writer.saved.path


def test_the_newest_sound_distributed_one_stays_beside_the_newest_resumable_one(tmp_path: Path) -> None:
    backup = create_backup_system(tmp_path, keep_last=1, files=QuickFiles())
    distributed = [save_distributed(backup, step) for step in (1, 2, 3)]
    damage_chunks(backup, distributed[2])
    resumable = [save(backup, step) for step in (4, 5)]
    assert sorted(backup.prune()) == sorted([distributed[0], distributed[2], resumable[0]])
    assert {info.path for info in backup.list()} == {distributed[1], resumable[1]}
    newer = save_distributed(backup, 6)
    assert backup.prune() == [distributed[1]], "of a newer sound one it makes way"
    assert backup.load().info.path == resumable[1], "and it never counts as the newest resumable one"
    assert {info.path for info in backup.list()} == {resumable[1], newer}


def test_what_load_cannot_resume_from_is_passed_over_but_loads_by_name(tmp_path: Path) -> None:
    backup = create_backup_system(tmp_path, files=QuickFiles())
    save(backup, 1)
    best = save(backup, 2, "best")
    assert backup.load().info.step == 1
    assert same(small_state(2), backup.load(best).state)


def test_the_newest_sound_one_stays_though_newer_damaged_ones_fill_its_place(tmp_path: Path) -> None:
    backup = create_backup_system(tmp_path, keep_last=2)
    paths = [save(backup, step) for step in range(1, 5)]
    for path in paths[2:]:
        damage_chunks(backup, path)
    assert create_backup_system(tmp_path, keep_last=2).prune() == [paths[0]]
    loaded = backup.load()
    assert loaded.info.step == 2 and same(small_state(2), loaded.state)
    assert [passed.path for passed in loaded.skipped] == paths[:1:-1]


def test_damage_right_after_the_own_save_is_seen_by_the_prune(tmp_path: Path) -> None:
    """What this process wrote itself is not read again, unless it was touched since."""
    backup = create_backup_system(tmp_path, keep_last=1)
    first = save(backup, 1)
    damage_chunks(backup, save(backup, 2))
    assert backup.prune() == []
    assert backup.load().info.path == first


def test_rot_that_no_time_stamp_shows_is_seen_by_the_prune_of_a_later_process(tmp_path: Path) -> None:
    backup = create_backup_system(tmp_path, keep_last=1)
    first = save(backup, 1)
    for digest in damage_chunks(backup, save(backup, 2)):
        os.utime(backup.store.objects.root / digest[:2] / digest, (0, 0))
    assert create_backup_system(tmp_path, keep_last=1).prune() == []
    assert backup.load().info.path == first


def test_a_missing_chunk_of_the_own_save_is_seen_by_the_prune(tmp_path: Path) -> None:
    backup = create_backup_system(tmp_path, keep_last=1)
    save(backup, 1)
    save(backup, 2)
    digest = sorted(backup.list()[1].chunks() - backup.list()[0].chunks())[0]
    (backup.store.objects.root / digest[:2] / digest).unlink()
    assert backup.prune() == []


def test_the_one_saved_last_stays_though_its_step_is_lower(tmp_path: Path) -> None:
    """Training was rewound to an older checkpoint."""
    backup = create_backup_system(tmp_path, keep_last=2)
    for step in (10, 20, 30):
        save(backup, step)
    backup.prune()
    save(backup, 12)
    backup.prune()
    assert [info.step for info in backup.list()] == [12, 20, 30]
    save(backup, 14)
    backup.prune()
    assert [info.step for info in backup.list()] == [14, 20, 30]


def test_an_unreadable_manifest_stays_and_stops_the_collection(tmp_path: Path) -> None:
    backup = create_backup_system(tmp_path, keep_last=1)
    unreadable = save(backup, 1)
    whole = unreadable.read_bytes()
    unreadable.write_bytes(whole.replace(b'"step":1', b'"step":9'))
    save(backup, 2)
    save(backup, 3)
    before = objects(backup)
    (removed,) = backup.prune()
    assert removed.name.startswith("000000000002")
    assert unreadable.exists() and objects(backup) == before
    unreadable.write_bytes(whole)
    assert same(small_state(1), backup.load(unreadable).state), "mended by hand, its chunks are still there"
    save(backup, 4)
    backup.prune()
    assert objects(backup) == wanted(backup) and [info.step for info in backup.list()] == [4]


@dataclass
class Saved:
    """What the model knows of one checkpoint: its place in the order, its content, its chunks."""

    order: tuple[int, int]
    kind: Kind
    seed: int
    chunks: set[str]
    readable: bool = True


class StoreMachine(RuleBasedStateMachine):
    """Save, damage, prune, tag, crash, restore in any order: load() gives the newest sound state exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.restart()
        self.saved: dict[Path, Saved] = {}
        self.damaged: set[str] = set()
        self.tagged: dict[str, Path] = {}
        self.step = 0
        self.count = 0

    def teardown(self) -> None:
        self.folder.cleanup()

    def newest_sound(self) -> Path | None:
        sound = [
            path
            for path, saved in self.saved.items()
            if saved.readable and saved.kind != "best" and not saved.chunks & self.damaged
        ]
        return max(sound, key=lambda path: self.saved[path].order, default=None)

    @rule()
    def restart(self) -> None:
        self.backup = self.system(QuickFiles())

    def system(self, files: FileLayer) -> BackupSystem:
        root = Path(self.folder.name) / "store"
        return create_backup_system(root, keep_last=2, keep_best=1, keep_emergency=1, files=files)

    @rule(
        forward=st.sampled_from([0, 1, 1, 1]),
        kind=st.sampled_from(["regular", "regular", "emergency", "best", "final"]),
        seed=st.integers(0, 5),
    )
    def save(self, forward: int, kind: Kind, seed: int) -> None:
        self.step += forward
        self.count += 1
        path = save(self.backup, self.step, kind, seed)
        chunks = self.backup.store.read_manifest(path).chunks()
        self.saved[path] = Saved((self.step, self.count), kind, seed, chunks)
        self.damaged -= chunks  # what it found damaged was written anew

    @rule(at=st.integers(1, 40), seed=st.integers(0, 5), prune=st.booleans())
    def crash(self, at: int, seed: int, prune: bool) -> None:
        """In a save, or in the prune after it; another process goes on."""
        self.step += 1
        self.count += 1
        dying = self.system(DyingFiles(at))
        with contextlib.suppress(PowerCut):
            save(dying, self.step, "regular", seed)
            if prune:
                dying.prune()
        self.restart()
        there = set(self.backup.store.manifest_paths())
        for path in there - self.saved.keys():
            chunks = self.backup.store.read_manifest(path).chunks()
            self.saved[path] = Saved((self.step, self.count), "regular", seed, chunks)
        for path in self.saved.keys() - there:
            assert prune and path not in self.tagged.values()
            del self.saved[path]
        self.damaged = {digest for digest in self.damaged if not self.is_sound(digest)}

    def is_sound(self, digest: str) -> bool:
        path = self.backup.store.objects.root / digest[:2] / digest
        return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest

    @precondition(lambda self: any(saved.readable for saved in self.saved.values()))
    @rule(data=st.data(), name=st.sampled_from(["a", "b"]))
    def tag(self, data: st.DataObject, name: str) -> None:
        path = data.draw(st.sampled_from([path for path, saved in self.saved.items() if saved.readable]))
        self.backup.tag(path, name, move=True)
        self.tagged[name] = path

    @precondition(lambda self: self.tagged)
    @rule(data=st.data())
    def untag(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.tagged)))
        self.backup.untag(name)
        del self.tagged[name]

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(list(self.saved)))
        saved = self.saved[path]
        if saved.readable and not saved.chunks & self.damaged:
            assert same(small_state(saved.seed), self.backup.load(path).state)
        else:
            with pytest.raises(CheckpointError):
                self.backup.load(path)

    @precondition(lambda self: any(saved.readable for saved in self.saved.values()))
    @rule(data=st.data())
    def damage_chunks(self, data: st.DataObject) -> None:
        readable = [path for path, saved in self.saved.items() if saved.readable]
        self.damaged |= damage_chunks(self.backup, data.draw(st.sampled_from(readable)))

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def damage_manifest(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(list(self.saved)))
        path.write_bytes(path.read_bytes()[:-20])
        self.saved[path].readable = False

    @rule()
    def prune(self) -> None:
        before, held = self.newest_sound(), objects(self.backup) if self.saved else set()
        held = {name for name in held if not name.endswith(".tmp")}  # what a crash left half done goes
        removed = self.backup.prune()
        for path in removed:
            assert self.saved.pop(path).readable and not path.exists() and path not in self.tagged.values()
        assert self.newest_sound() == before
        if not all(saved.readable for saved in self.saved.values()):
            assert not self.saved or whole(objects(self.backup)) == whole(held)
        elif removed:
            assert objects(self.backup) == wanted(self.backup)

    @invariant()
    def the_newest_sound_one_loads(self) -> None:
        expected = self.newest_sound()
        if expected is None:
            with pytest.raises(CheckpointError, match="no sound checkpoint"):
                self.backup.load()
            return
        loaded = self.backup.load()
        assert loaded.info.path == expected
        assert same(small_state(self.saved[expected].seed), loaded.state)

    @invariant()
    def verify_finds_exactly_the_damage(self) -> None:
        found = {result.path for result in self.backup.verify() if result.problem}
        assert found == {
            path for path, saved in self.saved.items() if not saved.readable or saved.chunks & self.damaged
        }


StoreMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
test_any_sequence_of_saves_damage_prunes_tags_and_crashes = StoreMachine.TestCase
