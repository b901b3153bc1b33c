"""The store behind `torch.distributed.checkpoint`: what is saved, who loads it, and what goes wrong."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dcp_ranks
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from dcp_ranks import in_group, kept, report
from faulty_files import FailingFiles, ForgetfulFiles, QuickFiles, WatchedFiles, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from same import same, small_state
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.compare import count_tensors, differences
from obsinfra.backup.dcp import (
    ObsinfraLoadPlanner,
    ObsinfraReader,
    ObsinfraSavePlanner,
    ObsinfraWriter,
)
from obsinfra.backup.dcp_whole import read_any_state
from obsinfra.backup.export import export
from obsinfra.backup.manifest import Manifest, sealed
from obsinfra.backup.store import CheckpointStore
from obsinfra.backup.tensors import tensor_bytes
from obsinfra.errors import CheckpointError

EXAMPLE = Path(__file__).parents[2] / "examples" / "dcp_save.py"

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]


def save(root: Path, state: dict[str, Any], **more: Any) -> Manifest:
    planner = more.pop("planner", None)
    writer = ObsinfraWriter(root, **more)
    dcp.save(state, storage_writer=writer, planner=planner)
    assert writer.saved is not None
    return writer.saved


def load(root: Path, template: dict[str, Any], *where: Any, **more: Any) -> dict[str, Any]:
    """`template` with what the checkpoint has for it."""
    dcp.load(template, storage_reader=ObsinfraReader(root, *where, **more))
    return template


def empty(state: Any) -> Any:
    """Of the same keys, with zeros for tensors and None for the rest."""
    if isinstance(state, dict):
        return {key: empty(value) for key, value in state.items()}
    return torch.zeros_like(state) if isinstance(state, Tensor) else None


def failure(caught: pytest.ExceptionInfo[dcp.CheckpointException]) -> BaseException:
    """What went wrong on rank 0."""
    return caught.value.failures[0][0]


# ---- two ranks -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks went through all topics of `dcp_ranks`."""
    folder = tmp_path_factory.mktemp("dcp")
    model = dcp_ranks.build(5)
    optimizer = dcp_ranks.optimizer_of(model)
    dcp_ranks.train(model, optimizer, 2)
    dcp_ranks.save(folder / "one", model, optimizer, 2)
    dcp_ranks.keep(folder / "one-then", dcp_ranks.state_of(model, optimizer))
    assert in_group(folder / "group", dcp_ranks.all_topics, folder / "one") == [0, 0]
    return folder / "group"


def topic(group: Path, name: str) -> list[Any]:
    """What each rank found out."""
    found = [report(group, rank)[name] for rank in range(2)]
    for rank, answer in enumerate(found):
        assert isinstance(answer, dict), f"rank {rank}: {answer}"
    return found


def manifest_of(root: Path, path: str) -> Manifest:
    return create_backup_system(root).store.read_manifest(Path(path))


