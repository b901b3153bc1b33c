"""Compressed chunks: only where a sample says that it pays, and as safe, shared and portable as others."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import zstandard
from faulty_files import QuickFiles, tree
from hypothesis import given, settings
from same import same

from obsinfra.backup.backup_system import BackupSystem, create_backup_system
from obsinfra.backup.checkpointer import create_checkpointer
from obsinfra.backup.compression import DamagedFrame, check_compression, compress, decompress, pays
from obsinfra.backup.manifest import COMPRESSED_SCHEMA, SCHEMA, sealed
from obsinfra.backup.objects import CHUNK_BYTES, digest_of
from obsinfra.backup.remote import Remote
from obsinfra.backup.retention import Retention
from obsinfra.backup.tensors import tensor_bytes
from obsinfra.backup.transfer import fetch, pull, push
from obsinfra.backup.usage import usage
from obsinfra.errors import CheckpointError

SECONDS = 60.0
NOISE_BYTES = 400_000
PACKABLE = ("moment", "ids")


def state(seed: int = 0) -> dict[str, Any]:
    """Weights that are noise, a moment that is mostly untouched, and indices: the last two shrink."""
    generator = torch.Generator().manual_seed(seed)
    moment = torch.zeros(100_000)
    moment[:500] = torch.randn(500, generator=generator)
    return {
        "weight": torch.randn(NOISE_BYTES // 4, generator=generator),
        "moment": moment,
        "ids": torch.randint(0, 1000, (50_000,), generator=generator),
        "few": torch.zeros(100),
    }


def system(root: Path, compression: Any = "auto", **more: Any) -> BackupSystem:
    return create_backup_system(root, files=QuickFiles(), compression=compression, **more)


def save(backup: BackupSystem, step: int, seed: int | None = None) -> Path:
    return backup.save(state(step if seed is None else seed), step=step, epoch=0).path


def packed(backup: BackupSystem) -> set[str]:
    """Digests of chunks whose files are compressed."""
    return {digest_of(path.name) for path in backup.store.objects.all() if path.suffix == ".zst"}


def bytes_on_disk(backup: BackupSystem) -> int:
    return sum(path.stat().st_size for path in backup.store.objects.all())


def schemas(backup: BackupSystem) -> list[int]:
    return [
        json.loads(path.read_bytes().partition(b"\n")[0])["schema"] for path in backup.store.manifest_paths()
    ]


# ---- what is compressed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "shrinks"),
    [
        (torch.randn(200_000), False),
        (torch.empty(200_000).uniform_(-0.03, 0.03), False),
        (torch.randn(200_000).square() * 1e-6, False),
        (torch.randn(400_000).bfloat16(), False),
        (torch.randn(400_000).half(), False),
        (torch.randint(0, 256, (800_000,), dtype=torch.uint8), False),
        (torch.zeros(200_000), True),
        (torch.arange(100_000), True),
        (torch.randint(0, 50_257, (100_000,)), True),
        (torch.rand(800_000) > 0.5, True),
        (torch.randn(200_000).relu(), True),
        (torch.zeros(1024), False),
        (torch.zeros(1025), True),
    ],
    ids=[
        "normal", "uniform", "second moment", "bfloat16", "half", "random bytes", "zeros", "arange",
        "token ids", "mask", "half of it zeros", "a block of the disk", "more than a block",
    ],
)  # fmt: skip
def test_a_sample_tells_what_is_worth_it(tensor: torch.Tensor, shrinks: bool) -> None:
    assert pays(tensor_bytes(tensor)) is shrinks


def test_only_what_pays_is_compressed_and_everything_comes_back(tmp_path: Path) -> None:
    backup = system(tmp_path)
    saved = backup.save(state(), step=1, epoch=0)
    info = backup.list()[0]
    chunks = dict(zip(state(), (entry.chunks[0] for entry in info.tensors), strict=True))
    assert packed(backup) == {chunks[name] for name in PACKABLE}
    assert same(state(), backup.load().state)
    assert [result.problem for result in backup.verify()] == [None]
    assert saved.bytes_written == bytes_on_disk(backup) < 0.75 * saved.bytes_total


@pytest.mark.parametrize("compression", ["off", "auto"])
def test_nothing_is_compressed_unless_it_was_asked_for_and_pays(tmp_path: Path, compression: str) -> None:
    backup = system(tmp_path, compression)
    contents = state() if compression == "off" else {"w": state()["weight"]}
    backup.save(contents, step=1, epoch=0)
    assert not packed(backup) and schemas(backup) == [SCHEMA], "any version of obsinfra reads it"


def test_off_is_the_default(tmp_path: Path) -> None:
    backup = create_backup_system(tmp_path, files=QuickFiles())
    save(backup, 1)
    assert not packed(backup)


def test_a_chunk_that_does_not_shrink_though_the_sample_did_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("obsinfra.backup.store.CHUNK_BYTES", 100_000)
    noise = torch.randint(0, 256, (1_000_000,), dtype=torch.uint8)
    noise[:100_000] = 0
    noise[450_000:550_000] = 0
    noise[-100_000:] = 0
    backup = system(tmp_path)
    backup.save({"x": noise}, step=1, epoch=0)
    chunks = backup.list()[0].tensors[0].chunks
    assert {chunks[0], chunks[9]} <= packed(backup) and not packed(backup) & {chunks[2], chunks[7]}
    assert same({"x": noise}, backup.load().state)


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    for make in (create_backup_system, create_checkpointer):
        with pytest.raises(ValueError, match="compression is off or auto, got 'zip'"):
            make(tmp_path / "x", compression="zip")  # type: ignore[operator]
    with pytest.raises(ValueError, match="off or auto"):
        check_compression("")


def test_the_writer_process_compresses(tmp_path: Path) -> None:
    checkpointer = create_checkpointer(tmp_path, compression="auto", retention=Retention(keep_last=1))
    try:
        for step in (1, 2):
            assert checkpointer.snapshot(state(step), step=step, epoch=0, wait=SECONDS)
            saved = checkpointer.commit("regular", "test").wait(SECONDS)
            assert saved.bytes_written < 0.75 * saved.bytes_total
    finally:
        assert checkpointer.close()
    backup = create_backup_system(tmp_path)
    assert [info.step for info in backup.list()] == [2], "the older one was pruned"
    assert len(packed(backup)) == 2 and len(list(backup.store.objects.all())) == 4
    assert same(state(2), backup.load().state)


def test_a_trainer_without_a_writer_compresses_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "")
    checkpointer = create_checkpointer(tmp_path, compression="auto")
    try:
        checkpointer.snapshot(state(1), step=1, epoch=0)
        checkpointer.commit("regular", "test").wait(SECONDS)
    finally:
        checkpointer.close()
    assert len(packed(create_backup_system(tmp_path))) == 2


# ---- one chunk in either form ------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "then"), [("off", "auto"), ("auto", "off"), ("auto", "auto")])
@pytest.mark.parametrize("between", [False, True], ids=["right after", "with another between"])
def test_what_is_there_in_either_form_is_not_written_again(
    tmp_path: Path, first: str, then: str, between: bool
) -> None:
    """By comparison with the checkpoint before, and by its hash when that one had something else."""
    save(system(tmp_path, first), 1)
    if between:
        system(tmp_path, "off").save({"other": torch.ones(9)}, step=2, epoch=0)
    before = tree(tmp_path / "objects")
    backup = system(tmp_path, then)
    saved = backup.save(state(1), step=3, epoch=0)
    assert saved.bytes_written == 0 and tree(tmp_path / "objects") == before
    assert all(result.problem is None for result in backup.verify())
    assert same(state(1), backup.load().state)


def test_the_schema_says_whether_a_version_without_compression_could_read_it(tmp_path: Path) -> None:
    save(system(tmp_path, "off"), 1)
    save(system(tmp_path, "auto"), 2, seed=1)
    save(system(tmp_path, "auto"), 3)
    save(system(tmp_path, "off"), 4, seed=3)
    save(system(tmp_path, "off"), 5)
    assert schemas(system(tmp_path)) == [SCHEMA, SCHEMA, COMPRESSED_SCHEMA, COMPRESSED_SCHEMA, SCHEMA]


def test_pruning_takes_the_chunks_of_either_form_with_their_last_checkpoint(tmp_path: Path) -> None:
    for step, compression in enumerate(["off", "auto", "off", "auto"]):
        save(system(tmp_path, compression), step)
    backup = system(tmp_path, keep_last=1)
    backup.prune()
    (kept,) = backup.list()
    assert {digest_of(path.name) for path in backup.store.objects.all()} == kept.chunks()
    assert same(state(3), backup.load().state)
    backup.store.remove(kept.path)
    backup.store.collect()
    assert not list(backup.store.objects.all())


def test_usage_counts_the_bytes_on_the_disk(tmp_path: Path) -> None:
    backup = system(tmp_path)
    save(backup, 1)
    save(backup, 2, seed=1)
    save(backup, 3)
    found = usage(backup.store)
    assert found.total_bytes == bytes_on_disk(backup) and found.unreferenced_bytes == 0
    assert [one.unique_bytes for one in found.checkpoints][:2] == [0, 0]
    assert sum(one.unique_bytes for one in found.checkpoints) + found.checkpoints[0].shared_bytes == (
        found.total_bytes
    )
    assert found.checkpoints[0].shared_bytes < 0.75 * backup.list()[0].bytes_total


# ---- damage ------------------------------------------------------------------------------------------------


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def zero(path: Path, chance: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def extend(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(3))


def double(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() * 2)


def unpacked(path: Path, chance: random.Random) -> None:
    path.write_bytes(decompress(path.read_bytes(), CHUNK_BYTES))


def of_another(path: Path, chance: random.Random) -> None:
    path.write_bytes(compress(memoryview(bytes(400_000))))


def bomb(path: Path, chance: random.Random) -> None:
    path.write_bytes(compress(memoryview(bytes(4 * CHUNK_BYTES))))


def of_unknown_size(path: Path, chance: random.Random) -> None:
    data = decompress(path.read_bytes(), CHUNK_BYTES)
    path.write_bytes(zstandard.ZstdCompressor(write_content_size=False).compress(data))


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


DAMAGES = [flip, cut, zero, extend, double, unpacked, of_another, bomb, of_unknown_size, delete]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_a_compressed_chunk_is_named_passed_over_and_mended(
    tmp_path: Path, damage: Callable[[Path, random.Random], None]
) -> None:
    chance = random.Random(damage.__name__)
    backup = system(tmp_path)
    save(backup, 1)
    save(backup, 2)
    newest = backup.list()[1]
    for digest in sorted(newest.chunks() & packed(backup)) * (20 if damage in (flip, cut) else 1):
        path = backup.store.objects.path(digest)
        whole = path.read_bytes()
        damage(path, chance)
        (problem,) = [found.problem for found in backup.verify() if found.problem]
        expected = "No such file" if damage is delete else "is damaged"
        assert digest[:12] in problem and expected in problem
        with pytest.raises(CheckpointError, match=digest[:12]):
            backup.load(newest.path)
        loaded = backup.load()
        assert loaded.info.step == 1 and [passed.path for passed in loaded.skipped] == [newest.path]
        path.write_bytes(whole)
    damage(path, chance)
    save(backup, 3, seed=2)
    assert all(result.problem is None for result in backup.verify()), "the next save with it mends it"
    assert same(state(2), backup.load(newest.path).state)


@pytest.mark.parametrize("compression", ["off", "auto"])
def test_a_damaged_plain_chunk_is_mended_as_it_was(tmp_path: Path, compression: str) -> None:
    """Its manifest is one that versions without compression read."""
    save(system(tmp_path, "off"), 1)
    for path in system(tmp_path).store.objects.all():
        zero(path, random.Random(0)) if path.stat().st_size > 400 else None
    backup = system(tmp_path, compression)
    save(backup, 2, seed=1)
    assert not packed(backup) and schemas(backup) == [SCHEMA, SCHEMA]
    assert all(result.problem is None for result in backup.verify())


def test_a_sound_file_of_either_form_is_enough(tmp_path: Path) -> None:
    backup = system(tmp_path)
    save(backup, 1)
    (digest, *_) = packed(backup)
    plain = backup.store.objects.path(digest).with_suffix("")
    plain.write_bytes(b"rot")
    assert [result.problem for result in backup.verify()] == [None]
    assert same(state(1), backup.load().state)
    plain.with_name(f"{digest}.zst").unlink()
    with pytest.raises(CheckpointError, match=f"{digest[:12]} is damaged"):
        backup.load(backup.list()[0].path)


def test_a_list_of_chunks_longer_than_the_tensor_stops_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few bytes on the disk must not become gigabytes in memory."""
    backup = system(tmp_path)
    path = save(backup, 1)
    body = json.loads(path.read_bytes().partition(b"\n")[0])
    body["tensors"][1]["chunks"] *= 100_000
    path.write_bytes(sealed(body))
    read, reads = backup.store.objects.read, []
    monkeypatch.setattr(
        backup.store.objects, "read", lambda digest, by: reads.append(digest) or read(digest, by)
    )
    with pytest.raises(CheckpointError, match="expected 400000 bytes"):
        backup.load(path)
    assert len(reads) == 1 + 2


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=3000) | st.integers(1, 20_000).map(bytes), st.data())
def test_a_frame_gives_its_content_and_nothing_else_is_one(content: bytes, data: st.DataObject) -> None:
    frame = compress(memoryview(content))
    assert decompress(frame, len(content)) == content
    with pytest.raises(DamagedFrame, match=f"{len(content)} bytes in a frame that may hold"):
        decompress(frame, len(content) - 1)
    for other in (frame[: data.draw(st.integers(0, len(frame) - 1))], frame + b"\0", content[:-1]):
        with pytest.raises(DamagedFrame):
            decompress(other, 1 << 20)


