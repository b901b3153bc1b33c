"""Several ranks train one model: as one process would, and each doing only what is its own."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_faults import AT_STEP
from rank_processes import in_group, trained
from torch import nn

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.control.command import new_command
from obsinfra.errors import CommandError, ConfigError
from obsinfra.observation import executors
from obsinfra.observation.observed_run import ObservedRun
from obsinfra.observation.ranks import Alone
from obsinfra.optimization import precision, wrapping
from obsinfra.run.folder import RunFolder

pytestmark = pytest.mark.slow


def alone(output: Path, **settings: Any) -> dict[str, Any]:
    return trained(Alone(), output, **settings)


def _trained(ranks: Any, output: Path, settings: dict[str, Any]) -> Any:
    return trained(ranks, output, **settings)


def far(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference between two sets of parameters."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def test_two_ranks_of_half_the_batch_train_as_one_rank_of_the_whole(tmp_path: Path) -> None:
    """The same seed and the same global batch give the same model but for the order of summation."""
    settings = {"model_name": "byte_gpt", "batch_size": 16, "max_steps": 12, "validate_every": 0}
    one = alone(tmp_path / "one", **settings, run="one")
    two = in_group(2, _trained, tmp_path / "two", {**settings, "run": "two"})
    assert [rank["step"] for rank in two] == [12, 12]
    assert far(two[0]["parameters"], two[1]["parameters"]) == 0.0
    moved = far(one["parameters"], alone(tmp_path / "other", **settings, run="x", seed=1)["parameters"])
    assert far(one["parameters"], two[0]["parameters"]) < 1e-3 < moved


def test_parts_that_are_not_equal_count_by_their_samples(tmp_path: Path) -> None:
    """Three ranks, batches of 13 and a last one of 12: every sample once, all of the same weight."""
    settings = {"model_name": "regression", "batch_size": 13, "epochs": 2}
    one = alone(tmp_path / "one", **settings, run="one")
    three = in_group(3, _trained, tmp_path / "three", {**settings, "run": "three"})
    assert [rank["step"] for rank in three] == [one["step"]] * 3
    for step, whole in enumerate(one["seen"]):
        parts = [rank["seen"][step] for rank in three]
        assert np.array_equal(np.concatenate(parts), whole)
    assert far(one["parameters"], three[0]["parameters"]) < 1e-5
    assert abs(one["validation"]["loss"] - three[0]["validation"]["loss"]) < 1e-4


@pytest.mark.parametrize("compression", ["bf16", "fp16", "powersgd"])
def test_compressed_gradients_train_nearly_the_same_model(tmp_path: Path, compression: str) -> None:
    """All ranks have the same parameters still; more is lost than by the order of summation, and little."""
    settings = {"model_name": "byte_gpt", "batch_size": 4, "max_steps": 13, "validate_every": 0, "run": "r"}
    one = alone(tmp_path / "one", **settings)
    two = in_group(2, _trained, tmp_path / "two", {**settings, "gradient_compression": compression})
    assert far(two[0]["parameters"], two[1]["parameters"]) == 0.0
    assert 1e-5 < far(one["parameters"], two[0]["parameters"]) < 0.05


def _mlp(ranks: Any) -> dict[str, tuple[list[float], dict[str, Any]]]:
    """Losses over this rank's half of the rows, and the parameters, by how gradients travel."""
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(5))
    goal = rows.sin().sum(1, keepdim=True)
    mine = slice(32 * ranks.rank, 32 * ranks.rank + 32)
    found = {}
    for how in ("off", "bf16", "fp16", "powersgd"):
        torch.manual_seed(0)
        model = wrapping.replicate(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)), how)
        steps = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        losses = []
        for _ in range(60):
            steps.zero_grad()
            loss = (model(rows[mine]) - goal[mine]).square().mean()
            loss.backward()
            steps.step()
            losses.append(float(loss))
        found[how] = losses, {name: value.detach().numpy() for name, value in model.named_parameters()}
    return found