def digest_of(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def test_ddp_writes_each_tensor_once_and_both_ranks_take_part(group: Path) -> None:
    answers = topic(group, "save_ddp")
    assert answers[0]["manifest"] == answers[1]["manifest"], "every rank is told where"
    manifest = manifest_of(group / "ddp", answers[0]["manifest"])
    assert len(manifest.tensors) == count_tensors(kept(group / "ddp-then"))
    named = Counter(digest for entry in manifest.tensors for digest in entry.chunks)
    alike = {digest for digest, count in named.items() if count > 1}  # equal tensors, such as the step counts
    assert len(named) - len(alike) > 10
    written = [set(answer["objects"]) - alike for answer in answers]
    assert written[0] and written[1]
    assert written[0].isdisjoint(written[1])
    assert written[0] | written[1] | alike == manifest.chunks()
    assert all(len(answer["objects"]) == len(set(answer["objects"])) for answer in answers)


def test_ddp_takes_as_many_bytes_as_one_rank(group: Path) -> None:
    answers = topic(group, "save_ddp")
    entries = manifest_of(group / "ddp", answers[0]["manifest"]).tensors
    assert sum(entry.nbytes for entry in entries) == sum(
        entry.nbytes for entry in create_backup_system(group / "ddp-then").list()[0].tensors
    )


def test_fsdp_ranks_write_their_own_shards(group: Path) -> None:
    answers = topic(group, "save_fsdp")
    manifest = manifest_of(group / "fsdp", answers[0]["manifest"])
    items = manifest.state["items"]
    weight = items["model.1.weight"]
    assert weight["size"] == [10, 6]
    assert [(shard["offsets"], shard["sizes"]) for shard in weight["shards"]] == [
        ([0, 0], [5, 6]),
        ([5, 0], [5, 6]),
    ]
    sharded = 0
    for item in items.values():
        for rank, shard in enumerate(item.get("shards", ())):
            chunks = set(manifest.tensors[shard["entry"]].chunks)
            if len(item["shards"]) > 1 and chunks - set(answers[1 - rank]["objects"]):
                assert chunks <= set(answers[rank]["objects"])
                sharded += 1
    assert sharded > 30, "of two shards of seven parameters with three states each"


def test_what_two_ranks_saved_is_listed_and_sound(group: Path) -> None:
    for name in ("ddp", "fsdp"):
        backup = create_backup_system(group / name)
        assert [result.problem for result in backup.verify()] == [None] * len(backup.list())
        first = backup.list()[0]
        assert (first.kind, first.step, first.attributes["world_size"]) == ("regular", 3, 2)


@pytest.mark.parametrize("name", ["load_ddp", "load_fsdp", "load_one"])
def test_ddp_and_fsdp_load_what_the_other_saved(group: Path, name: str) -> None:
    """`load_ddp` takes DDP's into FSDP2, `load_fsdp` the other way, `load_one` one process's into FSDP2."""
    for answer in topic(group, name):
        assert answer["differences"] == []
        assert answer["step"] == (2 if name == "load_one" else 3)


def test_fsdp_trains_on_as_if_it_had_not_been_interrupted(group: Path) -> None:
    answer = topic(group, "load_fsdp")[0]
    assert (answer["same"]["differences"], answer["then"], answer["later"]) == ([], [], [])


@pytest.mark.parametrize(
    ("saved", "expected"),
    [("ddp", "ddp-then"), ("fsdp", "fsdp-then"), ("back", "../one-then")],
)
def test_one_process_loads_what_two_ranks_saved(group: Path, saved: str, expected: str) -> None:
    """`back` came from one process and went through two ranks."""
    model = dcp_ranks.build(21)
    optimizer = dcp_ranks.optimizer_of(model)
    path = create_backup_system(group / saved).list()[0].path
    state = dcp_ranks.state_of(model, optimizer) | {"step": None}
    load(group / saved, state, path)
    step = state.pop("step")
    assert differences(kept(group / expected), state) == []
    assert step == create_backup_system(group / saved).list()[0].step or saved == "back"


@pytest.mark.parametrize(
    ("saved", "expected"),
    [("ddp", "ddp-then"), ("fsdp", "fsdp-then"), ("back", "../one-then")],
)
def test_shards_are_put_together_without_a_model_to_load_into(group: Path, saved: str, expected: str) -> None:
    store = create_backup_system(group / saved).store
    manifest = store.read_manifest(store.manifest_paths()[0])
    state = read_any_state(store, manifest)
    assert state.pop("step") == manifest.step or saved == "back"
    assert differences(kept(group / expected), state) == []


@pytest.mark.parametrize("saved", ["ddp", "fsdp"])
def test_what_two_ranks_saved_is_exported_whole(group: Path, tmp_path: Path, saved: str) -> None:
    backup = create_backup_system(group / saved)
    path = backup.list()[0].path
    expected = kept(group / f"{saved}-then")
    export(backup, path, tmp_path / "model.safetensors")
    assert same(
        dict(sorted(expected["model"].items())),
        dict(sorted(load_file(tmp_path / "model.safetensors").items())),
    )
    model = dcp_ranks.build(9)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    export(backup, path, tmp_path / "all.pt", form="torch", part="all")
    assert (
        differences(
            expected | {"step": 3}, torch.load(tmp_path / "all.pt", map_location="cpu", weights_only=True)
        )
        == []
    )
    export(backup, path, tmp_path / "dcp", form="dcp", part="all")
    expected["optimizer"] = {"state": expected["optimizer"]["state"]}
    wanted = empty(expected)
    dcp.load(wanted, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert differences(expected, wanted) == []


def test_a_rank_that_fails_leaves_the_checkpoints_and_the_next_save_works(group: Path) -> None:
    first = Path(topic(group, "save_ddp")[0]["manifest"]).name
    for answer in topic(group, "fail"):
        assert answer["failure"] == {"1": "OSError(5, 'Input/output error')"}
        assert answer["manifests"] == [first]
        assert Path(answer["next"]).name.startswith("000000000005-")


def test_ranks_that_chose_different_checkpoints_load_nothing(group: Path) -> None:
    for answer in topic(group, "disagree"):
        assert "the ranks chose different checkpoints: 000000000003-" in answer["error"]
        assert "ObsinfraReader(path, checkpoint=...)" in answer["error"]
        assert answer["differences"] == []


def test_a_rank_killed_in_the_middle_of_its_writes_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    root = tmp_path / "store"
    save(root, small_state(1), step=1)
    before = tree(root)
    assert in_group(tmp_path / "group", dcp_ranks.save_with_a_death, root, 20) == [0, -9]
    assert report(tmp_path / "group", 0)["error"]
    after = tree(root)
    assert len(after) > len(before) + 2, "both ranks had begun"
    assert {name: after[name] for name in before} == before
    assert [name for name in after if name.startswith("manifests/")] == [
        name for name in before if name.startswith("manifests/")
    ]
    assert same(small_state(1), load(root, empty(small_state())))
    newest = save(root, small_state(3), step=3)
    store = create_backup_system(root).store
    with store.writing():
        store.collect()
    assert {name for name in tree(root) if name.startswith("objects/")} == {
        f"objects/{digest[:2]}/{digest}"
        for digest in newest.chunks() | {Path(name).name for name in before if name.startswith("objects/")}
    }


@pytest.mark.slow
def test_the_example_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    told = []
    for ranks in (1, 2):
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ]
        done = subprocess.run(
            [*torchrun, str(EXAMPLE), str(tmp_path / "store")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        told.append(done.stdout.partition(":")[0])
    assert told == ["steps 1 to 10 on 1 ranks", "steps 11 to 20 on 2 ranks"]
    backup = create_backup_system(tmp_path / "store")
    assert [result.problem for result in backup.verify()] == [None, None]


# ---- one process: states -----------------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "none": None,
    "flag": True,
    "big": 2**200,
    "minus_zero": -0.0,
    "nan": float("nan"),
    "text": "naïve \N{SNOWMAN}",
    "long": "x" * 200_000,
    "raw": bytes(range(256)),
    "pair": (1, torch.arange(3, dtype=torch.int16)),
    "numbers": [1, 2.5, [3]],
    "array": np.arange(4, dtype=np.uint16),
    "scalar": np.float32(0.1),
}


def test_values_that_are_not_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    save(tmp_path, {"values": VALUES, "weight": torch.ones(2)})
    loaded = load(tmp_path, {"values": dict.fromkeys(VALUES), "weight": torch.zeros(2)})
    assert same({"values": VALUES, "weight": torch.ones(2)}, loaded)


def test_a_long_value_goes_into_chunks_a_short_one_into_the_manifest(tmp_path: Path) -> None:
    manifest = save(tmp_path, {"values": VALUES})
    assert [entry.dtype for entry in manifest.tensors] == ["uint8"]
    assert manifest.path.stat().st_size < 20_000


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.empty(0, 3),
        torch.tensor([float("nan"), -0.0]),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12)[::3],
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([True, False]),
        torch.ones(3).expand(2, 3),
        torch.arange(5, dtype=torch.float32).to(torch.float8_e4m3fn),
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)
def test_tensors_of_any_kind_come_back_bit_for_bit(tmp_path: Path, tensor: Tensor) -> None:
    save(tmp_path, {"tensor": tensor})
    loaded = load(tmp_path, {"tensor": torch.zeros(tensor.shape, dtype=tensor.dtype)})
    assert same({"tensor": tensor.resolve_conj()}, loaded)


