"""What the trainer computes: accumulation, clipping, precision, validation, the best model, patience."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_workload import SAMPLES, Line, Regression, trainer
from torch import Tensor

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.compare import differences
from obsinfra.backup.rng import capture_rng_state
from obsinfra.config.settings import Settings
from obsinfra.errors import CheckpointError, ConfigError, DataError
from obsinfra.observation.observed_run import ObservedRun
from obsinfra.observation.resume import plan_run
from obsinfra.run.folder import RunFolder
from obsinfra.training import preflight
from obsinfra.training.trainer import Outcome, Trainer, to_device


@pytest.fixture(autouse=True)
def _ends_without_a_trace() -> Iterator[None]:
    """Threads, determinism and thread count are as before, whatever the trainer did."""
    present = set(threading.enumerate())
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
    assert [
        t.name for t in threading.enumerate() if t not in present and t.name.startswith("obsinfra-")
    ] == []


def gradients_at_each_update(of: Trainer) -> list[Tensor]:
    """Filled while it trains with the gradients, flattened, that the optimizer is given."""
    found: list[Tensor] = []

    def before(optimizer: Any, args: Any, kwargs: Any) -> None:
        found.append(torch.cat([p.grad.flatten() for p in of.parameters if p.grad is not None]).clone())

    of.optimizer.register_step_pre_hook(before)
    return found


def manifests(outcome: Outcome) -> list[tuple[str, int]]:
    return [(m.kind, m.step) for m in create_backup_system(outcome.folder / "checkpoints").list()]


def test_epochs_of_all_samples_in_a_new_order_each(tmp_path: Path) -> None:
    workload = Regression()
    outcome = trainer(tmp_path, workload, epochs=3).fit()
    assert (outcome.epoch, outcome.step, outcome.stopped, outcome.exit_code) == (3, 12, None, 0)
    epochs = [torch.cat(workload.seen[first : first + 4]) for first in (0, 4, 8)]
    assert all(sorted(epoch.tolist()) == sorted(epochs[0].tolist()) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    assert outcome.validation["loss"] < 8.0
    assert RunFolder(outcome.folder).read_info().state == "finished"


def test_accumulated_gradients_equal_those_of_the_big_batch(tmp_path: Path) -> None:
    small = trainer(tmp_path, batch_size=8, accumulate=4, clip_norm=0)
    big = trainer(tmp_path, batch_size=32, accumulate=1, clip_norm=0)
    accumulated, whole = gradients_at_each_update(small), gradients_at_each_update(big)
    outcomes = small.fit(), big.fit()
    assert [outcome.step for outcome in outcomes] == [4, 4]
    assert len(accumulated) == len(whole) == 4
    for mine, theirs in zip(accumulated, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small.model.state_dict(), big.model.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_last_group_that_is_shorter_is_averaged_over_what_it_has(tmp_path: Path) -> None:
    grouped = trainer(tmp_path, batch_size=16, accumulate=3, clip_norm=0, epochs=1)
    found = gradients_at_each_update(grouped)
    assert grouped.fit().step == 2
    assert len(found) == 2 and float(found[1].norm()) > 0.3 * float(found[0].norm())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped_to_the_norm_and_reported_as_they_were(tmp_path: Path, precision: str) -> None:
    clipped = trainer(tmp_path, clip_norm=0.5, precision=precision)
    free = trainer(tmp_path, clip_norm=0, precision=precision)
    short, long = gradients_at_each_update(clipped), gradients_at_each_update(free)
    clipped.fit()
    free.fit()
    # Under fp16 the first updates overflow, until the loss scale has come down; the scaler passes them over.
    short, long = ([g for g in found if bool(torch.isfinite(g).all())] for found in (short, long))
    assert len(short) == len(long) > 3
    assert all(float(gradient.norm()) == pytest.approx(0.5, rel=1e-3) for gradient in short)
    assert all(float(gradient.norm()) > 0.6 for gradient in long)
    cosine = torch.nn.functional.cosine_similarity(short[0], long[0], dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("precision", "autocast", "dtype"),
    [("fp32", False, torch.float32), ("bf16", True, torch.bfloat16), ("fp16", True, torch.float16)],
)
def test_the_forward_pass_runs_in_the_precision_asked_for(
    tmp_path: Path, precision: str, autocast: bool, dtype: torch.dtype
) -> None:
    workload = Regression()
    training = trainer(tmp_path, workload, precision=precision)
    training.fit()
    assert set(workload.forwards) == {(autocast, dtype)}
    assert training.scaler.is_enabled() == (precision == "fp16")
    assert all(parameter.dtype == torch.float32 for parameter in training.parameters)


@pytest.mark.parametrize(
    ("asked", "default", "validated"), [(None, 1, 4), (None, 2, 2), (1, 2, 4), (3, 1, 1), (0, 1, 0)]
)
def test_validation_every_n_epochs(tmp_path: Path, asked: int | None, default: int, validated: int) -> None:
    calls = 0

    def losses() -> Iterator[float]:
        nonlocal calls
        while True:
            calls += 1
            yield 1.0 / calls

    trainer(tmp_path, Regression(losses(), validate_every=default), epochs=4, validate_every=asked).fit()
    assert calls == validated


def test_the_best_model_is_kept_as_it_was_then(tmp_path: Path) -> None:
    training = trainer(tmp_path, Regression(iter([3.0, 1.0, 2.0, 1.5])), epochs=4)
    states: list[dict[str, Tensor]] = []
    validate = training.validate

    def seen(run: ObservedRun) -> None:
        states.append({name: tensor.clone() for name, tensor in training.model.state_dict().items()})
        validate(run)

    training.validate = seen  # type: ignore[method-assign]
    outcome = training.fit()
    assert outcome.best == 1.0
    backup = create_backup_system(outcome.folder / "checkpoints")
    (best,) = (manifest for manifest in backup.list() if manifest.kind == "best")
    assert (best.step, best.reason) == (8, "best loss: 1")
    assert differences(backup.load(best.path).state["model"], states[1]) == []
    assert backup.load().info.kind == "final"  # the best one is no state to go on from


def test_patience_ends_the_run_and_resuming_it_does_not_train_on(tmp_path: Path) -> None:
    first = trainer(tmp_path, Regression(iter([3.0, 1.0, 2.0, 1.0, 1.5])), epochs=50, patience=3, run="p")
    outcome = first.fit()
    assert (outcome.epoch, outcome.step, outcome.exit_code) == (5, 20, 0)
    assert outcome.stopped == "no better loss in 3 validations"
    assert RunFolder(outcome.folder).read_info().state == "stopped"
    again = trainer(tmp_path, Regression(iter([])), epochs=50, patience=3, resume="p").fit()
    assert (again.step, again.stopped) == (20, "no better loss in 3 validations")


def test_max_steps_ends_the_run_there_and_resuming_it_takes_no_further_step(tmp_path: Path) -> None:
    workload = Regression()
    outcome = trainer(tmp_path, workload, max_steps=6, run="m").fit()
    assert (outcome.step, outcome.stopped, len(workload.seen)) == (6, "--max-steps 6 reached", 6)
    again = trainer(tmp_path, workload, max_steps=6, resume="m").fit()
    assert (again.step, len(workload.seen)) == (6, 6)
    further = trainer(tmp_path, workload, max_steps=7, resume="m").fit()
    assert (further.step, len(workload.seen)) == (7, 7)


def test_without_backups_nothing_is_saved(tmp_path: Path) -> None:
    outcome = trainer(tmp_path, disable_backups=True).fit()
    assert list((outcome.folder / "checkpoints").rglob("*.json")) == []
    assert outcome.step == 8


def test_without_monitoring_no_port_is_opened(tmp_path: Path) -> None:
    seen: list[str | None] = []
    outcome = trainer(tmp_path).fit(lambda run: seen.append(run.monitor.url))
    watched = trainer(tmp_path, disable_monitoring=False, metrics_port=0)
    watched.fit(lambda run: seen.append(run.monitor.url))
    assert seen[0] is None and str(seen[1]).startswith("http://127.0.0.1:")
    assert RunFolder(outcome.folder).read_info().metrics_urls == {}


def test_deterministic_refuses_other_kernels(tmp_path: Path) -> None:
    trainer(tmp_path, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()


def test_every_generator_starts_from_the_seed(tmp_path: Path) -> None:
    def draws(seed: int) -> tuple[float, float, float]:
        trainer(tmp_path, seed=seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first, other = draws(5), draws(6)
    assert draws(5) == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_a_named_gpu_with_the_gpu_disabled_is_refused(tmp_path: Path) -> None:
    assert trainer(tmp_path, disable_gpu=True).device == torch.device("cpu")
    with pytest.raises(ConfigError, match="drop --disable-gpu"):
        trainer(tmp_path, disable_gpu=True, device="cuda:0")


def test_the_check_before_training_leaves_no_trace(tmp_path: Path) -> None:
    training = trainer(tmp_path)
    before = {
        "model": {name: tensor.clone() for name, tensor in training.model.state_dict().items()},
        "rng": capture_rng_state(),
        "data": training.batches.state_dict(),
    }
    preflight.check(training)
    after = {
        "model": training.model.state_dict(),
        "rng": capture_rng_state(),
        "data": training.batches.state_dict(),
    }
    assert differences(before, after) == []
    assert all(parameter.grad is None for parameter in training.parameters)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_compiled_model_learns_the_same_and_its_checkpoint_fits_the_plain_one(tmp_path: Path) -> None:
    compiled = trainer(tmp_path, compile="on", run="c", max_steps=4)
    preflight.check(compiled)
    torch._dynamo.reset()
    compiled.fit()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    plain = trainer(tmp_path, compile="off", max_steps=4)
    plain.fit()
    torch.testing.assert_close(compiled.model.state_dict(), plain.model.state_dict(), rtol=1e-4, atol=1e-5)
    assert trainer(tmp_path, compile="off", resume="c").fit().step == 8


def test_resuming_with_another_model_is_refused_and_the_run_is_as_it_was(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=3, run="r").fit()
    folder = tmp_path / "runs" / "r"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    class Wider(Regression):
        def build_model(self) -> torch.nn.Module:
            return Line(2)

    with pytest.raises(CheckpointError, match=r"does not fit the model: linear\.bias is"):
        trainer(tmp_path, Wider(), resume="r").fit()
    changed = {path.name for path in before if path.read_bytes() != before[path]}
    assert changed <= {".lock"}


def test_resuming_with_another_batch_size_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=3, run="r").fit()
    with pytest.raises(DataError, match="--batch-size"):
        trainer(tmp_path, batch_size=8, resume="r").fit()


def test_a_run_branched_from_a_checkpoint_names_its_parent_and_leaves_it_alone(tmp_path: Path) -> None:
    """By the manifest of one checkpoint, or by the folder of all."""
    parent = trainer(tmp_path, max_steps=3, run="parent").fit()
    store = parent.folder / "checkpoints"
    (manifest,) = (store / "manifests").glob("*.json")
    whole = trainer(tmp_path).fit()
    for resume in (manifest, store):
        branch = trainer(tmp_path, resume=str(resume)).fit()
        assert branch.run_id != "parent" and branch.step == 8
        assert RunFolder(branch.folder).read_info().parent == str(resume)
        states = (create_backup_system(o.folder / "checkpoints").load().state for o in (branch, whole))
        assert differences(*states) == []
    assert manifests(parent) == [("regular", 3)]
    assert RunFolder(parent.folder).read_info().restarts == 0


def test_tensors_of_a_nested_batch_are_moved_and_the_rest_is_kept() -> None:
    batch = {"x": (torch.ones(2), [torch.zeros(1), 3]), "y": "word"}
    moved = to_device(batch, torch.device("meta"))
    assert moved["x"][0].is_meta and moved["x"][1][0].is_meta
    assert moved["x"][1][1] == 3 and moved["y"] == "word" and isinstance(moved["x"], tuple)
    assert to_device(batch, torch.device("cpu"))["x"][0] is batch["x"][0]


def test_a_plan_made_before_is_the_one_that_is_used(tmp_path: Path) -> None:
    settings = Settings(model_name="regression", output_dir=tmp_path, disable_monitoring=True, run="planned")
    outcome = Trainer(Regression(), settings, plan_run(settings, "regression")).fit()
    assert outcome.folder == tmp_path / "planned"
    assert outcome.step * 16 == 2 * SAMPLES