def test_an_mlp_learns_as_well_from_compressed_gradients() -> None:
    first, second = in_group(2, _mlp)
    assert isinstance(first, dict) and isinstance(second, dict), (first, second)
    whole = np.add(first["off"][0], second["off"][0]) / 2
    assert whole[-1] < whole[0] / 20
    for how, close in (("bf16", 0.02), ("fp16", 0.002), ("powersgd", 0.1)):
        assert far(first[how][1], second[how][1]) == 0.0 < far(first[how][1], first["off"][1]), how
        losses = np.add(first[how][0], second[how][0]) / 2
        assert np.abs(losses - whole).max() < close * whole[0], how


def _unable(ranks: Any) -> list[str]:
    told = []
    wrapping.TRAVELS_AS["bf16"] = torch.float8_e5m2  # stands for a backend that cannot
    complex_one = nn.Linear(2, 2).to(torch.complex64)
    for compression, model in (("bf16", nn.Linear(2, 2)), ("fp16", complex_one), ("powersgd", complex_one)):
        with pytest.raises(ConfigError) as error:
            wrapping.replicate(model, compression)
        told.append(str(error.value))
    return told


def test_a_compression_that_cannot_be_done_is_refused_on_both() -> None:
    first, second = in_group(2, _unable)
    assert first == second and len(first) == 3, first
    assert first[0].startswith("gradient compression bf16 on cpu: ") and "(here gloo)" in first[0]
    assert "gradient compression fp16 of weight, which is complex" in first[1] and "powersgd" in first[2]


def test_compression_and_recovery_are_refused_together(tmp_path: Path) -> None:
    settings = {"model_name": "regression", "gradient_compression": "bf16", "oom_recovery": "on"}
    found = in_group(2, _trained, tmp_path, settings)
    assert all("ConfigError: --gradient-compression bf16 with --oom-recovery on" in text for text in found)


def test_a_stopped_run_goes_on_exactly_on_as_many_ranks(tmp_path: Path) -> None:
    """Dropout and all: every rank's random state is its own and comes back, bit for bit."""
    settings = {"model_name": "digits", "batch_size": 64, "validate_every": 1}
    whole = in_group(2, _trained, tmp_path / "whole", {**settings, "run": "r", "max_steps": 40})
    in_group(2, _trained, tmp_path / "parts", {**settings, "run": "r", "max_steps": 29})
    parts = in_group(2, _trained, tmp_path / "parts", {**settings, "resume": "r", "max_steps": 40})
    for rank in range(2):
        assert far(whole[rank]["parameters"], parts[rank]["parameters"]) == 0.0


def test_a_run_goes_on_with_other_numbers_of_ranks_where_it_was_in_the_data(tmp_path: Path) -> None:
    """Two ranks, then a process alone, then three: each sample of each epoch once, in the same order."""
    settings = {"model_name": "regression", "batch_size": 13, "epochs": 4}
    whole = alone(tmp_path / "whole", **settings, run="r")
    parts = [
        in_group(2, _trained, tmp_path / "parts", {**settings, "run": "r", "max_steps": 3}),
        [alone(tmp_path / "parts", **settings, resume="r", max_steps=8)],
        in_group(3, _trained, tmp_path / "parts", {**settings, "resume": "r"}),
    ]
    seen = [
        np.concatenate(step)
        for group in parts
        for step in zip(*(rank["seen"] for rank in group), strict=True)
    ]
    assert len(seen) == len(whole["seen"]) == 20
    assert all(np.array_equal(one, other) for one, other in zip(seen, whole["seen"], strict=True))
    assert far(whole["parameters"], parts[-1][0]["parameters"]) < 1e-5


def _faulty(ranks: Any, output: Path, fault: str, settings: dict[str, Any]) -> Any:
    os.environ["RANK_FAULT"] = fault
    if fault == "settings" and ranks.rank == 1:
        settings = {**settings, "clip_norm": 7.0}
    if fault == "hardware":  # ranks on processors of which one multiplies bf16 natively
        settings = {**settings, "precision": "auto"}
        precision.cpu_has_bf16 = lambda: bool(ranks.rank == 1)
    return trained(ranks, output, model_name="rank_faults:create_workload", **settings)