def test_a_whole_training_comes_back(tmp_path: Path) -> None:
    model = dcp_ranks.build(1)
    optimizer = dcp_ranks.optimizer_of(model)
    dcp_ranks.train(model, optimizer, 2)
    dcp_ranks.save(tmp_path, model, optimizer, 2)
    expected = dcp_ranks.state_of(model, optimizer)
    fresh = dcp_ranks.build(2)
    fresh_optimizer = dcp_ranks.optimizer_of(fresh)
    assert dcp_ranks.load(tmp_path, fresh, fresh_optimizer) == 2
    assert differences(expected, dcp_ranks.state_of(fresh, fresh_optimizer)) == []


def test_a_state_is_loaded_without_knowing_its_keys(tmp_path: Path) -> None:
    """As DCP's converters to one file do."""
    state = {"model": {"weight": torch.ones(2, 2), "deep": {"bias": torch.zeros(1)}}, "step": 4}
    save(tmp_path, state)
    assert same(state, _load_state_dict_from_keys(storage_reader=ObsinfraReader(tmp_path)))
    only = _load_state_dict_from_keys("model.deep", storage_reader=ObsinfraReader(tmp_path))
    assert same({"model": {"deep": {"bias": torch.zeros(1)}}}, only)


def test_a_state_that_is_not_flattened_comes_back(tmp_path: Path) -> None:
    state = {"weight": torch.ones(3), "nested": {1: torch.arange(2), "name": "a"}}
    plain = {"flatten_state_dict": False, "flatten_sharded_tensors": False}
    save(tmp_path, state, planner=DefaultSavePlanner(**plain))
    loaded: dict[str, Any] = {"weight": torch.zeros(3), "nested": None}
    dcp.load(loaded, storage_reader=ObsinfraReader(tmp_path), planner=DefaultLoadPlanner(**plain))
    assert same(state, loaded)


def test_an_unchanged_state_writes_no_chunk(tmp_path: Path) -> None:
    """Nor does one that a backup system saved before."""
    create_backup_system(tmp_path).save(small_state(), step=1, epoch=0)
    before = tree(tmp_path / "objects")
    for step in (2, 3):
        save(tmp_path, small_state(), step=step)
    assert tree(tmp_path / "objects") == before
    assert len({info.parent for info in create_backup_system(tmp_path).list()}) == 3


def test_one_writer_saves_several_checkpoints(tmp_path: Path) -> None:
    writer = ObsinfraWriter(tmp_path)
    for seed in range(2):
        dcp.save(small_state(seed), storage_writer=writer)
    assert len(create_backup_system(tmp_path).list()) == 2
    assert same(small_state(1), load(tmp_path, empty(small_state())))


def test_a_checkpoint_id_is_the_folder_and_for_loading_a_manifest_too(tmp_path: Path) -> None:
    writer = ObsinfraWriter(tmp_path / "unused")
    for seed in range(2):
        dcp.save(small_state(seed), checkpoint_id=tmp_path / "store", storage_writer=writer)
    assert not (tmp_path / "unused").exists()
    reader = ObsinfraReader(tmp_path / "unused")
    for seed, where in (
        (1, tmp_path / "store"),
        (0, create_backup_system(tmp_path / "store").list()[0].path),
    ):
        loaded = empty(small_state())
        dcp.load(loaded, checkpoint_id=where, storage_reader=reader)
        assert same(small_state(seed), loaded)


