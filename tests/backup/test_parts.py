"""Parts of one checkpoint, committed by the writers of several ranks: all of them or none."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from waiting import wait_for

from obsinfra.backup import parts
from obsinfra.backup.dcp_values import value_text
from obsinfra.backup.dcp_whole import read_whole
from obsinfra.backup.shared_snapshot import SharedSnapshots
from obsinfra.backup.slot import SlotReader, SnapshotHead
from obsinfra.backup.store import CheckpointStore
from obsinfra.backup.writer import Done, Order, commit_slot
from obsinfra.errors import CheckpointError

WEIGHT = torch.arange(12.0).view(4, 3)


def part_of(rank: int, weight: torch.Tensor = WEIGHT) -> dict[str, Any]:
    """Two rows of the weight; of rank 0 also what there is, and a value."""
    items = {"w": {"dtype": "float32", "size": [4, 3], "requires_grad": True}}
    values = {"note": value_text("note", {"step": 7, "text": "ü"}).decode("ascii")}
    rows = weight[2 * rank : 2 * rank + 2].clone()
    return {
        "items": {} if rank else items,
        "values": {} if rank else values,
        "shards": {"w": [{"offsets": [2 * rank, 0], "tensor": rows}]},
    }


def commit(
    root: Path, rank: int, state: dict[str, Any], number: int = 1, *, launch: str = "a", gone: bool = False
) -> Done:
    """What the writer of one rank does with its order."""
    snapshots = SharedSnapshots(root)
    try:
        snapshots.take(0, state, SnapshotHead("r", 7, 1, 0.0), sound=False)
        order = Order(1, 0, 1, "regular", "asked", {}, (launch, number, rank, 2))
        slot = SlotReader(snapshots.fds[0])
        return commit_slot(CheckpointStore(root), slot, order, None, None, lambda: gone)
    finally:
        snapshots.close()


def test_two_parts_are_one_checkpoint_that_dcp_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks are told of the same one; where others met before is gone."""
    monkeypatch.setattr(parts, "ALONE_SECONDS", 0.0)
    with pytest.raises(CheckpointError):
        commit(tmp_path, 1, part_of(1), launch="killed", gone=True)
    for number in (1, 2):
        with ThreadPoolExecutor() as pool:
            jobs = [pool.submit(commit, tmp_path, rank, part_of(rank), number) for rank in (1, 0)]
            second, first = (job.result(30) for job in jobs)
        assert (first.path, first.step, first.bytes_total) == (second.path, 7, second.bytes_total)
        store = CheckpointStore(tmp_path)
        manifest = store.read_manifest(Path(first.path))
        assert manifest.in_parts and manifest.attributes["world_size"] == 2
        state = read_whole(store, manifest)
        assert torch.equal(state["w"], WEIGHT) and state["note"] == {"step": 7, "text": "ü"}
    assert [folder.name for folder in (tmp_path / "parts").iterdir()] == ["a-2"]
    assert commit(tmp_path, 0, part_of(0), 2).path == first.path  # asked again, as after a writer's death


def test_a_part_whose_fellow_does_not_come_is_given_up_once_the_trainer_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "ALONE_SECONDS", 0.1)
    with pytest.raises(CheckpointError, match="the part of rank 1 did not come in time"):
        commit(tmp_path, 0, part_of(0), gone=True)
    with pytest.raises(CheckpointError, match="the part of rank 1 did not come in time"):
        commit(tmp_path, 1, part_of(1))  # late: it reads what became of it
    with pytest.raises(CheckpointError, match="rank 0 did not commit the parts in time"):
        commit(tmp_path, 1, part_of(1), 2, gone=True)
    assert CheckpointStore(tmp_path).manifest_paths() == []


def test_parts_that_do_not_make_up_the_whole_are_refused_on_both(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        lacking = {**part_of(1), "shards": {}}
        jobs = [pool.submit(commit, tmp_path, 1, lacking), pool.submit(commit, tmp_path, 0, part_of(0))]
        errors = [str(job.exception(30)) for job in jobs]
    assert all("the parts of w have 6 elements" in error for error in errors), errors
    assert CheckpointStore(tmp_path).manifest_paths() == []


def test_chunks_of_a_part_that_waits_are_not_removed(tmp_path: Path) -> None:
    """A prune may come between a part and the manifest that names its chunks."""
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(commit, tmp_path, 1, part_of(1))
        wait_for(lambda: list(tmp_path.glob("parts/a-1/1.json")), "its part", seconds=30)
        store = CheckpointStore(tmp_path)
        with store.writing():
            assert store.collect() == 0
        assert commit(tmp_path, 0, part_of(0)).path == waiting.result(30).path
