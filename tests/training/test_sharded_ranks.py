"""Two ranks with half of the model each: they train as others do, and their checkpoints are anybody's."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from rank_faults import AT_STEP
from rank_processes import in_group, trained, whole
from torch import nn
from waiting import wait_for

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.compare import count_tensors, differences
from obsinfra.backup.heir import wait_for_heir
from obsinfra.config.settings import Settings
from obsinfra.control.command import new_command
from obsinfra.errors import ConfigError
from obsinfra.observation.observed_run import ObservedRun
from obsinfra.observation.ranks import Alone
from obsinfra.optimization.fsdp import blocks_of
from obsinfra.training.parallelism import choose_parallelism
from obsinfra.training.preflight import check
from obsinfra.training.trainer import Trainer
from obsinfra.workloads.byte_gpt import SIZES, ByteGPT
from obsinfra.workloads.registry import create_workload

pytestmark = pytest.mark.slow

GPT = {"model_name": "byte_gpt", "batch_size": 4, "validate_every": 0, "run": "r"}


def _trained(ranks: Any, output: Path, settings: dict[str, Any]) -> Any:
    return trained(ranks, output, **settings)


def far(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference between two sets of parameters."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def _weighed(ranks: Any, output: Path, settings: dict[str, Any]) -> Any:
    own: list[int] = []

    def weigh(run: ObservedRun) -> None:
        own.extend(parameter.to_local().numel() for parameter in run.model.parameters())

    return {**trained(ranks, output, weigh, **settings), "own": sum(own)}


def test_two_ranks_with_half_the_model_each_train_as_one_process(tmp_path: Path) -> None:
    """Gradients of two passes, clipped by the norm over both ranks, a validation and a best checkpoint."""
    settings = {**GPT, "max_steps": 8, "accumulate": 2, "clip_norm": 0.5}
    one = trained(Alone(), tmp_path / "one", **settings)
    # On the CPU nothing moves when parts are kept in host memory, but the policy is in use.
    two = in_group(2, _weighed, tmp_path / "two", {**settings, "parallel": "fsdp", "fsdp_offload": "on"})
    parameters = sum(value.size for value in one["parameters"].values())
    assert [rank["own"] for rank in two] == [parameters // 2] * 2, two
    assert far(two[0]["parameters"], two[1]["parameters"]) == 0.0
    moved = far(
        one["parameters"], trained(Alone(), tmp_path / "other", **{**settings, "seed": 1})["parameters"]
    )
    assert far(one["parameters"], two[0]["parameters"]) < 1e-3 < moved


def _in_rows(ranks: Any, output: Path, settings: dict[str, Any]) -> Any:
    with pytest.raises(ConfigError, match="--shard-size 3 does not divide 4 ranks"):
        choose_parallelism(ranks, Settings(parallel="hsdp", shard_size=3))
    return _weighed(ranks, output, settings)


def test_two_pairs_with_the_model_in_halves_train_as_one_process_and_go_on_alone(tmp_path: Path) -> None:
    """Shards that do not fit are refused by each rank; a checkpoint is the same as without."""
    settings = {**GPT, "max_steps": 4, "warmup_steps": 0}
    one = trained(Alone(), tmp_path / "one", **settings)
    four = in_group(4, _in_rows, tmp_path / "four", {**settings, "parallel": "hsdp", "shard_size": 2})
    assert all(isinstance(rank, dict) for rank in four), four
    own = [rank["own"] for rank in four]
    assert own[0] + own[1] == own[2] + own[3] == sum(value.size for value in one["parameters"].values())
    assert all(far(four[0]["parameters"], rank["parameters"]) == 0.0 for rank in four)
    assert far(one["parameters"], four[0]["parameters"]) < 1e-4
    alone = trained(Alone(), tmp_path / "four", **{**settings, "run": None, "resume": "r"})
    assert far(alone["parameters"], four[0]["parameters"]) == 0.0


def _handed_over(ranks: Any, output: Path, settings: dict[str, Any]) -> Any:
    """Go on from a checkpoint, and save what was put back before anything else."""
    found: dict[str, Any] = {}

    def save(run: ObservedRun) -> None:
        assert run.resumed is not None
        found["from"], found["saved"] = run.resumed.info.path, run.checkpoint("regular", "handed over")

    return {**trained(ranks, output, save, **settings), **found}


def test_a_run_goes_on_under_the_other_kind_and_back(tmp_path: Path) -> None:
    """Parameters, moments, steps and all are put back bit for bit; the rest differs by the order of sums."""
    uncut = in_group(2, _trained, tmp_path / "whole", {**GPT, "max_steps": 9})
    in_group(2, _trained, tmp_path / "parts", {**GPT, "max_steps": 3})
    store = create_backup_system(tmp_path / "parts" / "r" / "checkpoints")
    resumed = {**GPT, "run": None, "resume": "r"}
    for parallel, steps in (("fsdp", 6), ("ddp", 9)):
        settings = {**resumed, "parallel": parallel, "max_steps": steps}
        parts = in_group(2, _handed_over, tmp_path / "parts", settings)
        before, after = (store.load(parts[0][name]) for name in ("from", "saved"))
        assert before.info.step == after.info.step == steps - 3 and parts[1]["saved"] is None
        assert count_tensors(before.state["optimizer"]) == 3 * count_tensors(before.state["model"])
        assert differences(before.state["model"], after.state["model"]) == []
        assert differences(before.state["optimizer"], after.state["optimizer"]) == []
        assert parts[0]["step"] == parts[1]["step"] == steps
        assert far(parts[0]["parameters"], parts[1]["parameters"]) == 0.0
    assert far(uncut[0]["parameters"], parts[0]["parameters"]) < 1e-4


def test_a_run_in_parts_goes_on_alone(tmp_path: Path) -> None:
    """Each validates with a forward pass of both ranks, and one process has the same parameters then."""
    settings = {"model_name": "digits", "batch_size": 64, "validate_every": 1, "run": "r"}
    two = in_group(2, _trained, tmp_path, {**settings, "parallel": "fsdp", "max_steps": 25})
    assert two[0]["validation"] == two[1]["validation"] and two[0]["validation"], two
    alone = trained(Alone(), tmp_path, **{**settings, "run": None, "resume": "r", "max_steps": 25})
    assert far(two[0]["parameters"], alone["parameters"]) == 0.0


def _in_parts(ranks: Any, output: Path, settings: dict[str, Any]) -> Any:
    """No loop waits for a commit; a part that cannot be written fails it on both; then train."""
    kept: list[Any] = []

    def fail_once(run: ObservedRun) -> None:
        def committed() -> int:
            return len(list(run.folder.checkpoints.glob("manifests/*.json")))

        run.checkpoint("regular", "both")
        dist.barrier()
        kept.append(committed())
        if ranks.rank == 1:
            writer().suspend()
        dist.barrier()
        run.checkpoint("best", "in the background", wait=False)
        kept.append(committed())
        dist.barrier()
        if ranks.rank == 1:
            writer().resume()
        run.keeper.settle()
        dist.barrier()
        kept.append(committed())
        limit = writer().rlimit(psutil.RLIMIT_FSIZE)
        if ranks.rank == 1:
            writer().rlimit(psutil.RLIMIT_FSIZE, (0, limit[1]))
        dist.barrier()
        kept.append(run.checkpoint("regular", "a full disk"))
        dist.barrier()
        kept.append(committed())
        writer().rlimit(psutil.RLIMIT_FSIZE, limit)

    return {**trained(ranks, output, fail_once, **settings), "kept": kept}


def writer() -> psutil.Process:
    """The process that commits this rank's parts."""
    found = [child for child in psutil.Process().children() if "part-writer" in " ".join(child.cmdline())]
    assert len(found) == 1
    return found[0]