def test_async_save_keeps_the_state_of_its_moment(tmp_path: Path) -> None:
    state = small_state(1)
    future = dcp.async_save(state, storage_writer=ObsinfraWriter(tmp_path, step=7))
    state["weight"].zero_()
    state["seed"] = 0
    assert future.result().storage_meta.checkpoint_id.endswith(".json")  # type: ignore[union-attr]
    assert same(small_state(1), load(tmp_path, empty(small_state())))
    assert create_backup_system(tmp_path).list()[0].step == 7


# ---- nothing is pickled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("planners", [(None, None), (ObsinfraSavePlanner, ObsinfraLoadPlanner)])
def test_nothing_is_pickled_or_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planners: tuple[Any, Any]
) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise AssertionError("a pickle")

    for module, name in (
        *((pickle, name) for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler")),
        (torch, "save"),
        (torch, "load"),
    ):
        monkeypatch.setattr(module, name, refuse)
    saver, loader = (planner() if planner else None for planner in planners)
    dcp.save({"values": VALUES}, storage_writer=ObsinfraWriter(tmp_path), planner=saver)
    loaded: dict[str, Any] = {"values": dict.fromkeys(VALUES)}
    dcp.load(loaded, storage_reader=ObsinfraReader(tmp_path), planner=loader)
    assert same({"values": VALUES}, loaded)


class PicklingPlanner(DefaultSavePlanner):
    """Somebody's own, which leaves values to DCP."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return super().transform_object(write_item, object)


class SmugglingPlanner(ObsinfraSavePlanner):
    """Derived from ours, and yet it makes pickles."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return DefaultSavePlanner.transform_object(self, write_item, object)


class HalvingPlanner(ObsinfraSavePlanner):
    """Somebody's own, as it should be."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        found = super().transform_object(write_item, object)
        return found / 2 if isinstance(found, Tensor) else found


class UnpicklingPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        super().load_bytes(read_item, value)


def test_a_planner_that_may_pickle_is_refused_by_the_name_of_the_item(tmp_path: Path) -> None:
    with pytest.raises(dcp.CheckpointException) as caught:
        save(tmp_path, {"weight": torch.ones(2), "epoch": 1}, planner=PicklingPlanner())
    assert isinstance(failure(caught), CheckpointError)
    assert "epoch is not a tensor, and PicklingPlanner makes bytes" in str(failure(caught))
    assert "derive the planner from obsinfra.backup.dcp.ObsinfraSavePlanner" in str(failure(caught))
    assert list((tmp_path / "objects").iterdir()) == [], "the tensor was not written either"
    with pytest.raises(dcp.CheckpointException, match="a value is not as stored"):
        save(tmp_path, {"epoch": 1}, planner=SmugglingPlanner())
    save(tmp_path, {"weight": torch.ones(2)}, planner=PicklingPlanner())  # no values, no harm


def test_a_planner_that_may_unpickle_is_refused_by_the_name_of_the_item(tmp_path: Path) -> None:
    save(tmp_path, {"weight": torch.ones(2), "epoch": 1})
    state = {"weight": torch.zeros(2), "epoch": None}
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(state, storage_reader=ObsinfraReader(tmp_path), planner=UnpicklingPlanner())
    assert "epoch is not a tensor, and UnpicklingPlanner may take" in str(failure(caught))
    assert same({"weight": torch.zeros(2), "epoch": None}, state)


def test_planners_are_derived_from_ours(tmp_path: Path) -> None:
    save(tmp_path, {"weight": torch.full((2,), 3.0), "epoch": 1}, planner=HalvingPlanner())
    assert same(
        {"weight": torch.full((2,), 1.5), "epoch": 1},
        load(tmp_path, {"weight": torch.zeros(2), "epoch": None}),
    )


def test_our_planners_spare_other_storages_the_pickles_of_values(tmp_path: Path) -> None:
    state = {"values": VALUES, "weight": torch.ones(2)}
    dcp.save(state, checkpoint_id=tmp_path / "theirs", planner=ObsinfraSavePlanner())
    loaded: dict[str, Any] = {"values": dict.fromkeys(VALUES), "weight": torch.zeros(2)}
    dcp.load(loaded, checkpoint_id=tmp_path / "theirs", planner=ObsinfraLoadPlanner())
    assert same(state, loaded)


class Odd:
    """Of a type that has no JSON."""


def test_what_cannot_be_stored_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(dcp.CheckpointException, match=r"state\.a\.odd is a test_dcp\.Odd"):
        save(tmp_path, {"weight": torch.ones(2), "a": {"odd": Odd()}})
    with pytest.raises(dcp.CheckpointException, match=r"a\.sparse is a torch\.sparse_coo tensor"):
        save(tmp_path, {"weight": torch.ones(2), "a": {"sparse": torch.eye(2).to_sparse()}})
    with pytest.raises(dcp.CheckpointException, match="small is quantized"):
        save(tmp_path, {"small": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)})
    assert [name for name in tree(tmp_path) if name.startswith(("objects", "manifests"))] == []


def test_a_save_without_a_common_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="use_collectives=False"):
        dcp.save(small_state(), storage_writer=ObsinfraWriter(tmp_path), use_collectives=False)
    assert tree(tmp_path) == {}


def test_a_wrong_kind_or_attribute_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind 'monthly'; expected one of regular"):
        ObsinfraWriter(tmp_path, kind="monthly")
    with pytest.raises(CheckpointError, match="are not JSON"):
        ObsinfraWriter(tmp_path, attributes={"mine": {1, 2}})


# ---- shards and chunks -------------------------------------------------------------------------------------


class Boxes(DefaultSavePlanner):
    """One tensor, of which boxes are saved, as a mesh of any number of ranks would do."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.tensor_data is not None
        return narrowed(self.tensor, write_item.tensor_data.chunk)


class Target(DefaultLoadPlanner):
    """One box to load."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return narrowed(self.target, ChunkStorageMetadata(read_item.dest_offsets, read_item.lengths))


def narrowed(tensor: Tensor, box: ChunkStorageMetadata) -> Tensor:
    for dim, (offset, length) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor


def box(offsets: list[int], sizes: list[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def save_boxes(root: Path, tensor: Tensor, ranks: list[list[ChunkStorageMetadata]]) -> None:
    """Save, as ranks of those boxes would."""
    properties = TensorProperties(tensor.dtype)
    every = [piece for rank in ranks for piece in rank]
    metadata = Metadata({"t": TensorStorageMetadata(properties, tensor.size(), every)})
    plans = [
        SavePlan(
            [
                WriteItem(
                    MetadataIndex("t", piece.offsets),
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(piece, properties, tensor.size()),
                )
                for piece in rank
            ]
        )
        for rank in ranks
    ]
    writers = [ObsinfraWriter(root, files=QuickFiles()) for _ in ranks]
    writers[0].set_up_storage_writer(True)
    writers[0].prepare_global_plan(plans)
    results = [
        writer.write_data(plan, Boxes(tensor)).wait() for writer, plan in zip(writers, plans, strict=True)
    ]
    writers[0].finish(metadata, results)


def load_box(reader: ObsinfraReader, wanted: ChunkStorageMetadata, dtype: torch.dtype) -> Tensor:
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    kept = metadata.state_dict_metadata["t"]
    assert isinstance(kept, TensorStorageMetadata)
    plan = LoadPlan(create_read_items_for_chunk_list("t", kept, [wanted]))
    target = torch.zeros(wanted.sizes, dtype=dtype)
    reader.read_data(reader.prepare_local_plan(plan), Target(target)).wait()
    return target


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], list[list[ChunkStorageMetadata]], ChunkStorageMetadata]:
    """A shape, its boxes along a grid dealt out to ranks, and a box to load."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    grid = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    pieces: list[tuple[list[int], list[int]]] = [([], [])]
    for marks in grid:
        pieces = [
            ([*offsets, start], [*sizes, end - start])
            for offsets, sizes in pieces
            for start, end in itertools.pairwise(marks)
        ]
    ranks: list[list[ChunkStorageMetadata]] = [[] for _ in range(draw(st.integers(1, 3)))]
    for piece in pieces:
        draw(st.sampled_from(ranks)).append(box(*piece))
    starts = [draw(st.integers(0, size - 1)) for size in shape]
    lengths = [draw(st.integers(1, size - start)) for size, start in zip(shape, starts, strict=True)]
    return shape, ranks, box(starts, lengths)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=cuts(), dtype=st.sampled_from([torch.float32, torch.int8, torch.complex128]), chunk=st.integers(1, 40)
)
def test_any_box_comes_from_any_boxes_in_chunks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, cut: Any, dtype: torch.dtype, chunk: int
) -> None:
    shape, ranks, wanted = cut
    root = tmp_path_factory.mktemp("boxes")
    tensor = torch.arange(1, math.prod(shape) + 1).reshape(shape).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("obsinfra.backup.store.CHUNK_BYTES", chunk)
        save_boxes(root, tensor, ranks)
    loaded = load_box(ObsinfraReader(root), wanted, dtype)
    assert torch.equal(loaded, narrowed(tensor, wanted))