# ---- copies ------------------------------------------------------------------------------------------------


def test_copies_are_compressed_as_the_store_is(tmp_path: Path) -> None:
    backup, url = system(tmp_path / "here"), f"file://{tmp_path}/there"
    for step in (1, 2):
        save(backup, step)
    done = push(backup.store, url)
    assert (done.objects, done.bytes) == (7, bytes_on_disk(backup)), "`few` is in both"
    assert tree(tmp_path / "there" / "objects") == tree(tmp_path / "here" / "objects")
    assert push(backup.store, url).objects == 0
    back = create_backup_system(tmp_path / "back", files=QuickFiles())
    got = pull(url, back.store)
    assert (got.objects, got.bytes) == (done.objects, done.bytes)
    assert tree(tmp_path / "back" / "objects") == tree(tmp_path / "here" / "objects")
    assert same(state(2), back.load().state)
    assert pull(url, back.store).objects == 0
    fetched = fetch(url, tmp_path / "one")
    assert same(state(2), create_backup_system(tmp_path / "one").load(fetched).state)


def test_one_chunk_may_lie_compressed_there_and_plain_here(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/there"
    one, other = system(tmp_path / "one"), system(tmp_path / "other", "off")
    save(one, 1)
    save(other, 1)
    push(one.store, url)
    push(other.store, url)
    for store in (one.store, other.store, create_backup_system(tmp_path / "new").store):
        before = set(store.objects.all()) if store.root.exists() else set()
        pull(url, store)
        if before:
            assert {digest_of(path.name) for path in store.objects.all()} == {
                digest_of(path.name) for path in before
            }
        both = create_backup_system(store.root)
        assert [result.problem for result in both.verify()] == [None, None]
        for info in both.list():
            assert same(state(1), both.load(info.path).state)
            plain = all((store.objects.root / digest[:2] / digest).exists() for digest in info.chunks())
            assert plain or info.schema == COMPRESSED_SCHEMA, "else another version would miss a chunk"


@pytest.mark.parametrize("damage", [flip, cut, zero, bomb])
def test_damage_of_a_compressed_chunk_there_is_seen_by_the_pull(
    tmp_path: Path, damage: Callable[[Path, random.Random], None]
) -> None:
    backup, url = system(tmp_path / "here"), f"file://{tmp_path}/there"
    save(backup, 1)
    push(backup.store, url)
    (digest, *_) = sorted(packed(backup))
    damage(tmp_path / "there" / "objects" / digest[:2] / f"{digest}.zst", random.Random(1))
    back = create_backup_system(tmp_path / "back", files=QuickFiles())
    with pytest.raises(CheckpointError, match=f"chunk {digest[:12]} at file.*is damaged"):
        pull(url, back.store)
    assert back.list() == []
    with pytest.raises(CheckpointError, match="damaged"):
        Remote(url).read_objects([digest])
    if damage is cut:  # a size that is not that of the file here gives it away
        push(backup.store, url, backup.list()[0].path)
        (tmp_path / "there" / "manifests" / backup.list()[0].path.name).unlink()
        assert push(backup.store, url).objects == 1
        assert pull(url, back.store).checkpoints and same(state(1), back.load().state)


def test_a_pull_mends_a_compressed_chunk_that_is_damaged_here(tmp_path: Path) -> None:
    backup, url = system(tmp_path / "here"), f"file://{tmp_path}/there"
    save(backup, 1)
    push(backup.store, url)
    (digest, *_) = sorted(packed(backup))
    flip(backup.store.objects.path(digest), random.Random(0))
    assert pull(url, backup.store).objects == 1
    assert [result.problem for result in backup.verify()] == [None]
