"""What --resume and --run mean together, decided from what is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import nn

from obsinfra.config.settings import Settings
from obsinfra.errors import CheckpointError, ConfigError, RunBusyError, UserError
from obsinfra.observation import observe
from obsinfra.observation.resume import plan_run
from obsinfra.run.folder import RunFolder


def made(
    output: Path, name: str, state: str = "stopped", *, saved: bool = True, model: str = "Linear"
) -> Path:
    """A run that ended in `state`; `dead` claims to run but has no process."""
    run = observe(nn.Linear(1, 1), run=name, model_name=model, output_dir=output, disable_monitoring=True)
    if saved:
        run.checkpoint()
    run.finish("stopped")
    if state == "dead":
        run.folder.update_info(state="running", processes={"0": {"pid": 2**22 + 1, "created": 1.0}})
    else:
        run.folder.update_info(state=state)
    return run.folder.root


def plan(output: Path, **settings: Any) -> Any:
    return plan_run(Settings(output_dir=output, **settings), "Linear")


def test_without_resume_a_run_is_new_and_its_name_must_be_free(tmp_path: Path) -> None:
    assert plan(tmp_path).folder.id.startswith("Linear-")
    assert plan(tmp_path, run="mine").folder.root == tmp_path / "mine"
    made(tmp_path, "mine")
    with pytest.raises(ConfigError, match=r"'mine' exists already .*state stopped.*--resume mine"):
        plan(tmp_path, run="mine")
    assert not (tmp_path / "Linear").exists()


@pytest.mark.parametrize("state", ["stopped", "failed", "dead"])
def test_auto_takes_the_newest_run_of_the_model_that_did_not_finish(tmp_path: Path, state: str) -> None:
    made(tmp_path, "a-old")
    made(tmp_path, "b-new", state)
    made(tmp_path, "c-finished", "finished")
    made(tmp_path, "d-other", model="Other")
    made(tmp_path, "e-nothing-saved", saved=False)
    found = plan(tmp_path, resume="auto")
    assert (found.folder.id, found.continues, found.note) == ("b-new", True, "resuming run b-new")


def test_auto_starts_a_new_run_and_says_so_when_there_is_none(tmp_path: Path) -> None:
    found = plan(tmp_path, resume="auto")
    assert not found.continues and found.store is None
    assert found.note == f"nothing to resume for Linear in {tmp_path}: a new run"


@pytest.mark.parametrize("state", ["stopped", "failed", "dead", "finished"])
def test_auto_with_a_name_means_that_run_whatever_became_of_it(tmp_path: Path, state: str) -> None:
    """So a scheduler may start the same command again and again."""
    made(tmp_path, "mine", state)
    made(tmp_path, "newer")
    found = plan(tmp_path, run="mine", resume="auto")
    assert (found.folder.id, found.continues) == ("mine", True)


def test_auto_with_a_name_starts_a_run_over_that_saved_nothing(tmp_path: Path) -> None:
    made(tmp_path, "mine", "dead", saved=False)
    found = plan(tmp_path, run="mine", resume="auto")
    assert (found.folder.id, found.continues, found.store) == ("mine", False, None)
    assert "no checkpoint" in found.note
    run = observe(nn.Linear(1, 1), run="mine", resume="auto", output_dir=tmp_path, disable_monitoring=True)
    run.finish()
    assert run.folder.read_info().state == "finished"


def test_auto_with_a_name_of_another_model_is_refused(tmp_path: Path) -> None:
    made(tmp_path, "mine", model="Other")
    with pytest.raises(ConfigError, match="'mine' exists already"):
        plan(tmp_path, run="mine", resume="auto")


@pytest.mark.parametrize("how", ["name", "folder"])
def test_a_run_is_named_by_its_name_or_its_folder(tmp_path: Path, how: str) -> None:
    root = made(tmp_path, "mine", "finished")
    found = plan(tmp_path, resume="mine" if how == "name" else str(root))
    assert (found.folder.root, found.store, found.continues) == (root, root / "checkpoints", True)


def test_a_checkpoint_begins_a_new_run(tmp_path: Path) -> None:
    store = made(tmp_path, "mine") / "checkpoints"
    (manifest,) = (store / "manifests").glob("*.json")
    by_manifest, by_store = (plan(tmp_path, resume=str(path)) for path in (manifest, store))
    assert by_manifest.folder.id != "mine" and not by_manifest.continues
    assert (by_manifest.store, by_manifest.checkpoint) == (store, manifest)
    assert (by_store.store, by_store.checkpoint, by_store.parent) == (store, None, str(store))


def test_what_cannot_be_resumed_is_said(tmp_path: Path) -> None:
    made(tmp_path, "empty", saved=False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.json").write_text("{}")
    cases: list[tuple[str, type[UserError], str]] = [
        ("nobody", ConfigError, "no run 'nobody'"),
        ("empty", CheckpointError, "run empty has no checkpoint to resume from"),
        (str(tmp_path / "nowhere"), CheckpointError, "nothing at"),
        ("a/../../b", CheckpointError, "nothing at"),
    ]
    for resume, error, message in cases:
        with pytest.raises(error, match=message):
            plan(tmp_path, resume=resume)
    for resume in (tmp_path / "folder", tmp_path / "file.json"):
        with pytest.raises(CheckpointError, match=resume.name):
            observe(nn.Linear(1, 1), resume=str(resume), output_dir=tmp_path, disable_monitoring=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file.json", "folder"]
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize("how", [{"run": "mine"}, {"resume": "mine"}])
def test_a_run_in_use_is_refused(tmp_path: Path, how: dict[str, str]) -> None:
    root = made(tmp_path, "mine")
    me = psutil.Process()
    RunFolder(root).update_info(
        state="running", processes={"0": {"pid": me.pid, "created": me.create_time()}}
    )
    with pytest.raises(RunBusyError, match=f"in use by process {me.pid}.*obsinfra command mine stop"):
        plan(tmp_path, **how)