def remove_chunks(store: CheckpointStore, but: set[str]) -> int:
    doomed = [path for path in store.objects.all() if path.name not in but]
    for path in doomed:
        path.unlink()
    return len(doomed)


def test_a_part_of_the_keys_needs_only_its_own_chunks(tmp_path: Path) -> None:
    manifest = save(tmp_path, {"encoder": torch.ones(5), "head": torch.zeros(3), "long": "x" * 100_000})
    store = CheckpointStore(tmp_path)
    needed = manifest.tensors[manifest.state["items"]["encoder"]["shards"][0]["entry"]].chunks
    assert remove_chunks(store, set(needed)) == 2
    for where in ({"checkpoint": manifest.path}, {"verify": False}):
        loaded = load(tmp_path, {"encoder": torch.zeros(5)}, **where)
        assert same({"encoder": torch.ones(5)}, loaded)


def test_a_part_of_the_rows_needs_only_their_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsinfra.backup.store.CHUNK_BYTES", 400)
    tensor = torch.arange(1000.0).reshape(100, 10)  # ten rows to a chunk
    save_boxes(tmp_path, tensor, [[box([0, 0], [50, 10])], [box([50, 0], [50, 10])]])
    manifest = create_backup_system(tmp_path).list()[0]
    chunks = [digest for entry in manifest.tensors for digest in entry.chunks]
    assert len(chunks) == 10
    remove_chunks(CheckpointStore(tmp_path), set(chunks[4:7]))
    monkeypatch.undo()  # what was written counts, not what is written now
    rows = load_box(ObsinfraReader(tmp_path, manifest.path), box([45, 0], [20, 10]), torch.float32)
    assert torch.equal(rows, tensor[45:65])


