"""Exports load in the libraries they are for, imports give back the same bits, neither does harm."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_files import QuickFiles
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from same import same
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from obsinfra.backup import export as export_module
from obsinfra.backup.backup_system import BackupSystem, create_backup_system
from obsinfra.backup.export import export, import_file, named_tensors
from obsinfra.errors import CheckpointError


def tied_model() -> nn.Module:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Embedding(6, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False))
    model[3].weight = model[0].weight
    return model.to(torch.bfloat16)


@pytest.fixture
def backup(tmp_path: Path) -> BackupSystem:
    made = create_backup_system(tmp_path / "store", files=QuickFiles())
    model = tied_model()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    extra = {
        "array": np.arange(3.0),
        "scalar": np.float32(2.5),
        "big": 10**40,
        "raw": b"\0\xff",
        "pair": (1, 2),
    }
    made.create_checkpoint(model, optimizer, 1, 7, 0.5, **extra)
    return made


def test_safetensors_hold_the_model_and_say_where_from(backup: BackupSystem, tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    size = export(backup, "latest", target)
    assert size == target.stat().st_size
    model = backup.load().state["model"]
    assert same(
        dict(sorted(model.items())),
        dict(sorted({**load_file(target), "3.weight": model["0.weight"]}.items())),
    )
    with safe_open(target, "pt") as file:  # type: ignore[no-untyped-call]
        notes = file.metadata()
    assert notes["format"] == "pt", "what Hugging Face's loader asks for"
    assert notes["obsinfra_checkpoint"] == backup.list()[0].path.stem and notes["step"] == "7"
    assert notes["3.weight"] == "0.weight", "a tensor of two names is there once"
    loaded = tied_model()
    assert load_model(loaded, target) == (set(), [])
    assert same(model, dict(loaded.state_dict()))


def test_torch_exports_load_with_weights_only(backup: BackupSystem, tmp_path: Path) -> None:
    export(backup, "latest", tmp_path / "model.pt", form="torch")
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert same(backup.load().state["model"], found)


def test_a_whole_state_loads_with_weights_only(backup: BackupSystem, tmp_path: Path) -> None:
    export(backup, "latest", tmp_path / "all.pt", form="torch", part="all")
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    state = backup.load().state
    assert same(torch.arange(3.0, dtype=torch.float64), found["extra"].pop("array"))
    assert found["extra"].pop("scalar") == 2.5
    del state["extra"]["array"], state["extra"]["scalar"]
    assert same(state, found)


def test_dcp_exports_load_with_dcp(backup: BackupSystem, tmp_path: Path) -> None:
    export(backup, "latest", tmp_path / "dcp", form="dcp")
    wanted = {"model": {name: torch.zeros_like(t) for name, t in backup.load().state["model"].items()}}
    load_distributed(wanted, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    assert same(backup.load().state["model"], wanted["model"])


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_what_was_exported_comes_back_bit_for_bit(backup: BackupSystem, tmp_path: Path, name: str) -> None:
    export(backup, "latest", tmp_path / name, form="torch" if name == "m.pt" else "safetensors")
    other = create_backup_system(tmp_path / "other", files=QuickFiles())
    saved = import_file(other, tmp_path / name, step=3, tag="ours")
    loaded = other.load("ours")
    assert loaded.info.path == saved.path and (saved.step, saved.kind) == (3, "regular")
    assert same(
        dict(sorted(backup.load().state["model"].items())), dict(sorted(loaded.state["model"].items()))
    )


def test_tied_weights_are_tied_again_after_an_import(backup: BackupSystem, tmp_path: Path) -> None:
    export(backup, "latest", tmp_path / "m.safetensors")
    other = create_backup_system(tmp_path / "other", files=QuickFiles())
    model = other.load(import_file(other, tmp_path / "m.safetensors").path).state["model"]
    assert model["3.weight"] is model["0.weight"]
    tied_model().load_state_dict(model)


def test_tensors_that_are_merely_equal_all_stay(backup: BackupSystem, tmp_path: Path) -> None:
    whole = torch.ones(4, 4)
    state = {
        "a": torch.ones(4),
        "b": torch.ones(4),
        "view": whole[:2],
        "t": whole.t(),
        "empty": torch.ones(0),
    }
    backup.save({"model": {**state, "none": torch.ones(0)}}, step=8, epoch=0)
    export(backup, "latest", tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert same(dict(sorted({**state, "none": torch.ones(0)}.items())), dict(sorted(found.items())))


def test_notes_in_a_file_are_not_taken_for_names(backup: BackupSystem, tmp_path: Path) -> None:
    model = nn.ParameterList(torch.ones(1) * number for number in range(10))
    backup.create_checkpoint(model, step=8)
    export(backup, "latest", tmp_path / "m.safetensors")  # step 8, and a tensor that is called 8
    assert set(backup.load(import_file(backup, tmp_path / "m.safetensors").path).state["model"]) == set(
        model.state_dict()
    )


def test_an_import_is_no_place_to_resume_from_and_stays(backup: BackupSystem, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    saved = import_file(backup, tmp_path / "w.safetensors", step=99)
    assert backup.load().info.step == 7
    for step in range(100, 110):
        backup.save({}, step=step, epoch=0)
    backup.prune()
    assert saved.path.exists()
    assert same({"model": {"w": torch.ones(2)}}, backup.load(f"imported-{saved.id}").state)


def test_a_whole_state_is_imported_as_it_is(backup: BackupSystem, tmp_path: Path) -> None:
    export(backup, "latest", tmp_path / "all.pt", form="torch", part="all")
    state = backup.load(import_file(backup, tmp_path / "all.pt").path).state
    assert same(backup.load().state["optimizer"], state["optimizer"])


MADE_BY_EVIL = Path(tempfile.mkdtemp()) / "made"


class Evil:
    def __reduce__(self) -> Any:
        return (open, (str(MADE_BY_EVIL), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_that_would_have_to_be_unpickled_comes_in(
    backup: BackupSystem, tmp_path: Path, zipped: bool
) -> None:
    path = tmp_path / "evil.pt"
    if zipped:
        torch.save({"model": Evil()}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(CheckpointError, match="cannot read"):
        import_file(backup, path)
    assert not MADE_BY_EVIL.exists() and len(backup.list()) == 1


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 9, b"\xff" * 100])
def test_damaged_files_are_refused(backup: BackupSystem, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read"):
        import_file(backup, tmp_path / name)
    assert len(backup.list()) == 1


def test_a_tag_that_cannot_be_is_refused_before_anything_is_saved(
    backup: BackupSystem, tmp_path: Path
) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    backup.tag("latest", "mine")
    for tag in ("mine", "latest"):
        with pytest.raises(CheckpointError, match=f"tag '{tag}'"):
            import_file(backup, tmp_path / "w.safetensors", tag=tag)
    assert len(backup.list()) == 1


def test_what_safetensors_cannot_hold_is_named(backup: BackupSystem, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"param_groups\.0\.lr .* is a float; .*--format torch"):
        export(backup, "latest", tmp_path / "o.safetensors", part="optimizer")
    assert not (tmp_path / "o.safetensors").exists()


def test_names_that_would_fall_together_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"called a\.b"):
        named_tensors({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)})


def test_an_unknown_part_is_refused_with_what_there_is(backup: BackupSystem, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no part 'modle'; expected all or one of: model, optimizer"):
        export(backup, "latest", tmp_path / "x", part="modle")


def test_an_existing_target_is_replaced_only_when_asked(backup: BackupSystem, tmp_path: Path) -> None:
    target = tmp_path / "x.pt"
    target.write_text("mine")
    with pytest.raises(CheckpointError, match="there already"):
        export(backup, "latest", target, form="torch")
    assert target.read_text() == "mine"
    export(backup, "latest", target, form="torch", replace=True)
    assert torch.load(target, weights_only=True)


@pytest.mark.parametrize("form", ["safetensors", "dcp"])
def test_a_folder_with_other_things_in_it_is_never_replaced(
    backup: BackupSystem, tmp_path: Path, form: Any
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("mine")
    with pytest.raises(CheckpointError, match="is not a"):
        export(backup, "latest", tmp_path / "home", form=form, replace=True)
    assert (tmp_path / "home" / "letter").read_text() == "mine"


def test_a_dcp_folder_is_replaced_by_another(backup: BackupSystem, tmp_path: Path) -> None:
    for _ in range(2):
        export(backup, "latest", tmp_path / "dcp", form="dcp", replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp", "store"]


@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_a_write_that_fails_leaves_nothing_behind(
    backup: BackupSystem, tmp_path: Path, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(state: Any, path: Path) -> None:
        (path if form == "torch" else path / "x").parent.mkdir(exist_ok=True)
        (path if form == "torch" else path / "x").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(export_module, f"_save_{form}", half)
    with pytest.raises(OSError, match="disk full"):
        export(backup, "latest", tmp_path / "out", form=form)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_damaged_checkpoint_is_not_exported(backup: BackupSystem, tmp_path: Path) -> None:
    for file in backup.store.objects.all():
        file.write_bytes(b"\1" * file.stat().st_size)
    with pytest.raises(CheckpointError, match="damaged"):
        export(backup, "latest", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
