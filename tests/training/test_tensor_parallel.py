"""Ranks that compute each layer together train as one process does; their checkpoints are anybody's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import in_group, trained
from test_sharded_ranks import GPT, REFUSED, _handed_over, far
from torch import nn

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.compare import count_tensors, differences
from obsinfra.config.settings import Settings
from obsinfra.errors import ConfigError
from obsinfra.observation.observed_run import ObservedRun
from obsinfra.observation.ranks import Alone
from obsinfra.training.parallelism import choose_parallelism
from obsinfra.workloads.byte_gpt import SIZES, ByteGPT

pytestmark = pytest.mark.slow


def _weighed(ranks: Any, output: Path, settings: dict[str, Any]) -> Any:
    """Refusals first, on every rank; then train, with the size of this rank's part of a block."""
    for name, value in {**REFUSED, "tensor_parallel_size": 3}.items():
        with pytest.raises(ConfigError) as error:
            choose_parallelism(ranks, Settings(parallel="tp", **{name: value}))
        assert str(error.value).startswith(f"--{name.replace('_', '-')} {value} "), error.value
    with pytest.raises(ConfigError, match="Linear, which has no tensor_parallel_plan"):
        choose_parallelism(ranks, Settings(parallel="tp", tensor_parallel_size=2)).wrap(nn.Linear(2, 2))
    own: list[int] = []
    runs: list[ObservedRun] = []

    def weigh(run: ObservedRun) -> None:
        runs.append(run)
        own.extend(parameter.to_local().numel() for parameter in run.model.blocks[0].parameters())

    outcome = trained(ranks, output, weigh, **settings)
    return {**outcome, "own": sum(own), "samples": runs[0].monitor.recorder.samples}