# ---- damage ------------------------------------------------------------------------------------------------


def damage(store: Path, digest: str) -> None:
    path = store / "objects" / digest[:2] / digest
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def two_checkpoints(root: Path) -> tuple[Manifest, str]:
    """The newer of two, and a chunk that only it has."""
    older = save(root, small_state(1), step=1)
    newer = save(root, small_state(2), step=2)
    return newer, sorted(newer.chunks() - older.chunks())[0]


def test_a_damaged_checkpoint_is_passed_over_for_the_newest_sound_one(tmp_path: Path) -> None:
    newer, digest = two_checkpoints(tmp_path)
    damage(tmp_path, digest)
    reader = ObsinfraReader(tmp_path)
    loaded = empty(small_state())
    dcp.load(loaded, storage_reader=reader)
    assert same(small_state(1), loaded)
    assert reader.loaded is not None and reader.loaded.step == 1
    assert [result.problem is None for result in create_backup_system(tmp_path).verify()] == [True, False]
    newer.path.write_text("{}")
    assert same(small_state(1), load(tmp_path, empty(small_state())))


def test_a_damaged_chunk_of_a_named_checkpoint_is_named(tmp_path: Path) -> None:
    newer, digest = two_checkpoints(tmp_path)
    damage(tmp_path, digest)
    for where in ({"checkpoint": newer.path}, {"verify": False}):
        with pytest.raises(dcp.CheckpointException) as caught:
            load(tmp_path, empty(small_state()), **where)
        assert isinstance(failure(caught), CheckpointError)
        assert f"{newer.path.name}: " in str(failure(caught))
        assert f"chunk {digest[:12]} is damaged" in str(failure(caught))


def test_no_sound_checkpoint_is_an_honest_error(tmp_path: Path) -> None:
    create_backup_system(tmp_path).save(small_state(), step=9, epoch=0)
    with pytest.raises(dcp.CheckpointException, match="no sound distributed checkpoint"):
        load(tmp_path, empty(small_state()))
    manifest = save(tmp_path, {"mine": torch.ones(3)})
    damage(tmp_path, *manifest.chunks())
    with pytest.raises(dcp.CheckpointException, match=r"1 damaged: .*is damaged"):
        load(tmp_path, {"mine": torch.zeros(3)})


def test_a_checkpoint_of_a_backup_system_is_refused(tmp_path: Path) -> None:
    saved = create_backup_system(tmp_path).save(small_state(), step=9, epoch=0)
    with pytest.raises(dcp.CheckpointException, match=r"is not a distributed checkpoint.*BackupSystem\.load"):
        load(tmp_path, empty(small_state()), saved.path)


Change = Callable[[dict[str, Any]], object]

CHANGES: dict[str, tuple[Change, str]] = {
    "newer version": (
        lambda body: body["state"].update(version=2),
        "distributed format 2; expected format 1",
    ),
    "no items": (lambda body: body["state"].pop("items"), "malformed"),
    "no planner data": (lambda body: body["state"].pop("planner_data"), "malformed"),
    "chunks of nothing": (lambda body: body["state"].update(chunk_bytes=0), "malformed"),
    "smaller chunks": (lambda body: body["state"].update(chunk_bytes=1), "malformed"),
    "entry beyond": (lambda body: shard(body).update(entry=99), "malformed"),
    "entry of another": (lambda body: shard(body).update(entry=1), "malformed"),
    "other shape": (lambda body: shard(body).update(sizes=[4, 100]), "malformed"),
    "unknown dtype": (lambda body: body["state"]["items"]["weight"].update(dtype="no_such"), "malformed"),
    "not a dtype": (lambda body: body["tensors"][0].update(dtype="nn"), "malformed"),
    "size does not fit": (lambda body: body["tensors"][0].update(shape=[40, 11]), "malformed"),
    "item without data": (lambda body: body["state"]["items"]["seed"].pop("value"), "malformed"),
    "value of other form": (
        lambda body: body["state"]["items"]["seed"].update(value=7),
        "value is not as stored",
    ),
}


