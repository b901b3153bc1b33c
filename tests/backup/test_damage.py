"""Damage in any file is found, named and passed over; nothing found in a store is ever executed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_files import QuickFiles
from same import same, small_state

from obsinfra.backup.backup_system import BackupSystem, create_backup_system
from obsinfra.errors import CheckpointError


@pytest.fixture
def backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BackupSystem:
    """Two checkpoints, steps 1 and 2, of several chunks each; the chunks of `frozen` belong to both."""
    monkeypatch.setattr("obsinfra.backup.store.CHUNK_BYTES", 700)
    backup = create_backup_system(tmp_path / "store", files=QuickFiles())
    for step in (1, 2):
        backup.save(small_state(step), step=step, epoch=0)
    assert all(len(info.chunks()) == 6 for info in backup.list())
    return backup


def chunk_path(backup: BackupSystem, digest: str) -> Path:
    return backup.store.objects.root / digest[:2] / digest


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data))])


def extend(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randrange(1, 9)))


def overwrite(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.randbytes(path.stat().st_size))


def zero(path: Path, chance: random.Random) -> None:
    """As a file system may leave a file after a power cut: its size, and nothing in it."""
    path.write_bytes(bytes(path.stat().st_size))


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


def make_a_folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip, cut, extend, overwrite, zero, delete, make_a_folder])
def test_damage_of_any_file_is_named_and_the_newest_sound_one_loads(
    backup: BackupSystem, tmp_path: Path, damage: Callable[[Path, random.Random], None]
) -> None:
    chance = random.Random(damage.__name__)
    whole = shutil.copytree(backup.store.root, tmp_path / "whole")
    infos = backup.list()
    files = [path for path in backup.store.root.rglob("*") if path.is_file() and path.name != ".writer"]
    assert len(files) == 2 + 10
    for path in files * 4:
        damage(path, chance)
        gone = [info.path for info in infos if not info.path.exists()]
        broken = [
            info
            for info in infos
            if info.path not in gone and (path == info.path or path.name in info.chunks())
        ]
        named = path.name[:12] if path.parent.name != "manifests" else path.name
        for info in infos:
            (result,) = backup.verify(info.path)
            if info in broken or info.path in gone:
                assert result.problem is not None and named in result.problem
                with pytest.raises(CheckpointError, match=named):
                    backup.load(info.path)
            else:
                assert result.problem is None
                assert same(small_state(info.step), backup.load(info.path).state)
        assert {result.path for result in backup.verify() if result.problem} == {info.path for info in broken}
        sound = [info for info in infos if info not in broken and info.path not in gone]
        if sound:
            loaded = backup.load()
            assert loaded.info.step == sound[-1].step
            assert same(small_state(sound[-1].step), loaded.state)
            newer = {info.path for info in broken if info.step > sound[-1].step}
            assert {passed.path for passed in loaded.skipped} == newer
            assert all(passed.problem and named in passed.problem for passed in loaded.skipped)
        else:
            with pytest.raises(CheckpointError, match=f"no sound checkpoint.*2 damaged: .*{named}"):
                backup.load()
        shutil.rmtree(backup.store.root)
        shutil.copytree(whole, backup.store.root)
    assert len(backup.verify()) == 2 and same(small_state(2), backup.load().state)


@pytest.mark.parametrize("what", ["chunks", "manifests"])
def test_two_files_that_changed_places_are_both_damaged(backup: BackupSystem, what: str) -> None:
    """Both whole, and of the same size: only by what is in them can it be told."""
    old, new = backup.list()
    if what == "chunks":
        own = [
            next(chunk_path(backup, e.chunks[0]) for e in info.tensors if e.nbytes == 1600)
            for info in (old, new)
        ]
        assert own[0].stat().st_size == own[1].stat().st_size and own[0] != own[1]
    else:
        own = [old.path, new.path]
    first, second = (path.read_bytes() for path in own)
    own[0].write_bytes(second)
    own[1].write_bytes(first)
    if what == "chunks":
        problems = [result.problem or "" for result in backup.verify()]
        assert all(path.name[:12] in problem for path, problem in zip(own, problems, strict=True))
        with pytest.raises(CheckpointError, match=r"no sound checkpoint.*2 damaged"):
            backup.load()
        backup.save(small_state(1), step=3, epoch=0)  # mends what it has in common with the first
        assert [bool(result.problem) for result in backup.verify()] == [False, True, False]
        return
    for path in own:
        with pytest.raises(CheckpointError, match=path.name):
            backup.load(path)
    assert all(result.problem for result in backup.verify())
    with pytest.raises(CheckpointError, match=r"no sound checkpoint.*2 damaged"):
        backup.load()


def test_every_byte_of_a_manifest_counts(backup: BackupSystem) -> None:
    path = backup.list()[1].path
    raw = path.read_bytes()
    for position in range(len(raw)):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1 << position % 8]) + raw[position + 1 :])
        with pytest.raises(CheckpointError):
            backup.store.read_manifest(path)


def test_a_damaged_chunk_is_written_anew_by_the_next_save_that_has_it(backup: BackupSystem) -> None:
    """Which also mends older checkpoints."""
    damaged = sorted(backup.list()[0].chunks() & backup.list()[1].chunks())[0]
    size = chunk_path(backup, damaged).stat().st_size
    flip(chunk_path(backup, damaged), random.Random(0))
    assert [bool(result.problem) for result in backup.verify()] == [True, True]
    saved = backup.save(small_state(2), step=3, epoch=0)
    assert saved.bytes_written == size
    assert [result.problem for result in backup.verify()] == [None, None, None]


def test_what_damage_left_in_a_chunk_is_not_taken_for_that_chunk(tmp_path: Path) -> None:
    """A file that damage zeroed holds just what a tensor of zeros needs, under the name of another chunk."""
    backup = create_backup_system(tmp_path, files=QuickFiles())
    backup.save({"moment": torch.ones(1000)}, step=1, epoch=0)
    (path,) = backup.store.objects.all()
    zero(path, random.Random(0))
    backup.save({"moment": torch.zeros(1000)}, step=2, epoch=0)
    assert [bool(result.problem) for result in backup.verify()] == [True, False]
    assert torch.equal(backup.load().state["moment"], torch.zeros(1000))


def test_an_older_damaged_one_is_not_reported_as_skipped(backup: BackupSystem) -> None:
    flip(backup.list()[0].path, random.Random(0))
    assert backup.load().info.step == 2
    assert backup.load().skipped == ()


def test_training_goes_on_saving_after_somebody_removed_the_folder(backup: BackupSystem) -> None:
    shutil.rmtree(backup.store.root)
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        backup.load()
    backup.save(small_state(3), step=3, epoch=0)
    assert same(small_state(3), backup.load().state)


@pytest.mark.parametrize("what", ["objects", "manifests"])
def test_a_folder_that_is_gone_is_damage_not_a_crash(backup: BackupSystem, what: str) -> None:
    shutil.rmtree(backup.store.root / what)
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        backup.load()
    assert backup.prune() == []
    backup.save(small_state(3), step=3, epoch=0)
    assert same(small_state(3), backup.load().state)


def test_no_store_at_all_is_said(tmp_path: Path) -> None:
    backup = create_backup_system(tmp_path / "none")
    with pytest.raises(CheckpointError, match=f"no sound checkpoint in {tmp_path}/none; expected"):
        backup.load()
    with pytest.raises(CheckpointError, match=r"cannot read.*No such file"):
        backup.load(tmp_path / "none" / "manifests" / "x.json")
    assert backup.list() == [] and backup.verify() == [] and backup.newest() is None
    assert not (tmp_path / "none").exists()


# ---- manifests with a true seal, made by another program ---------------------------------------------------


def sealed(text: bytes) -> bytes:
    return text + b"\nsha256:" + hashlib.sha256(text).hexdigest().encode() + b"\n"


def forge(path: Path, **changes: Any) -> None:
    body = json.loads(path.read_bytes().partition(b"\n")[0])
    path.write_bytes(sealed(json.dumps(body | changes).encode()))


def test_a_newer_schema_is_refused_clearly_and_older_checkpoints_still_load(backup: BackupSystem) -> None:
    path = backup.list()[1].path
    forge(path, schema=3)
    says = "has schema 3; expected schema 1 or 2; fix: use the version of obs"
    with pytest.raises(CheckpointError, match=says):
        backup.load(path)
    loaded = backup.load()
    assert loaded.info.step == 1
    assert [passed.path for passed in loaded.skipped] == [path]
    objects = sorted(backup.store.objects.root.rglob("*"))
    backup.store.collect()
    assert sorted(backup.store.objects.root.rglob("*")) == objects, "its chunks are not ours to remove"


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"not json", b'{"schema": 1}', b"[" * 100_000, b'{"schema": 1, "id": NaN}', b"\xff\xfe"],
    ids=["empty", "list", "text", "too little", "deep", "not strict", "not UTF-8"],
)
def test_a_manifest_that_is_none_is_refused(backup: BackupSystem, text: bytes) -> None:
    path = backup.list()[1].path
    path.write_bytes(sealed(text))
    with pytest.raises(CheckpointError, match=path.name):
        backup.load(path)
    assert backup.load().info.step == 1


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "load"},
        {"dtype": "no_such_dtype"},
        {"dtype": "float64"},
        {"shape": [41, 10]},
        {"shape": [2**60]},
        {"shape": "wide"},
        {"nbytes": 1599},
        {"chunks": []},
        {"chunks": ["../../../etc/passwd"]},
        {"chunks": [7]},
        {"chunks": [""]},
    ],
    ids=str,
)
def test_a_tensor_that_contradicts_itself_is_refused(backup: BackupSystem, change: dict[str, Any]) -> None:
    path = backup.list()[1].path
    entries = json.loads(path.read_bytes().partition(b"\n")[0])["tensors"]
    forge(path, tensors=[entries[0] | change, *entries[1:]])
    with pytest.raises(CheckpointError, match=path.name):
        backup.load(path)
    assert backup.load().info.step == 1


def test_a_state_document_that_is_malformed_is_refused(backup: BackupSystem) -> None:
    forge(backup.list()[1].path, state={"model": {"$": "tensor", "tensor": 99}})
    assert backup.load().info.step == 1


# ---- nothing is unpickled ----------------------------------------------------------------------------------


class Payload:
    """Makes a folder when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def pickled(mark: Path) -> bytes:
    return pickle.dumps(Payload(mark))


