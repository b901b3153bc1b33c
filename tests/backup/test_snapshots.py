"""Host snapshots: copies that later steps cannot reach, in two sets of buffers that take turns."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_files import WatchedFiles
from same import same
from torch import nn

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.snapshot import Snapshot, SnapshotBuffers


def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 6)).square().mean().backward()
    optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def pointers(value: Any) -> list[int]:
    if isinstance(value, torch.Tensor):
        return [value.data_ptr()]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [pointer for item in items for pointer in pointers(item)]


def held(buffers: SnapshotBuffers, **how: bool) -> Snapshot:
    snapshot = buffers.hold(**how)
    assert snapshot is not None
    return snapshot


def test_a_snapshot_is_what_was_there_whatever_is_trained_after_it() -> None:
    model, optimizer = training()
    one_step(model, optimizer)
    plain = {"list": [1, [2]], "array": np.zeros(3), "tuple": (torch.zeros(2), "x"), "none": None}
    state = state_of(model, optimizer) | plain
    expected = copy.deepcopy(dict(state))
    expected["model"] = dict(expected["model"])
    buffers = SnapshotBuffers()
    assert buffers.take(state, step=1, epoch=4, metrics={"loss": 0.5})
    for _ in range(3):
        one_step(model, optimizer)
    plain["list"][1].append(3)
    plain["array"][0] = 9
    plain["tuple"][0].fill_(9)
    snapshot = held(buffers)
    assert same(expected, dict(snapshot.state))
    assert not same(expected["model"], dict(model.state_dict()))
    assert (snapshot.step, snapshot.epoch, snapshot.metrics) == (1, 4, {"loss": 0.5})
    assert not any(tensor.requires_grad for tensor in snapshot.state["model"].values())


def test_there_are_two_sets_of_buffers_and_they_are_reused() -> None:
    model, optimizer = training()
    one_step(model, optimizer)
    buffers = SnapshotBuffers()
    seen = []
    for step in range(10):
        one_step(model, optimizer)
        assert buffers.take(state_of(model, optimizer), step=step, epoch=0)
        seen.append(tuple(pointers(held(buffers).state)))
        buffers.release()
        assert buffers.newest_step == step
    assert seen[0::2] == [seen[0]] * 5 and seen[1::2] == [seen[1]] * 5
    assert not set(seen[0]) & set(seen[1])
    assert not set(seen[0]) & set(pointers(dict(model.state_dict())))


def test_a_tensor_of_another_shape_or_type_gets_a_new_buffer() -> None:
    buffers = SnapshotBuffers()
    states = [
        {"x": torch.zeros(4)},
        {"x": torch.ones(2, 3)},
        {"x": torch.ones(2, 3, dtype=torch.int64)},
        {"x": torch.ones(2, 3).t()},
        {"y": torch.zeros(())},
        {"x": [torch.zeros(0), 1], "y": None},
    ]
    for step, state in enumerate(states):
        buffers.take(state, step=step, epoch=0)
        assert same(state, dict(held(buffers).state))
        buffers.release()


def test_nothing_is_held_before_the_first_take() -> None:
    buffers = SnapshotBuffers()
    assert buffers.hold() is None and buffers.hold(sound=True) is None and buffers.newest_step is None
    assert buffers.take({"model": {}}, step=1, epoch=0), "looking for one holds nothing"


def test_a_held_snapshot_is_not_overwritten_until_it_is_released() -> None:
    buffers = SnapshotBuffers()
    value = torch.zeros(3)
    buffers.take({"model": value}, step=1, epoch=0)
    snapshot = held(buffers)
    assert buffers.take({"model": value.fill_(2)}, step=2, epoch=0), "the other buffer is free"
    assert not buffers.take({"model": value.fill_(3)}, step=3, epoch=0)
    assert snapshot.state["model"].tolist() == [0.0] * 3
    assert buffers.newest_step == 2, "what was not taken did not cost the one before it"
    buffers.release()
    assert buffers.take({"model": value.fill_(4)}, step=4, epoch=0)
    assert held(buffers).state["model"].tolist() == [4.0] * 3


def test_a_thread_that_releases_does_not_release_for_another() -> None:
    """The watchdog commits the snapshot while the loop commits it too."""
    buffers = SnapshotBuffers()
    buffers.take({"model": torch.zeros(1)}, step=1, epoch=0)
    snapshot = held(buffers)
    other = threading.Thread(target=lambda: (buffers.hold(), buffers.release()))
    other.start()
    other.join()
    buffers.take({"model": torch.ones(1)}, step=2, epoch=0)
    assert not buffers.take({"model": torch.ones(1)}, step=3, epoch=0)
    assert snapshot.state["model"].item() == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_newest_sound_one_is_preferred(bad: float) -> None:
    buffers = SnapshotBuffers()
    buffers.take({"model": {"w": torch.ones(3)}}, step=1, epoch=0)
    buffers.take({"model": {"w": torch.tensor([1.0, bad, 1.0])}}, step=2, epoch=0)
    assert not held(buffers).finite()
    buffers.release()
    assert held(buffers, sound=True).step == 1
    assert not buffers.take({"model": {"w": torch.ones(3)}}, step=3, epoch=0)
    buffers.release()
    assert buffers.take({"model": {"w": torch.ones(3)}}, step=4, epoch=0)
    assert held(buffers, sound=True).step == 4


def test_no_sound_one_is_none_and_holds_nothing() -> None:
    buffers = SnapshotBuffers()
    for step in (1, 2):
        buffers.take({"model": [torch.tensor(float("nan"))]}, step=step, epoch=0)
    assert buffers.hold(sound=True) is None
    assert buffers.take({"model": []}, step=3, epoch=0)
    assert buffers.take({"model": []}, step=4, epoch=0)


def test_finite_looks_at_every_tensor_of_the_model_and_only_there() -> None:
    fine = {"count": torch.tensor(3), "mask": torch.tensor([True]), "w": torch.ones(2, dtype=torch.bfloat16)}
    loss = torch.tensor(float("nan"))

    def snapshot(model: Any) -> Snapshot:
        return Snapshot({"model": model, "loss": loss}, 1, 0, 0.0)

    assert snapshot(fine).finite()
    assert Snapshot({}, 1, 0, 0.0).finite()
    assert not snapshot(fine | {"deep": [({"x": loss},)]}).finite()
    assert not snapshot(fine | {"z": torch.tensor([1j, complex(0, float("inf"))])}).finite()


def test_a_snapshot_being_committed_is_whole_although_the_loop_goes_on(tmp_path: Path) -> None:
    model, optimizer = training()
    one_step(model, optimizer)
    buffers = SnapshotBuffers()
    buffers.take(state_of(model, optimizer), step=1, epoch=0)
    expected = copy.deepcopy(dict(model.state_dict()))
    taken: list[bool] = []

    def go_on(operation: str, path: Path) -> None:
        one_step(model, optimizer)
        taken.append(buffers.take(state_of(model, optimizer), step=2, epoch=0))

    snapshot = held(buffers)
    backup = create_backup_system(tmp_path, files=WatchedFiles(go_on))
    backup.save(snapshot.state, step=snapshot.step, epoch=0, kind="emergency")
    buffers.release()
    assert taken[0] and taken.count(True) == 1
    assert same(expected, backup.load().state["model"])
