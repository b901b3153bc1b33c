"""`obsinfra checkpoints …` as a person uses it: what it prints, what it changes, what it exits with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from terminal import Terminal
from torch import nn

from obsinfra.backup.backup_system import BackupSystem, Kind, create_backup_system
from obsinfra.backup.compare import differences
from obsinfra.backup.dcp import ObsinfraReader, ObsinfraWriter
from obsinfra.backup.export import export
from obsinfra.cli import checkpoints as commands
from obsinfra.cli import main as cli


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Terminal:
    monkeypatch.chdir(tmp_path)
    for console in (commands.console, cli.stderr):
        monkeypatch.setattr(console, "_width", 250)
    return Terminal("checkpoints", capsys, monkeypatch)


@pytest.fixture
def backup(tmp_path: Path) -> BackupSystem:
    """Run `alpha` under `runs/`, started with keep_checkpoints 2; three regular checkpoints."""
    folder = tmp_path / "runs" / "alpha"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps(
            {
                "version": 1, "id": "alpha", "model": "digits", "state": "finished",
                "started": "2026-01-01T00:00:00+00:00", "host": "here", "world_size": 1, "processes": {},
                "metrics_urls": {}, "git_revision": None, "epochs": 1, "restarts": 0, "parent": None,
                "ended": None, "reason": None,
            }
        )
    )  # fmt: skip
    (folder / "config.toml").write_text("keep_checkpoints = 2\n")
    made = create_backup_system(folder / "checkpoints", run="alpha")
    for step in (10, 20, 30):
        save(made, step)
    return made


def save(backup: BackupSystem, step: int, kind: Kind = "regular") -> Path:
    state = {
        "model": {"w": torch.full((100, 100), float(step)), "frozen": torch.ones(50, 50)},
        "loss": 1.0 / step,
        "odd [name]": (),
    }
    return backup.save(
        state, step=step, epoch=1, kind=kind, metrics={"loss": 1.0 / step}, reason="a [test]"
    ).path


def damage(backup: BackupSystem, path: Path) -> None:
    others = {d for info in backup.list() if info.path != path for d in info.chunks()}
    for digest in backup.store.read_manifest(path).chunks() - others:
        file = backup.store.objects.path(digest)
        file.write_bytes(b"\0" * file.stat().st_size)


def test_list_shows_each_with_its_tags(run: Terminal, backup: BackupSystem) -> None:
    backup.tag("latest", "good")
    result = run("list")
    assert result.code == 0
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [info.path.stem for info in backup.list()]
    assert "good" in lines[3] and "a [test]" in lines[3] and "good" not in lines[2]


def test_list_shows_damaged_manifests_too(run: Terminal, backup: BackupSystem) -> None:
    path = backup.list()[0].path
    path.write_bytes(b"x")
    result = run("list", "alpha")
    assert f"damaged  {path.stem}" in result.out and len(result.out.splitlines()) == 4


def test_show_tells_what_it_holds(run: Terminal, backup: BackupSystem) -> None:
    result = run("show", backup.list()[1].id)
    assert result.code == 0
    assert "epoch, step 1, 20" in result.out and "loss 0.05" in result.out
    rows = [line.split() for line in result.out.splitlines()[-2:]]
    assert rows[0][:2] == ["state.model.w", "float32"] and "[100, 100]" in result.out
    assert rows[0][-1] == "0.040" and rows[1][0] == "state.model.frozen"


def test_verify_exits_with_1_on_damage(run: Terminal, backup: BackupSystem) -> None:
    assert run("verify").code == 0
    path = backup.list()[1].path
    damage(backup, path)
    result = run("verify")
    assert result.code == 1
    assert [line.split()[0] for line in result.out.splitlines()] == ["sound", "damaged", "sound"]
    assert run("verify", "--checkpoint", "latest").code == 0
    assert run("verify", "--checkpoint", path.stem).code == 1


def test_diff_names_what_differs_with_sizes(run: Terminal, backup: BackupSystem) -> None:
    first, second, _ = (info.id for info in backup.list())
    result = run("diff", first, second)
    assert result.code == 1
    rows = result.out.splitlines()
    assert rows[1].split() == ["loss", "0.1", "and", "0.05"]
    assert rows[2].split()[0] == "model.w" and rows[2].split()[-1] == "0.040"
    assert "frozen" not in result.out and "2 differ (0.040 MB), 1 are the same" in rows[-1]
    same = run("diff", first, first)
    assert same.code == 0 and "the same, bit for bit" in same.out


def test_diff_sees_what_is_on_one_side_only_and_empty_parts(run: Terminal, tmp_path: Path) -> None:
    one, two = (create_backup_system(tmp_path / name) for name in ("one", "two"))
    one.save({"a": torch.ones(2), "e": []}, step=1, epoch=0)
    two.save({"b": torch.ones(2), "e": []}, step=1, epoch=0)
    result = run("diff", "latest", "latest", "--run", "./one", "--with-run", "./two")
    assert result.code == 1 and "only in A" in result.out and "only in B" in result.out
    two.save({"a": torch.ones(2), "e": ()}, step=2, epoch=0)
    assert run("diff", "latest", "latest", "--run", "./one", "--with-run", "./two").code == 1


def test_du_tells_what_a_removal_frees(run: Terminal, backup: BackupSystem) -> None:
    result = run("du")
    rows = [line.split() for line in result.out.splitlines()]
    assert [row[1:] for row in rows[1:4]] == [["0.040", "0.010"]] * 3
    assert result.out.splitlines()[-1] == "0.130 MB on disk"
    before = sum(path.stat().st_size for path in backup.store.objects.all())
    backup.store.remove(backup.list()[0].path)
    assert "0.040 MB of it named by no" in run("du").out
    with backup.store.writing():
        backup.store.collect()
    assert before - sum(path.stat().st_size for path in backup.store.objects.all()) == 40_000


def test_prune_keeps_what_the_run_was_started_with(run: Terminal, backup: BackupSystem) -> None:
    stems = [info.path.stem for info in backup.list()]
    told = run("prune", "--dry-run")
    assert told.code == 0 and "1 to remove, 2 kept" in told.out and stems[0] in told.out
    assert [info.path.stem for info in backup.list()] == stems
    done = run("prune")
    assert done.code == 0 and f"removed  {stems[0]}" in done.out
    assert [info.path.stem for info in backup.list()] == stems[1:]
    assert run("prune", "--keep-last", "1").code == 0
    assert [info.step for info in backup.list()] == [30]


def test_prune_by_the_rules_it_is_given(run: Terminal, backup: BackupSystem) -> None:
    save(backup, 40)
    assert run("prune", "--keep-last", "1", "--best-metric", "loss", "--best-mode", "max").code == 0
    assert [info.step for info in backup.list()] == [10, 40]
    assert run("prune", "--best-mode", "best").code == 2


def test_a_tag_keeps_and_names(run: Terminal, backup: BackupSystem) -> None:
    first = backup.list()[0].path
    assert run("tag", first.stem, "start").code == 0
    assert "0 removed, 3 kept" in run("prune").out
    assert "step 1, 10" in run("show", "start").out
    clash = run("tag", "latest", "start")
    assert clash.code == 2 and clash.err.startswith("error: tag 'start' is that of") and clash.out == ""
    assert run("tag", "latest", "start", "--move").code == 0
    assert run("untag", "start").code == 0 and run("untag", "start").code == 2
    run("prune")
    assert not first.exists()


def test_confirm(run: Terminal, backup: BackupSystem) -> None:
    path = save(backup, 5, "emergency")
    assert run("confirm", "latest").code == 2
    assert run("confirm", path.stem).code == 0
    assert "(confirmed)" in next(line for line in run("list").out.splitlines() if "-emergency-" in line)


@pytest.mark.parametrize("form", ["safetensors", "torch", "dcp"])
def test_export(run: Terminal, backup: BackupSystem, tmp_path: Path, form: str) -> None:
    target = tmp_path / "out"
    assert run("export", "latest", target, "--format", form).code == 0
    if form == "dcp":
        assert (target / ".metadata").is_file()
    else:
        found = load_file(target) if form == "safetensors" else torch.load(target, weights_only=True)
        assert torch.equal(found["w"], torch.full((100, 100), 30.0))
    assert run("export", "latest", target, "--format", form).code == 2
    assert run("export", "latest", target, "--format", form, "--force").code == 0


def test_a_format_that_is_none(run: Terminal, backup: BackupSystem) -> None:
    result = run("export", "latest", "out", "--format", "onnx")
    assert result.code == 2 and "expected one of safetensors, torch, dcp" in result.err


def test_import(run: Terminal, backup: BackupSystem, tmp_path: Path) -> None:
    export(backup, "latest", tmp_path / "w.safetensors")
    assert run("import", "w.safetensors", "--tag", "theirs", "--step", "25").code == 0
    assert backup.load("theirs").info.step == 25
    assert run("import", "w.safetensors", "--tag", "theirs").code == 2
    assert run("import", "absent.safetensors").code == 2
    (tmp_path / "bad.pt").write_bytes(b"no")
    assert "weights_only" in run("import", "bad.pt").err


def test_push_and_pull(run: Terminal, backup: BackupSystem, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/remote"
    pushed = run("push", url)
    assert pushed.code == 0 and "3 checkpoints, 4 chunks, 0.1 MB copied" in pushed.out
    assert "0 checkpoints, 0 chunks" in run("push", url).out
    one = run("pull", url, "./back", "--checkpoint", "latest")
    assert one.code == 0 and "1 checkpoints, 2 chunks" in one.out
    assert run("pull", url, "./back").code == 0
    assert run("verify", "./back").code == 0
    assert [info.step for info in create_backup_system(tmp_path / "back").list()] == [10, 20, 30]


def test_a_remote_that_cannot_be_reached_is_one_line(run: Terminal, backup: BackupSystem) -> None:
    for command in ("push", "pull"):
        result = run(command, "nonsense://x")
        assert result.code == 2 and len(result.err.splitlines()) == 1 and "nonsense" in result.err


@pytest.mark.parametrize(
    "words",
    [("show", "nosuch"), ("verify", "nosuch"), ("list", "./nowhere"), ("diff", "a", "b"), ("untag", "x")],
)
def test_what_is_not_there_is_one_line_and_exit_code_2(
    run: Terminal, backup: BackupSystem, words: tuple[str, ...]
) -> None:
    result = run(*words)
    assert result.code == 2 and result.err.startswith("error: ") and len(result.err.splitlines()) == 1


def test_a_metric_that_no_checkpoint_has_is_refused(run: Terminal, backup: BackupSystem) -> None:
    result = run("prune", "--keep-last", "1", "--best-metric", "los")
    assert result.code == 2 and "'los'" in result.err and "one of loss" in result.err
    assert len(backup.list()) == 3


def test_what_is_no_url_is_told_so(run: Terminal, backup: BackupSystem) -> None:
    for command in ("push", "pull"):
        result = run(command, "some/folder")
        assert result.code == 2 and "a scheme, e.g. s3://" in result.err


def test_a_pull_from_where_nothing_is_fails(run: Terminal, backup: BackupSystem, tmp_path: Path) -> None:
    result = run("pull", f"file://{tmp_path}/nowhere", "./back")
    assert result.code == 2 and "no checkpoints at file://" in result.err


def test_off_a_terminal_a_checkpoint_is_one_line(
    run: Terminal, backup: BackupSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands.console, "_width", 40)
    assert len(run("list").out.splitlines()) == 4


# ---- made with torch.distributed.checkpoint ------------------------------------------------------------


def distributed(root: Path, step: int) -> dict[str, Any]:
    """Saved as any DCP user does; what was saved."""
    model = {"0.weight": torch.full((64, 8), float(step)), "0.bias": torch.arange(8.0)}
    state = {"model": model, "optimizer": {"lr": 0.5}, "step": step}
    dcp.save(state, storage_writer=ObsinfraWriter(root, step=step), no_dist=True)
    return state


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_every_command_takes_a_distributed_checkpoint(run: Terminal, tmp_path: Path) -> None:
    root = tmp_path / "runs" / "own" / "checkpoints"
    distributed(root, 1)
    saved = distributed(root, 2)
    place = "./runs/own"
    listed = run("list", place)
    assert listed.code == 0 and listed.out.count("torch.distributed") == 2
    first, second = (line.split()[0] for line in listed.out.splitlines()[1:])

    shown = run("show", "latest", "--run", place)
    assert "torch.distributed.checkpoint, 1 rank\n" in shown.out and "ObsinfraReader" in shown.out
    assert shown.out.splitlines()[-2].split() == ["model.0.weight", "float32", "[64,", "8]", "1", "0.002"]
    assert run("verify", place).code == 0
    assert run("du", place).code == 0

    result = run("diff", first, second, "--run", place)
    assert result.code == 1 and "2 differ (0.002 MB), 2 are the same" in result.out
    assert [line.split()[0] for line in result.out.splitlines()[1:3]] == ["model.0.weight", "step"]
    assert run("diff", second, second, "--run", place).code == 0

    assert run("tag", "latest", "mine", "--run", place).code == 0
    assert run("export", "mine", "m.safetensors", "--run", place).code == 0
    found = load_file("m.safetensors")
    assert found.keys() == saved["model"].keys()
    assert all(torch.equal(found[name], saved["model"][name]) for name in found)
    assert run("export", "mine", "m.pt", "--format", "torch", "--part", "all", "--run", place).code == 0
    assert differences(saved, torch.load("m.pt", weights_only=True)) == []
    wrong = run("export", "mine", "x", "--part", "modle", "--run", place)
    assert wrong.code == 2 and "one of: model, optimizer, step" in wrong.err


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_distributed_checkpoints_are_kept_moved_and_taken_in(run: Terminal, tmp_path: Path) -> None:
    root, url = tmp_path / "store", f"file://{tmp_path}/remote"
    states = {step: distributed(root, step) for step in (1, 2, 3)}
    assert "3 checkpoints" in run("push", url, "--run", "./store").out
    assert "0 checkpoints, 0 chunks" in run("push", url, "--run", "./store").out
    assert run("tag", "latest", "mine", "--run", "./store").code == 0
    assert run("confirm", "latest", "--run", "./store").code == 2
    pruned = run("prune", "./store", "--keep-last", "1")
    assert pruned.code == 0 and "1 kept" in pruned.out
    assert run("untag", "mine", "--run", "./store").code == 0
    (row,) = run("list", "./store").out.splitlines()[1:]
    assert row.startswith("000000000003-")

    assert run("pull", url, "./back").code == 0 and run("verify", "./back").code == 0
    for info in create_backup_system(tmp_path / "back").list():
        found = {"model": {k: torch.zeros_like(v) for k, v in states[1]["model"].items()}, "step": 0}
        reader = ObsinfraReader(tmp_path / "back", info.path)
        dcp.load(found, storage_reader=reader, no_dist=True)
        assert differences(found["model"], states[info.step]["model"]) == []

    assert run("export", "latest", "m.safetensors", "--run", "./store").code == 0
    assert run("import", "m.safetensors", "--run", "./store", "--tag", "theirs").code == 0
    theirs = create_backup_system(root).load("theirs")
    assert torch.equal(theirs.state["model"]["0.bias"], torch.arange(8.0))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_regular_and_a_distributed_checkpoint_are_compared(
    run: Terminal, backup: BackupSystem, tmp_path: Path
) -> None:
    state = distributed(tmp_path / "dcp", 40)
    backup.save(state, step=40, epoch=0)
    result = run("diff", "latest", "latest", "--with-run", "./dcp")
    assert result.code == 0, result.out


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_damaged_distributed_checkpoint_is_not_exported(run: Terminal, tmp_path: Path) -> None:
    distributed(tmp_path / "dcp", 7)
    for file in (tmp_path / "dcp" / "objects").glob("*/*"):
        file.write_bytes(b"\0" * file.stat().st_size)
    result = run("export", "latest", "x.safetensors", "--run", "./dcp")
    assert result.code == 2 and "damaged" in result.err and len(result.err.splitlines()) == 1
    assert not (tmp_path / "x.safetensors").exists() and run("verify", "./dcp").code == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_what_two_ranks_sharded_is_shown_and_exported_whole(run: Terminal, tmp_path: Path) -> None:
    """The example under torchrun, then the commands a person would give."""
    example = Path(__file__).parents[2] / "examples" / "dcp_save.py"
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(example), "store"]
    subprocess.run([sys.executable, *words], check=True, capture_output=True, timeout=200)
    shown = run("show", "--run", "./store")
    assert "torch.distributed.checkpoint, 2 ranks" in shown.out
    weight = next(line.split() for line in shown.out.splitlines() if line.startswith("model.0.weight"))
    assert weight[1:5] == ["float32", "[256,", "64]", "2"]
    assert run("verify", "./store").code == 0
    assert run("export", "latest", "model.safetensors", "--run", "./store").code == 0
    assert run("export", "latest", "whole", "--run", "./store", "--format", "dcp").code == 0
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    model.load_state_dict(load_file("model.safetensors"))
    wanted = {"model": {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}}
    dcp.load(wanted, checkpoint_id="whole", no_dist=True)
    assert differences(dict(model.state_dict()), wanted["model"]) == []


def test_a_path_works_as_a_run_folder_or_a_store(run: Terminal, backup: BackupSystem) -> None:
    assert run("list", "./runs/alpha").out == run("list", "./runs/alpha/checkpoints").out
    assert run("list", "./runs/alpha").out == run("list", "alpha").out


def test_a_row_is_one_line_off_a_terminal_whatever_its_width(
    run: Terminal, backup: BackupSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands.console, "_width", 80)
    monkeypatch.setenv("COLUMNS", "80")
    rows = run("list", "alpha").out.splitlines()
    assert rows[0].split() == ["checkpoint", "epoch", "step", "made", "(UTC)", "MB", "tags", "why"]
    assert [row.split()[0] for row in rows[1:]] == [path.stem for path in backup.store.manifest_paths()]


def test_a_run_without_checkpoints_is_said_to_have_none(run: Terminal, backup: BackupSystem) -> None:
    for path in backup.store.manifest_paths():
        path.unlink()
    for command in ("list", "verify"):
        said = run(command, "alpha")
        assert said.code == 0 and "no checkpoint in" in said.out