def shard(body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = body["state"]["items"]["weight"]["shards"][0]
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path, name: str) -> None:
    """Sealed well, so that only its content is wrong."""
    change, message = CHANGES[name]
    manifest = save(tmp_path, small_state())
    body = json.loads(manifest.path.read_bytes().partition(b"\n")[0])
    change(body)
    manifest.path.write_bytes(sealed(body))
    with pytest.raises(dcp.CheckpointException, match=message):
        load(tmp_path, empty(small_state()), manifest.path)


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_contradicts_itself_is_not_put_together_either(tmp_path: Path, name: str) -> None:
    change, message = CHANGES[name]
    manifest = save(tmp_path, small_state())
    body = json.loads(manifest.path.read_bytes().partition(b"\n")[0])
    change(body)
    manifest.path.write_bytes(sealed(body))
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_any_state(store, store.read_manifest(manifest.path))


def test_shards_that_leave_a_gap_are_not_put_together(tmp_path: Path) -> None:
    manifest = save(tmp_path, small_state())
    body = json.loads(manifest.path.read_bytes().partition(b"\n")[0])
    body["state"]["items"]["weight"]["size"][0] += 1
    manifest.path.write_bytes(sealed(body))
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="the shards of weight do not make up its shape"):
        read_any_state(store, store.read_manifest(manifest.path))


@pytest.mark.parametrize("flat", [True, False])
def test_values_and_nesting_come_back_without_a_template(tmp_path: Path, flat: bool) -> None:
    state = {
        "model": {"a.b": torch.ones(2), "deep": {"c": torch.arange(3)}},
        "long": "x" * 100_000,
        "list": [torch.ones(1), {"d": 2.5}],
        "none": None,
        "empty": torch.ones(0, 3),
    }
    plain = DefaultSavePlanner(flatten_state_dict=flat, flatten_sharded_tensors=flat)
    manifest = save(tmp_path, state, planner=plain)
    assert same(state, read_any_state(CheckpointStore(tmp_path), manifest))


# ---- beside others -----------------------------------------------------------------------------------------


def test_a_backup_system_lists_and_verifies_it_but_does_not_load_it(tmp_path: Path) -> None:
    backup = create_backup_system(tmp_path)
    own = backup.save(small_state(1), step=1, epoch=0)
    more = {"metrics": {"loss": 0.5}, "reason": "spike", "run": "r", "attributes": {"zone": "b"}}
    manifest = save(tmp_path, small_state(2), kind="emergency", step=2, epoch=3, **more)
    info = backup.list()[-1]
    assert info == manifest
    assert (info.kind, info.step, info.epoch, info.reason, info.run) == ("emergency", 2, 3, "spike", "r")
    assert info.metrics == {"loss": 0.5} and info.parent == own.id and info.distributed
    assert info.attributes == {"format": "dcp", "resumable": False, "world_size": 1, "zone": "b"}
    assert [result.problem for result in backup.verify()] == [None, None]
    loaded = backup.load()
    assert (loaded.info.step, loaded.skipped) == (1, ())
    with pytest.raises(CheckpointError, match=r"is a distributed checkpoint.*ObsinfraReader"):
        backup.load(manifest.path)


def old_and_garbage(root: Path) -> tuple[Manifest, Path]:
    """A checkpoint about to be removed, and a temporary file that somebody's death left."""
    manifest = save(root, {"kept": torch.arange(9.0)})
    return manifest, root / "objects" / "0123456789abcdef-01234567.tmp"


def collect_and_prepare(root: Path, doomed: Path) -> int:
    store = CheckpointStore(root)
    with store.writing():
        if doomed.exists():
            store.remove(doomed)
        return store.collect()


def test_chunks_of_a_save_under_way_are_not_collected(tmp_path: Path) -> None:
    """It has found a chunk that only the removed checkpoint names, and is half through writing another."""
    manifest, _ = old_and_garbage(tmp_path)
    collected: list[int] = []

    def collect(operation: str, path: Path) -> None:
        if operation == "write half" and path.parent.name == "objects":
            collected.append(collect_and_prepare(tmp_path, manifest.path))
            assert path.exists(), "what is being written is not tidied away"

    state = {"kept": torch.arange(9.0), "new": torch.ones(5)}
    save(tmp_path, state, step=2, files=WatchedFiles(collect))
    assert collected == [0]
    assert [result.problem for result in create_backup_system(tmp_path).verify()] == [None]
    assert same(state, load(tmp_path, empty(state)))