def torch_saved(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Payload(mark), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("make", [pickled, torch_saved])
def test_a_planted_pickle_is_never_executed(
    backup: BackupSystem, tmp_path: Path, make: Callable[[Path], bytes]
) -> None:
    mark = tmp_path / "executed"
    payload = make(mark)
    torch.load(io.BytesIO(payload), weights_only=False) if make is torch_saved else pickle.loads(payload)
    mark.rmdir()  # so it does work

    path = backup.list()[1].path
    digest = hashlib.sha256(payload).hexdigest()
    chunk_path(backup, digest).parent.mkdir(exist_ok=True)
    chunk_path(backup, digest).write_bytes(payload)
    entry = {"dtype": "uint8", "shape": [len(payload)], "nbytes": len(payload), "chunks": [digest]}
    forge(path, tensors=[entry], state={"model": {"$": "tensor", "tensor": 0}})
    assert bytes(backup.load().state["model"].numpy()) == payload, "by its own name it is only bytes"
    (backup.store.manifests / "000000000009-regular-abcd.json").write_bytes(payload)
    (backup.store.manifests / "000000000009-regular-abcd.tmp").write_bytes(payload)
    for file in backup.store.objects.root.rglob("*"):
        if file.is_file():
            file.write_bytes(payload)

    assert len(backup.list()) == 2
    assert sum(result.problem is not None for result in backup.verify()) == 2
    assert backup.load().info.step == 2
    backup.prune()
    backup.save(small_state(3), step=3, epoch=0)
    assert not mark.exists()