@pytest.mark.parametrize(
    ("fault", "what", "difference"),
    [
        ("data", "data", "training_images 7, not 1437"),
        ("code", "code", "workload '"),
        ("settings", "settings", "clip_norm 7.0, not 1.0"),
        ("hardware", "hardware", "precision 'bf16', not 'fp32'"),
        ("model", "model", "'"),
        ("frozen", "model", "'"),  # the same shapes, but not all of them trained
    ],
)
def test_ranks_that_are_not_alike_end_with_an_error_that_names_it(
    tmp_path: Path, fault: str, what: str, difference: str
) -> None:
    found = in_group(2, _faulty, tmp_path, fault, {"run": "r"})
    told = f"RanksDifferError: rank 1 has another {what} than rank 0: {difference}"
    assert all(isinstance(text, str) and told in text for text in found), found
    assert not (tmp_path / "r").exists()


def test_a_model_that_cannot_be_saved_is_an_error_on_every_rank_before_the_first_step(tmp_path: Path) -> None:
    found = in_group(2, _faulty, tmp_path, "unsavable", {"run": "r"})
    told = "this training cannot be saved: state.model._extra_state is a _thread.lock; expected tensors"
    assert all(isinstance(text, str) and told in text for text in found), found
    assert not (tmp_path / "r").exists()


def test_a_model_without_shapes_yet_is_an_error_on_every_rank(tmp_path: Path) -> None:
    found = in_group(2, _faulty, tmp_path, "lazy", {"run": "r"})
    told = "Sequential cannot be wrapped by DDP: 1.weight has no shape yet; call the model once on a batch"
    assert all(isinstance(text, str) and told in text for text in found), found
    assert not (tmp_path / "r").exists()


def test_more_ranks_than_samples_in_a_batch_are_refused_by_each(tmp_path: Path) -> None:
    found = in_group(3, _trained, tmp_path, {"model_name": "regression", "batch_size": 2})
    assert all("ConfigError: 3 ranks for batches of 2 samples" in text for text in found), found


def test_data_that_cannot_be_divided_is_refused_by_each(tmp_path: Path) -> None:
    found = in_group(2, _trained, tmp_path, {"model_name": "tactical_mappo"})
    assert all("the data of tactical_mappo cannot be divided among 2 ranks" in text for text in found), found


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    found = in_group(2, _faulty, tmp_path, "nan", {"run": "r"})
    errors = [text.splitlines()[0] for text in found]
    assert all(error.startswith("NonFiniteLossError: ") for error in errors), found
    assert len({re.search(r"before step (\d+)", error)[1] for error in errors}) == 1
    store = create_backup_system(tmp_path / "r" / "checkpoints")
    loaded = store.load()  # the last good one
    assert loaded.info.step < AT_STEP
    assert all(bool(torch.isfinite(value).all()) for value in loaded.state["model"].values())


def _disagreeing(ranks: Any, output: Path) -> Any:
    if ranks.rank == 1:

        def refuse(run: Any, order: Any) -> Any:
            raise CommandError("not on this rank")

        executors.EXECUTORS["scale_lr"] = refuse

    def ask(run: ObservedRun) -> None:
        if ranks.rank == 0:
            run.channel.submit(new_command(run.folder.id, "scale_lr", source="test", args={"factor": 0.5}))

    return trained(ranks, output, ask, model_name="digits", run="r", epochs=1000)


def test_ranks_that_disagree_about_a_command_end_with_an_error(tmp_path: Path) -> None:
    """Their learning rates would differ from there on."""
    found = in_group(2, _disagreeing, tmp_path)
    told = "the ranks disagree about the command scale_lr: rank 0: done; rank 1: not on this rank"
    assert all(isinstance(text, str) and told in text for text in found), found
    assert RunFolder(tmp_path / "r").read_info().state == "failed"
