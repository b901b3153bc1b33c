"""Snapshots in shared memory: exact copies, reused memory, and slots that know whether they are complete."""

from __future__ import annotations

import copy
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from same import same
from torch import nn

from obsinfra.backup import shared_snapshot
from obsinfra.backup.shared_snapshot import SharedSnapshots
from obsinfra.backup.slot import (
    SlotReader,
    SnapshotHead,
    create_slot,
    grow_slot,
    mark_incomplete,
    read_header,
)
from obsinfra.backup.state_tree import decode
from obsinfra.errors import CheckpointError


@pytest.fixture
def snapshots(tmp_path: Path) -> Iterator[SharedSnapshots]:
    made = SharedSnapshots(tmp_path)
    yield made
    made.close()


def take(
    snapshots: SharedSnapshots, state: dict[str, Any], step: int = 1, *, sound: bool = True, slot: int = 0
) -> None:
    head = SnapshotHead("run-1", step, 2, 1e9, {"loss": 0.5, "nan": float("nan")}, {"torch": "x"})
    snapshots.take(slot, state, head, sound=sound)


def state_in(snapshots: SharedSnapshots, slot: int = 0) -> Any:
    content = SlotReader(snapshots.fds[slot]).read()
    assert content is not None
    tensors = [
        torch.frombuffer(bytearray(raw.data) or bytearray(16), dtype=getattr(torch, raw.dtype))[
            : int(np.prod(raw.shape))
        ].reshape(raw.shape)
        for raw in content.tensors
    ]
    return decode(content.document, tensors)


def test_a_snapshot_holds_every_kind_of_value_exactly(snapshots: SharedSnapshots) -> None:
    floats = torch.randn(6, 5)
    state: dict[str, Any] = {
        "dtypes": [
            torch.arange(7).to(dtype)
            for dtype in (torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.bool)
        ],
        "complex": torch.randn(3, dtype=torch.complex64).conj(),
        "scalar": torch.tensor(float("nan")),
        "empty": torch.zeros(0, 4),
        "transposed": floats.t(),
        "strided": floats[::2, 1:3],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "grad": nn.Parameter(torch.ones(2)),
        "array": np.arange(5, dtype=np.float32),
        "plain": [1, 2**70, float("inf"), -0.0, None, "text", b"bytes", (1, [2]), {3: "three"}],
    }
    expected = copy.deepcopy(state)
    expected["grad"] = expected["grad"].detach()
    take(snapshots, state, 7)
    assert same(expected, state_in(snapshots))
    content = SlotReader(snapshots.fds[0]).read()
    assert content is not None and content.header.sound
    assert (content.head.run, content.head.step, content.head.epoch) == ("run-1", 7, 2)
    assert content.head.metrics["loss"] == 0.5 and content.head.metrics["nan"] != content.head.metrics["nan"]


def test_what_is_trained_after_it_does_not_reach_it(snapshots: SharedSnapshots) -> None:
    state = {"w": torch.zeros(1000), "array": np.zeros(3), "list": [1]}
    take(snapshots, state)
    state["w"].fill_(9)
    state["array"][:] = 9
    state["list"].append(2)
    assert same({"w": torch.zeros(1000), "array": np.zeros(3), "list": [1]}, state_in(snapshots))


def test_an_inference_tensor_can_be_taken_and_grad_mode_does_not_matter(snapshots: SharedSnapshots) -> None:
    with torch.inference_mode():
        state = {"w": torch.ones(3)}
        take(snapshots, state)
    with torch.enable_grad():
        take(snapshots, state | {"p": nn.Parameter(torch.ones(3))})
    assert state_in(snapshots)["w"].tolist() == [1.0] * 3


def test_memory_is_reused_and_grows_only_when_it_must(snapshots: SharedSnapshots) -> None:
    take(snapshots, {"w": torch.zeros(2**20)})
    slot = snapshots._slots[0]
    mapping, views, size = slot.mapping, slot._views, os.fstat(snapshots.fds[0]).st_size
    for step in range(20):
        take(snapshots, {"w": torch.full((2**20,), float(step)), "note": "x" * step}, step)
    assert slot.mapping is mapping and slot._views is views
    take(snapshots, {"w": torch.zeros(5)})
    assert os.fstat(snapshots.fds[0]).st_size == size, "a smaller one needs no other memory"
    take(snapshots, {"w": torch.arange(2.0**21)})
    assert 2**23 < os.fstat(snapshots.fds[0]).st_size < 2**23 + 2**22
    assert same({"w": torch.arange(2.0**21)}, state_in(snapshots))