def _killed(ranks: Any, output: Path, settings: dict[str, Any]) -> Any:
    """Rank 1's writer is stopped, so that a checkpoint is half made when everything of this run dies."""

    def die(run: ObservedRun) -> None:
        run.checkpoint("regular", "sound")
        dist.barrier()
        own = writer()
        if ranks.rank == 1:
            own.suspend()
        dist.barrier()
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.add_(1.0)
        run.checkpoint("final", "torn", wait=False)
        met = run.folder.checkpoints / "parts"
        if ranks.rank == 0:  # its own part is durable, and its writer waits for the other
            wait_for(lambda: list(met.glob("*-2/0.json")), "a part of the second", seconds=30)
        dist.barrier()
        if ranks.rank == 1:
            own.kill()
        os.kill(os.getpid(), signal.SIGKILL)

    return trained(ranks, output, die, **settings)


def test_all_killed_in_the_middle_of_a_checkpoint_leave_the_former_sound(tmp_path: Path) -> None:
    form = {**GPT, "checkpoint_form": "sharded", "parallel": "fsdp", "max_steps": 3}
    assert in_group(2, _killed, tmp_path, form) == ["died", "died"]
    assert wait_for_heir(tmp_path / "r" / "checkpoints", 60)
    store = create_backup_system(tmp_path / "r" / "checkpoints")
    (former,) = (found for found in store.list() if found.in_parts)
    assert former.kind == "regular"
    kept = store.load(former.path)
    torch.manual_seed(0)  # as the trainer does
    assert differences(kept.state["model"], ByteGPT(SIZES["nano"]).state_dict()) == []
    two = in_group(2, _trained, tmp_path, {**form, "run": None, "resume": "r"})
    assert all(isinstance(rank, dict) and rank["step"] == 3 for rank in two), two
    assert [found.step for found in store.list() if found.in_parts] == [0, 3]