def test_chunks_are_not_collected_between_the_ranks_writes_and_the_commit(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    collected: list[int] = []
    finish = ObsinfraWriter.finish

    def late(writer: ObsinfraWriter, *arguments: Any) -> None:
        collected.append(collect_and_prepare(tmp_path, tmp_path / "nothing"))
        finish(writer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObsinfraWriter, "finish", late)
        save_boxes(tmp_path, tensor, [[box([0], [2])], [box([2], [2])]])
    assert collected == [0]
    assert torch.equal(load_box(ObsinfraReader(tmp_path), box([0], [4]), torch.float32), tensor)


def test_a_save_that_fails_beside_a_distributed_one_does_not_take_its_chunks_along(tmp_path: Path) -> None:
    """The backup system wrote a chunk that a rank then found there; its own commit fails."""
    save(tmp_path, {"other": torch.ones(1)})
    tensor = torch.arange(6.0)
    writer = ObsinfraWriter(tmp_path)
    plan, planner = plan_of(tensor, writer)
    results: list[Any] = []

    def write_distributed(operation: str, path: Path) -> None:
        if operation == "write" and path.parent.name == "manifests":
            results.append(writer.write_data(plan, planner).wait())
            raise OSError(errno.EIO, "the disk fails")

    with pytest.raises(OSError, match="the disk fails"):
        create_backup_system(tmp_path, files=WatchedFiles(write_distributed)).save(
            {"weight": tensor}, step=1, epoch=0
        )
    kept = TensorStorageMetadata(TensorProperties(tensor.dtype), torch.Size([6]), [box([0], [6])])
    writer.finish(Metadata({"weight": kept}), results)
    assert [result.problem for result in create_backup_system(tmp_path).verify()] == [None, None]


def plan_of(tensor: Tensor, writer: ObsinfraWriter) -> tuple[SavePlan, Boxes]:
    data = TensorWriteData(box([0], list(tensor.shape)), TensorProperties(tensor.dtype), tensor.size())
    plan = SavePlan([WriteItem(MetadataIndex("weight", [0]), WriteItemType.SHARD, tensor_data=data)])
    writer.prepare_global_plan([plan])
    return plan, Boxes(tensor)


def test_a_save_that_came_to_nothing_does_not_keep_garbage_for_ever(tmp_path: Path) -> None:
    """Another rank failed, so that `finish` is never called: until the writer's next save or its end."""
    writer = ObsinfraWriter(tmp_path)
    plan, planner = plan_of(torch.ones(3), writer)
    writer.write_data(plan, planner)
    assert collect_and_prepare(tmp_path, tmp_path / "nothing") == 0
    writer.set_up_storage_writer(True)
    assert collect_and_prepare(tmp_path, tmp_path / "nothing") == 1
    plan, planner = plan_of(torch.ones(3), writer)
    writer.write_data(plan, planner)
    del writer
    assert collect_and_prepare(tmp_path, tmp_path / "nothing") == 1


def test_a_chunk_removed_by_hand_before_the_commit_fails_the_save(tmp_path: Path) -> None:
    save(tmp_path, small_state(1), step=1)
    before = tree(tmp_path / "manifests")

    def remove(operation: str, path: Path) -> None:
        if operation == "sync" and path.name == "objects":
            victim.unlink(missing_ok=True)

    digest = digest_of(small_state(2)["weight"])
    victim = CheckpointStore(tmp_path).objects.path(digest)
    with pytest.raises(dcp.CheckpointException, match=f"chunk {digest[:12]} went missing before the commit"):
        save(tmp_path, small_state(2), step=2, files=WatchedFiles(remove))
    assert tree(tmp_path / "manifests") == before
    save(tmp_path, small_state(2), step=2)


def test_too_little_space_for_all_ranks_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, small_state(1), step=1)
    before = tree(tmp_path)

    def statvfs(path: object) -> os.statvfs_result:
        return os.statvfs_result((4096, 1024, 10**9, 10**9, 12 * 10**6 // 1024, 0, 0, 0, 0, 255))

    monkeypatch.setattr("obsinfra.backup.store.os.statvfs", statvfs)
    with pytest.raises(dcp.CheckpointException, match="12 MB free in"):
        save(tmp_path, {"weight": torch.ones(5_000_000, dtype=torch.uint8)}, step=2)
    assert tree(tmp_path) == before
    save(tmp_path, {"weight": torch.ones(3_000_000, dtype=torch.uint8)}, step=2)


# ---- crashes -----------------------------------------------------------------------------------------------


def operations_of_a_save(root: Path) -> int:
    save(root, small_state(1), step=1)
    files = WatchedFiles()
    save(root, small_state(2), step=2, files=files)
    return files.count


def test_a_save_that_fails_at_any_operation_leaves_the_checkpoints_as_they_were(tmp_path: Path) -> None:
    count = operations_of_a_save(tmp_path / "counted")
    assert count > 10
    for at in range(1, count + 1):
        root = tmp_path / f"store-{at}"
        save(root, small_state(1), step=1)
        before = tree(root / "manifests")
        with pytest.raises(dcp.CheckpointException) as caught:
            save(root, small_state(2), step=2, files=FailingFiles(at, errno.ENOSPC))
        assert isinstance(failure(caught), OSError)
        assert tree(root / "manifests") == before, at
        save(root, small_state(2), step=2)
        assert not list(root.rglob("*.tmp"))
        assert [result.problem for result in create_backup_system(root).verify()] == [None, None]


def test_a_power_cut_at_any_operation_leaves_what_stands_in_the_store_sound(tmp_path: Path) -> None:
    count = operations_of_a_save(tmp_path / "counted")
    steps = set()
    for at in range(1, count + 2):
        surroundings = tmp_path / f"disk-{at}"
        surroundings.mkdir()
        save(surroundings / "store", small_state(1), step=1)
        files = ForgetfulFiles(surroundings, at)
        files._durable = set(surroundings.rglob("*"))
        try:
            save(surroundings / "store", small_state(2), step=2, files=files)
        except dcp.CheckpointException:
            files.restart()
        assert all(result.problem is None for result in create_backup_system(surroundings / "store").verify())
        loaded = load(surroundings / "store", empty(small_state()))
        steps.add(loaded["seed"])
        assert same(small_state(loaded["seed"]), loaded)
    assert steps == {1, 2}