def test_two_pairs_train_as_one_process(tmp_path: Path) -> None:
    """Pairs divide the layers, and the data is divided among pairs; two passes a step, clipped by the norm
    over all of the model. Samples of all ranks add up to those there were."""
    settings = {**GPT, "max_steps": 4, "accumulate": 2, "clip_norm": 0.5, "warmup_steps": 0}
    one = trained(Alone(), tmp_path / "one", **settings)
    tp = {"parallel": "tp", "tensor_parallel_size": 2}
    four = in_group(4, _weighed, tmp_path / "four", {**settings, **tp})
    assert all(isinstance(rank, dict) for rank in four), four
    width = SIZES["nano"].width
    assert [rank["own"] for rank in four] == [12 * width**2 // 2 + 2 * width] * 4
    assert sum(rank["samples"] for rank in four) == 4 * 2 * 4
    assert all(far(four[0]["parameters"], rank["parameters"]) == 0.0 for rank in four)
    torch.manual_seed(0)  # as the trainer does
    start = {name: value.detach().numpy() for name, value in ByteGPT(SIZES["nano"]).named_parameters()}
    assert far(one["parameters"], four[0]["parameters"]) < 1e-4 < 5e-3 < far(one["parameters"], start)


def _told(ranks: Any, output: Path, settings: dict[str, Any]) -> Any:
    """Train; also the losses this rank has recorded, and the size of its part of a block."""
    losses: list[float] = []
    own: list[int] = []

    def listen(run: ObservedRun) -> None:
        record = run.record

        def noted(**values: Any) -> None:
            losses.append(float(values["loss"]))
            record(**values)

        run.record = noted  # type: ignore[method-assign]
        own.extend(local(parameter).numel() for parameter in run.model.blocks[0].parameters())

    return {**trained(ranks, output, listen, **settings), "losses": losses, "own": sum(own)}


def local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


def test_pairs_that_divide_the_layers_and_their_parts_by_fsdp_train_as_one_process(tmp_path: Path) -> None:
    """A mesh of two times two ranks: the losses of each step, of the groups' halves of the data, are those of
    one process, and so are the weights then. Each rank has a quarter of a block, but for the norms."""
    settings = {**GPT, "max_steps": 6, "accumulate": 2, "clip_norm": 0.5, "warmup_steps": 0}
    one = _told(Alone(), tmp_path / "one", settings)
    both = {"parallel": "fsdp", "tensor_parallel_size": 2}
    four = in_group(4, _told, tmp_path / "four", {**settings, **both})
    assert all(isinstance(rank, dict) for rank in four), four
    width = SIZES["nano"].width
    assert one["own"] == 12 * width**2 + 2 * width
    assert [rank["own"] for rank in four] == [12 * width**2 // 4 + 2 * width // 2] * 4
    assert four[0]["losses"] == four[1]["losses"] != four[2]["losses"] == four[3]["losses"]
    together = [
        (first + second) / 2 for first, second in zip(four[0]["losses"], four[2]["losses"], strict=True)
    ]
    assert together == pytest.approx(one["losses"], rel=1e-4) and one["losses"][-1] < 0.9 * one["losses"][0]
    assert all(far(four[0]["parameters"], rank["parameters"]) == 0.0 for rank in four)
    assert far(one["parameters"], four[0]["parameters"]) < 1e-4


def test_two_times_two_pairs_train_as_one_process_and_go_on_alone(tmp_path: Path) -> None:
    """A mesh of two times two times two ranks: pairs divide the layers, two of them the model by FSDP2, and
    both halves have it. Each rank has a quarter of a block; the losses are those of one process; and of what
    is had twice, the checkpoint has one."""
    settings = {**GPT, "batch_size": 8, "max_steps": 3, "clip_norm": 0.5, "warmup_steps": 0}
    one = _told(Alone(), tmp_path / "one", settings)
    all_three = {"parallel": "hsdp", "shard_size": 2, "tensor_parallel_size": 2, "checkpoint_form": "sharded"}
    eight = in_group(8, _told, tmp_path / "eight", {**settings, **all_three})
    assert all(isinstance(rank, dict) for rank in eight), eight
    width = SIZES["nano"].width
    assert [rank["own"] for rank in eight] == [12 * width**2 // 4 + 2 * width // 2] * 8
    assert all(far(eight[0]["parameters"], rank["parameters"]) == 0.0 for rank in eight)
    quarters = [eight[first]["losses"] for first in range(0, 8, 2)]
    assert len({tuple(losses) for losses in quarters}) == 4  # the data is divided among all of the pairs
    together = [sum(losses) / 4 for losses in zip(*quarters, strict=True)]
    assert together == pytest.approx(one["losses"], rel=1e-4) and one["losses"][-1] < 0.95 * one["losses"][0]
    assert far(one["parameters"], eight[0]["parameters"]) < 1e-4
    alone = trained(Alone(), tmp_path / "eight", **{**settings, "run": None, "resume": "r"})
    assert far(alone["parameters"], eight[0]["parameters"]) == 0.0
    store = create_backup_system(tmp_path / "eight" / "r" / "checkpoints")
    (saved,) = (found for found in store.list() if found.in_parts)
    kept = sum(tensor.nbytes for tensor in saved.tensors)
    assert kept < 1.01 * 3 * 4 * sum(value.size for value in one["parameters"].values())


def _both_refused(ranks: Any) -> None:
    for parallel in ("fsdp", "hsdp"):
        with pytest.raises(
            ConfigError, match=f"--tensor-parallel-size 2 of 2 ranks with --parallel {parallel}"
        ):
            choose_parallelism(ranks, Settings(parallel=parallel, tensor_parallel_size=2))
    with pytest.raises(ConfigError, match="--shard-size 3 does not divide 2 ranks"):
        choose_parallelism(ranks, Settings(parallel="hsdp", tensor_parallel_size=1, shard_size=3))
    with pytest.raises(ConfigError, match="--tensor-parallel-size 3 does not divide 2 ranks"):
        choose_parallelism(ranks, Settings(parallel="fsdp", tensor_parallel_size=3))
    both = choose_parallelism(ranks, Settings(parallel="fsdp", tensor_parallel_size=1))
    with pytest.raises(
        ConfigError, match="--tensor-parallel-size with Linear, which has no tensor_parallel_plan"
    ):
        both.wrap(nn.Linear(2, 2))


def test_what_does_not_go_with_both_is_refused() -> None:
    assert in_group(2, _both_refused) == [None, None]


def test_a_run_goes_on_alone_and_back_bit_for_bit(tmp_path: Path) -> None:
    """Parameters, moments and all are put back as they were."""
    settings = {**GPT, "parallel": "tp", "max_steps": 3}
    in_group(2, _trained, tmp_path, settings)
    resumed = {**GPT, "run": None, "resume": "r"}
    alone = trained(Alone(), tmp_path, **{**resumed, "max_steps": 5})
    two = in_group(2, _handed_over, tmp_path, {**resumed, "parallel": "tp", "max_steps": 6})
    assert all(isinstance(rank, dict) for rank in two), two
    store = create_backup_system(tmp_path / "r" / "checkpoints")
    before, after = (store.load(two[0][name]) for name in ("from", "saved"))
    assert alone["step"] == before.info.step == after.info.step == 5 and two[0]["step"] == 6
    assert count_tensors(before.state["optimizer"]) == 3 * count_tensors(before.state["model"])
    assert differences(before.state["model"], after.state["model"]) == []
    assert differences(before.state["optimizer"], after.state["optimizer"]) == []
    uncut = trained(Alone(), tmp_path / "uncut", **{**GPT, "max_steps": 6})
    assert far(uncut["parameters"], two[0]["parameters"]) < 1e-5


def _trained(ranks: Any, output: Path, settings: dict[str, Any]) -> Any:
    return trained(ranks, output, **settings)


def test_what_does_not_go_with_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 heads of byte_gpt cannot be divided among 3 ranks"):
        ByteGPT(SIZES["nano"]).tensor_parallel_plan(3)
    with pytest.raises(ConfigError, match="--parallel tp in one process"):
        choose_parallelism(Alone(), Settings(parallel="tp"))
    with pytest.raises(ConfigError, match="--tensor-parallel-size 2 with --parallel ddp"):
        choose_parallelism(Alone(), Settings(parallel="ddp", tensor_parallel_size=2))