def test_each_rank_writes_its_part_and_any_number_of_ranks_goes_on_from_them(tmp_path: Path) -> None:
    """Two ranks, then two pairs, then one process: parameters and moments are put back bit for bit."""
    form = {**GPT, "checkpoint_form": "sharded"}
    two = in_group(2, _in_parts, tmp_path, {**form, "parallel": "fsdp", "max_steps": 3})
    assert [rank["kept"] for rank in two] == [[1, 1, 2, None, 2]] * 2, two
    errors = (tmp_path / "r" / "logs" / "errors.jsonl").read_text()
    assert "rank 1 could not write its part" in errors
    pairs = {**form, "parallel": "hsdp", "shard_size": 2, "run": None, "resume": "r", "max_steps": 5}
    four = in_group(4, _handed_over, tmp_path, pairs)
    assert all(isinstance(rank, dict) for rank in four), four
    store = create_backup_system(tmp_path / "r" / "checkpoints")
    before, after = (store.load(four[0][name]) for name in ("from", "saved"))
    assert all(manifest.in_parts for manifest in store.list()), store.list()
    assert [found.info.attributes["world_size"] for found in (before, after)] == [2, 4]
    assert count_tensors(before.state["optimizer"]) == 3 * count_tensors(before.state["model"])
    assert differences(before.state["model"], after.state["model"]) == []
    assert differences(before.state["optimizer"], after.state["optimizer"]) == []
    alone = trained(Alone(), tmp_path, **{**GPT, "run": None, "resume": "r", "max_steps": 5})
    assert far(alone["parameters"], four[0]["parameters"]) == 0.0


def _commanded(ranks: Any, output: Path, settings: dict[str, Any]) -> Any:
    events: list[tuple[str, int]] = []

    def ask(run: ObservedRun) -> None:
        copy = run.keeper.agreed

        def noted(what: str, epoch: int) -> None:
            events.append((what, run.step))
            copy(what, epoch)

        run.keeper.agreed = noted  # type: ignore[method-assign]
        if ranks.rank == 0:
            for action in ("checkpoint", "rollback", "emergency_checkpoint"):
                run.channel.submit(new_command(run.folder.id, action, source="test"))

    return {**trained(ranks, output, ask, **settings), "events": events}


def test_copies_commands_and_rollbacks_are_at_the_same_step_on_both(tmp_path: Path) -> None:
    """Snapshots every few steps, asked for by rank 0's clock; a checkpoint and a rollback by command."""
    settings = {"model_name": "digits", "run": "r", "parallel": "fsdp", "validate_every": 0, "max_steps": 150}
    settings["checkpoint_form"] = "sharded"  # its emergencies and snapshots are whole: both kinds of copy
    timed = {"snapshot_seconds": 0.1, "checkpoint_seconds": 0.3, "schedule": "constant"}
    two = in_group(2, _commanded, tmp_path, {**settings, **timed})
    assert two[0]["events"] == two[1]["events"] and len(two[0]["events"]) > 1, two
    assert {what for what, _ in two[0]["events"]} == {"regular", "snapshot"}
    kinds = [found.kind for found in create_backup_system(tmp_path / "r" / "checkpoints").list()]
    assert kinds.count("emergency") == 2 and "regular" in kinds  # one is what the rollback can be undone by
    assert far(two[0]["parameters"], two[1]["parameters"]) == 0.0


def _faulty(ranks: Any, output: Path) -> Any:
    os.environ["RANK_FAULT"] = "nan"
    settings = {"model_name": "rank_faults:create_workload", "parallel": "fsdp", "snapshot_seconds": 0.1}
    return trained(ranks, output, run="r", **settings)


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_with_the_last_good_state(tmp_path: Path) -> None:
    found = in_group(2, _faulty, tmp_path)
    assert all(text.startswith("NonFiniteLossError: ") for text in found), found
    loaded = create_backup_system(tmp_path / "r" / "checkpoints").load()
    assert loaded.info.step < AT_STEP
    assert all(bool(torch.isfinite(value).all()) for value in loaded.state["model"].values())