def test_a_slot_is_incomplete_from_before_the_copy_until_after_it(
    snapshots: SharedSnapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(snapshots, {"w": torch.zeros(4)})
    seen = []
    real = shared_snapshot._copy

    def watched(*arguments: Any) -> None:
        seen.append(read_header(snapshots.fds[0]))
        real(*arguments)
        seen.append(read_header(snapshots.fds[0]))

    monkeypatch.setattr(shared_snapshot, "_copy", watched)
    take(snapshots, {"w": torch.ones(4)})
    assert seen == [None, None]
    header = read_header(snapshots.fds[0])
    assert header is not None and header.sequence == 2


def test_a_copy_that_fails_leaves_the_other_slot_and_is_tried_again_in_its_own(
    snapshots: SharedSnapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(snapshots, {"w": torch.zeros(4)}, 1, slot=0)
    take(snapshots, {"w": torch.ones(4)}, 2, slot=1)
    with monkeypatch.context() as patch:
        patch.setattr(shared_snapshot, "_copy", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            take(snapshots, {"w": torch.ones(4)}, 3, slot=0)
    assert SlotReader(snapshots.fds[0]).read() is None and snapshots.taken[0] is None
    assert same({"w": torch.ones(4)}, state_in(snapshots, 1))
    assert snapshots.next_slot() == 0 and snapshots.newest() == 1


def test_a_state_that_cannot_be_stored_leaves_the_slot_as_it_was(snapshots: SharedSnapshots) -> None:
    take(snapshots, {"w": torch.zeros(4)})
    with pytest.raises(CheckpointError, match=r"state\.bad is a builtins\.object"):
        take(snapshots, {"w": torch.ones(4), "bad": object()})
    assert same({"w": torch.zeros(4)}, state_in(snapshots)) and snapshots.newest() == 0


def test_the_older_slot_is_next_but_never_the_only_sound_one(snapshots: SharedSnapshots) -> None:
    state = {"w": torch.zeros(1)}
    assert snapshots.next_slot() == 0 and snapshots.newest() is None
    take(snapshots, state, 1, slot=0)
    assert snapshots.next_slot() == 1
    take(snapshots, state, 2, slot=1)
    assert snapshots.next_slot() == 0
    take(snapshots, state, 3, slot=0, sound=False)
    assert snapshots.next_slot() == 0, "slot 1 holds the only sound one, though it is older"
    assert (snapshots.newest(), snapshots.newest(sound=True)) == (0, 1)
    assert (snapshots.newest(besides=0), snapshots.newest(sound=True, besides=1)) == (1, None)


@pytest.mark.parametrize("at", range(97))
def test_a_header_with_any_byte_wrong_is_no_header(snapshots: SharedSnapshots, at: int) -> None:
    take(snapshots, {"w": torch.zeros(4)})
    raw = os.pread(snapshots.fds[0], 1, at)
    os.pwrite(snapshots.fds[0], bytes([raw[0] ^ 1]), at)
    assert read_header(snapshots.fds[0]) is None


def test_a_json_part_that_was_overwritten_is_noticed(snapshots: SharedSnapshots) -> None:
    take(snapshots, {"w": torch.zeros(4)})
    header = read_header(snapshots.fds[0])
    assert header is not None
    os.pwrite(snapshots.fds[0], b"#", header.json_offset + header.json_bytes // 2)
    assert SlotReader(snapshots.fds[0]).read() is None


def test_fresh_and_marked_slots_are_incomplete(tmp_path: Path) -> None:
    fd = create_slot(tmp_path)
    assert read_header(fd) is None
    grow_slot(fd, 1)
    assert read_header(fd) is None
    mark_incomplete(mmap.mmap(fd, os.fstat(fd).st_size))
    assert read_header(fd) is None
    os.close(fd)


def test_without_memfd_a_file_without_a_name_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    snapshots = SharedSnapshots(tmp_path / "run")
    take(snapshots, {"w": torch.arange(100.0)})
    assert same({"w": torch.arange(100.0)}, state_in(snapshots))
    assert list((tmp_path / "run").iterdir()) == []
    snapshots.close()


@pytest.mark.gpu
def test_what_is_on_the_device_arrives_and_later_steps_do_not(snapshots: SharedSnapshots) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    weight = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        weight = weight @ weight / weight.norm()  # work that is still queued when the snapshot is asked for
    state = {"w": weight, "half": weight[:, :7].half().t(), "host": torch.ones(3)}
    take(snapshots, state)
    expected = {name: tensor.cpu().clone() for name, tensor in state.items()}
    weight.zero_()
    assert same(expected, state_in(snapshots))
    assert torch.cuda.cudart().cudaHostUnregister(snapshots._slots[0]._whole.data_ptr()) == 0, "was pinned"
    snapshots._slots[0]._pinned = False