def _scaled(ranks: Any) -> Any:
    """Steps of the scaler, of which rank 1's gradients are not finite in the first."""
    settings = Settings(parallel="fsdp")
    parallel = choose_parallelism(ranks, settings)
    torch.manual_seed(0)
    model = parallel.wrap(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 1)))
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", 8.0)
    scales, moved = [], []
    for factor in (float("inf") if ranks.rank == 1 else 1.0, 1.0):
        before = [parameter.full_tensor() for parameter in model.parameters()]
        with parallel.exchanging(model, now=True):
            scaler.scale(model(torch.randn(4, 5) + ranks.rank).square().mean() * factor).backward()
        scaler.unscale_(optimizer)
        norm = parallel.clip(list(model.parameters()), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = [parameter.full_tensor() for parameter in model.parameters()]
        moved.append(any(not torch.equal(*pair) for pair in zip(before, after, strict=True)))
        scales.append((scaler.get_scale(), bool(torch.isfinite(norm))))
    return scales, moved, model[1].running_mean.tolist()


def test_the_scaler_leaves_a_step_out_on_both_when_one_has_infinite_gradients() -> None:
    found = in_group(2, _scaled)
    assert found[0] == found[1], found  # batch norm's statistics too, though the ranks' inputs differ
    assert found[0][:2] == ([(4.0, False), (4.0, True)], [False, True])


def _checked(ranks: Any, output: Path) -> Any:
    settings = Settings(parallel="fsdp", output_dir=output, model_name="digits")
    workload = create_workload("digits", data_path=None, model_size=None, seed=0)
    trainer = Trainer(workload, settings, ranks=ranks)
    before = {name: whole(value).clone() for name, value in trainer.model.state_dict().items()}
    check(trainer)
    after = {name: whole(value) for name, value in trainer.model.state_dict().items()}
    return differences(before, after), [p.grad is None for p in trainer.model.parameters()]


def test_the_check_before_training_leaves_a_model_in_parts_as_it_was(tmp_path: Path) -> None:
    found = in_group(2, _checked, tmp_path)
    assert all(isinstance(one, tuple) for one in found), found
    for places, without in found:
        assert places == [] and all(without)


REFUSED = {
    "oom_recovery": "on",
    "gradient_compression": "fp16",
    "compile": "on",
    "micro_batch": 2,
}


def _refusals(ranks: Any) -> Any:
    told = []
    for name, value in REFUSED.items():
        with pytest.raises(ConfigError) as error:
            choose_parallelism(ranks, Settings(parallel="fsdp", **{name: value}))
        told.append(str(error.value))
    return told


def test_what_does_not_go_with_it_is_refused(tmp_path: Path) -> None:
    found = in_group(2, _refusals)
    for told, (name, value) in zip(found[0], REFUSED.items(), strict=True):
        assert told.startswith(f"--{name.replace('_', '-')} {value} with --parallel fsdp"), told
    assert found[0] == found[1]
    with pytest.raises(ConfigError, match="--parallel fsdp in one process"):
        choose_parallelism(Alone(), Settings(parallel="fsdp"))
    with pytest.raises(ConfigError, match="--checkpoint-form sharded with --parallel ddp"):
        choose_parallelism(Alone(), Settings(parallel="ddp", checkpoint_form="sharded"))
    with pytest.raises(ConfigError, match="--checkpoint-form sharded with --checkpoint-compression auto"):
        packed = {"checkpoint_form": "sharded", "checkpoint_compression": "auto"}
        choose_parallelism(Alone(), Settings(parallel="fsdp", **packed))
    with pytest.raises(ConfigError, match="--shard-size 2 with --parallel fsdp"):
        choose_parallelism(Alone(), Settings(parallel="fsdp", shard_size=2))
    with pytest.raises(ConfigError, match="--fsdp-offload on with --parallel ddp"):
        choose_parallelism(Alone(), Settings(parallel="ddp", fsdp_offload="on"))


def test_weights_that_are_tied_across_blocks_stay_with_the_model() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 4, bias=False))
    assert blocks_of(model) == [model[0], model[1], model[3]]
    model[3].weight = model[0].weight
    assert blocks_of(model) == [model[1]]
