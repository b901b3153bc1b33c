"""Memory runs out in a step: it is done again in smaller micro-batches, and the result does not tell."""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import in_group
from rank_processes import trained as trained_on
from small_workload import Regression
from small_workload import trainer as regression
from torch import Tensor, nn
from training_runs import environment

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.catalog import metrics as catalog
from obsinfra.config.settings import Settings
from obsinfra.errors import ConfigError, MemoryExhaustedError
from obsinfra.observation.observed_run import ObservedRun
from obsinfra.observation.resume import plan_run
from obsinfra.optimization.micro_batching import MicroBatching, Share
from obsinfra.optimization.oom_recovery import OutOfMemoryRecovery, is_out_of_memory
from obsinfra.run.folder import RunFolder
from obsinfra.training import preflight
from obsinfra.training.faults import LEAKED_BYTES
from obsinfra.training.trainer import Trainer
from obsinfra.workloads.digits import Digits
from obsinfra.workloads.protocol import StepOutput

EPOCH = 23
"""Steps of an epoch of the digits at a batch of 64; the last one has 29 rows."""


class RandomDigits(Digits):
    """The digits with whatever a repeated step could get wrong: dropout, batch norm, dice of three kinds."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.Dropout(0.3), nn.Linear(512, 10),
        )  # fmt: skip

    def training_step(self, model: nn.Module, batch: Any) -> StepOutput:
        images, labels = batch
        noise = 0.1 * random.random() + 0.1 * float(np.random.normal())
        return super().training_step(model, (images + noise, labels))


def digits(tmp_path: Path, name: str, workload: Digits | None = None, **settings: Any) -> Trainer:
    usual = {
        "model_name": "digits",
        "output_dir": tmp_path / "runs",
        "run": name,
        "precision": "fp32",
        "device": "cpu",
        "epochs": 1,
        "disable_monitoring": True,
        "disable_backups": True,
    }
    given = Settings(**{**usual, **settings})
    return Trainer(workload or RandomDigits(), given, plan_run(given, "digits"))


def trained(of: Trainer) -> tuple[list[float], dict[str, Tensor]]:
    """Loss of every step, and the model at the end."""
    losses: list[float] = []

    def look(run: ObservedRun) -> None:
        record = run.record

        def note(**values: Any) -> None:
            losses.append(float(values["loss"]))
            record(**values)

        run.record = note  # type: ignore[method-assign]

    of.fit(on_start=look)
    return losses, of.model.state_dict()


def assert_same(
    one: tuple[list[float], dict[str, Tensor]], other: tuple[list[float], dict[str, Tensor]]
) -> None:
    assert one[0] == other[0]
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def test_a_run_that_ran_out_at_once_equals_one_started_with_the_smaller_micro_batch(tmp_path: Path) -> None:
    recovered = trained(digits(tmp_path, "recovered", inject="oom@0"))
    assert len(recovered[0]) == EPOCH
    assert_same(recovered, trained(digits(tmp_path, "asked", micro_batch=32)))
    accumulated = digits(tmp_path, "accumulated", batch_size=32, accumulate=2)
    assert_same(recovered, trained(accumulated))
    whole = trained(digits(tmp_path, "whole"))
    assert recovered[0] != whole[0], "batch norm and the dice make pieces differ from the whole"


def test_from_the_failing_step_on_it_equals_a_run_that_changed_size_there_by_itself(tmp_path: Path) -> None:
    failing = digits(tmp_path, "failing", inject="oom@5x2")
    expected = trained(failing)
    changing = digits(tmp_path, "changing")

    def change(step: int) -> None:
        if step in (5, 6):
            changing.memory.micro_batching.limit = {5: 32, 6: 16}[step]

    changing.faults.before_forward = change  # type: ignore[method-assign]
    assert_same(expected, trained(changing))
    assert failing.memory.micro_batching.limit == 16


def test_without_layers_that_look_at_other_rows_the_result_is_that_of_whole_batches(tmp_path: Path) -> None:
    """To floating-point tolerance: sums are taken in another order."""
    recovered = regression(tmp_path, inject="oom@1x3", epochs=2, batch_size=24)
    whole = regression(tmp_path, epochs=2, batch_size=24)
    (found, pieces), (expected, wholes) = trained(recovered), trained(whole)
    assert recovered.memory.micro_batching.limit == 3
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pieces, wholes, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_goes_on_with_the_size_in_force(tmp_path: Path) -> None:
    through = trained(digits(tmp_path, "through", inject="oom@4", epochs=2))
    kept = {"epochs": 2, "disable_backups": False}
    first = trained(digits(tmp_path, "stopped", inject="oom@4", max_steps=9, **kept))
    again = digits(tmp_path, "stopped", resume="stopped", **kept)
    second = trained(again)
    assert again.memory.micro_batching.limit == 32
    assert_same(through, (first[0] + second[0], second[1]))


def test_a_recovery_is_seen_in_metrics_log_and_trace(tmp_path: Path) -> None:
    found: dict[str, float] = {}
    trainer = digits(tmp_path, "seen", Digits(), inject="oom@7", disable_monitoring=False, metrics_port=0)
    from obsinfra.monitoring.logging_config import configure_logging, shutdown_logging

    folder = RunFolder(tmp_path / "runs" / "seen")
    folder.create()
    configure_logging(folder.logs, terminal=False)
    try:
        with trainer.observe() as run:
            instruments = run.monitor.instruments
            with trainer.memory.watching(run.monitor, trainer.batch_size):
                assert instruments.get(catalog.MICRO_BATCH_ROWS) == 64
                trainer.train(run)
            for metric in (catalog.OOM_RECOVERIES, catalog.MICRO_BATCH_ROWS, catalog.MICRO_BATCH_GROWTHS):
                found[metric.name] = instruments.get(metric)
            rework = run.monitor.recorder.rework_seconds
    finally:
        shutdown_logging()
    assert list(found.values()) == [1, 32, 0] and rework > 0
    lines = [json.loads(line) for line in (folder.logs / "training.jsonl").read_text().splitlines()]
    (event,) = (line for line in lines if line["event"] == "out_of_memory_recovered")
    wanted = {"at_step": 7, "rows_before": 64, "rows": 32, "shares": 2, "elsewhere": False}
    assert {key: event[key] for key in wanted} == wanted
    assert event["problem"] == "CUDA out of memory, injected at step 7" and event["level"] == "warning"
    spans = [json.loads(line) for line in (folder.traces / "spans.jsonl").read_text().splitlines()]
    (span,) = (span for span in spans if span["name"] == "out of memory")
    assert span["attributes"]["obsinfra.rows"] == 32 and span["attributes"]["obsinfra.step"] == 7


def test_when_one_row_does_not_fit_the_run_ends_with_its_state_saved_and_says_why(tmp_path: Path) -> None:
    trainer = regression(tmp_path, batch_size=4, inject="oom@3x9", run="poor", snapshot_seconds=1e-6)
    with pytest.raises(MemoryExhaustedError) as caught:
        trainer.fit()
    assert str(caught.value).startswith("out of memory in step 5, and one row at a time does not fit: CUDA")
    assert "fix: --gradient-checkpointing" in str(caught.value)
    info = RunFolder(tmp_path / "runs" / "poor").read_info()
    assert info.state == "failed"
    (emergency,) = create_backup_system(tmp_path / "runs" / "poor" / "checkpoints").list()
    assert (emergency.kind, emergency.step) == ("emergency", 5)


def test_other_errors_are_nobodys_business(tmp_path: Path) -> None:
    class Broken(Regression):
        def training_step(self, model: nn.Module, batch: Any) -> StepOutput:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        regression(tmp_path, Broken()).fit()
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


class Greedy(Regression):
    """Takes at most `fits` rows at once."""

    def __init__(self, fits: int, **defaults: Any) -> None:
        super().__init__(**defaults)
        self.fits = fits

    def training_step(self, model: nn.Module, batch: Any) -> StepOutput:
        if len(batch[1]) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().training_step(model, batch)


def test_the_check_before_training_lets_a_batch_pass_that_will_be_split(tmp_path: Path) -> None:
    fits = regression(tmp_path, Greedy(3))
    preflight.check(fits)
    assert fits.fit().step == 8 and fits.memory.micro_batching.limit == 2
    with pytest.raises(ConfigError, match="one row does not fit into memory"):
        preflight.check(regression(tmp_path, Greedy(0)))
    for hopeless in (
        regression(tmp_path, Greedy(3), oom_recovery="off"),
        regression(tmp_path, Greedy(3, splittable=False)),
    ):
        with pytest.raises(ConfigError, match="one batch does not fit into memory"):
            preflight.check(hopeless)
    preflight.check(regression(tmp_path, Greedy(3), oom_recovery="off", micro_batch=3))


class Meeting:
    """The agreement of several threads, each a rank."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=30)
        self._said: list[int] = []
        self._lock = threading.Lock()

    def passed(self, failed: bool) -> bool:
        return self.agree(failed)

    def agree(self, mine: bool) -> bool:
        return self.largest(int(mine)) > 0

    def largest(self, number: int) -> int:
        with self._lock:
            self._said.append(number)
        self._barrier.wait()
        found = max(self._said)
        if self._barrier.wait() == 0:
            self._said.clear()
        self._barrier.wait()
        return found


def on_two_ranks(fits: tuple[int, int], steps: int) -> list[list[list[int]] | BaseException]:
    """What each rank tried, as lists of share sizes, or how it ended."""
    meeting, found = Meeting(2), [[], []]  # type: ignore[var-annotated]

    def rank(number: int) -> None:
        tried: list[list[int]] = []
        model = nn.Linear(2, 1)
        runner = OutOfMemoryRecovery(model, MicroBatching(grow_after=2), torch.device("cpu"), meeting)

        def attempt(shares: Sequence[Share]) -> None:
            tried.append([len(share.batch) for share in shares])
            for share in shares:
                if len(share.batch) > fits[number]:
                    raise torch.OutOfMemoryError("out")
                model(share.batch).mean().backward()

        try:
            for step in range(steps):
                runner.run(step, [torch.ones(8, 2)], attempt)
                model.zero_grad()
            found[number] = tried
        except MemoryExhaustedError as error:
            found[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_all_ranks_repeat_a_step_that_failed_on_one_of_them() -> None:
    tried = on_two_ranks((100, 4), 4)
    assert tried[0] == tried[1] == [[8], [4, 4], [4, 4], [8], [4, 4], [4, 4]]


def test_no_rank_is_left_waiting_when_one_cannot_go_on() -> None:
    errors = on_two_ranks((100, 0), 1)
    assert all(isinstance(error, MemoryExhaustedError) for error in errors)
    assert all("one row" in str(error) for error in errors)


def _recovering(ranks: Any, output: Path, settings: dict[str, Any]) -> Any:
    """Rank 1 runs out of memory twice, rank 0 never; nobody does where nothing recovers."""
    mine = {"inject": "oom@2,oom@5"} if ranks.rank == 1 and "oom_recovery" in settings else {}
    return trained_on(ranks, output, **settings, **mine)


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_makes_all_do_the_step_again(tmp_path: Path) -> None:
    """Uneven parts, a last batch that is smaller still; and the same as DDP where nobody fails."""
    settings = {"model_name": "regression", "batch_size": 13, "epochs": 2, "run": "group"}
    recovered = in_group(2, _recovering, tmp_path / "on", {**settings, "oom_recovery": "on"})
    plain = in_group(2, _recovering, tmp_path / "plain", settings)
    assert [rank["step"] for rank in recovered] == [rank["step"] for rank in plain]
    for name, value in recovered[0]["parameters"].items():
        assert np.array_equal(value, recovered[1]["parameters"][name])
        np.testing.assert_allclose(value, plain[0]["parameters"][name], rtol=1e-4, atol=1e-6)
    # Steps 2 and 5 were done twice, on both ranks; 7 rows in 4 and 3, later in 2 and 2 and 2 and 1.
    assert all(len(rank["seen"]) > len(plain[0]["seen"]) + 2 for rank in recovered)


def _failing(ranks: Any, output: Path, settings: dict[str, Any], inject: tuple[str | None, ...]) -> Any:
    """With the losses that this rank has recorded."""
    losses: list[float] = []

    def listen(run: ObservedRun) -> None:
        record = run.record

        def noted(**values: Any) -> None:
            losses.append(float(values["loss"]))
            record(**values)

        run.record = noted  # type: ignore[method-assign]

    outcome = trained_on(ranks, output, listen, **settings, inject=inject[ranks.rank])
    return {**outcome, "losses": losses}


@pytest.mark.slow
def test_when_one_of_two_ranks_runs_out_at_once_both_train_as_if_started_with_half_the_rows(
    tmp_path: Path,
) -> None:
    """Bit for bit: the losses of both ranks and the parameters; and neither waits for the other."""
    settings = {"model_name": "regression", "batch_size": 12, "epochs": 2, "run": "r", "oom_recovery": "on"}
    halved = in_group(2, _failing, tmp_path / "halved", settings, (None, "oom@0"))
    small = in_group(2, _failing, tmp_path / "small", {**settings, "micro_batch": 3}, (None, None))
    for failed, started in zip(halved, small, strict=True):
        assert isinstance(failed, dict) and isinstance(started, dict), (halved, small)
        assert failed["losses"] == started["losses"] and len(failed["losses"]) == failed["step"] > 8
        for name, value in failed["parameters"].items():
            assert np.array_equal(value, started["parameters"][name]), name
    # The first step's rows were seen whole, then in two halves; all others in halves.
    shapes = [[len(rows) for rows in rank["seen"][:5]] for rank in halved]
    assert shapes == [[6, 3, 3, 3, 3]] * 2


LIMITED = """
import resource, sys
import torch
from torch import nn
from obsinfra.optimization.micro_batching import MicroBatching
from obsinfra.optimization.oom_recovery import OutOfMemoryRecovery

model = nn.Sequential(nn.Linear(16, 4096), nn.GELU(), nn.Linear(4096, 1))
runner = OutOfMemoryRecovery(model, MicroBatching(), torch.device("cpu"))
batch = torch.ones(8192, 16)

def attempt(shares):
    for piece, weight, _ in shares:
        (model(piece).mean() * weight).backward()

attempt(MicroBatching(64).split([batch[:64]]))  # libraries and threads have what they need
model.zero_grad()
pages = int(open("/proc/self/statm").read().split()[0])
here = pages * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (here + 200 * 2**20, resource.RLIM_INFINITY))
runner.run(0, [batch], attempt)
print(runner.micro_batching.limit, float(model[0].weight.grad.norm()))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
model.zero_grad()
attempt(MicroBatching(1024).split([batch]))
print(float(model[0].weight.grad.norm()))
"""
"""A step that needs about 400 MB in a process that may have 200 MB more."""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit on address space")
def test_host_memory_that_really_runs_out(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (limit, norm), (expected,) = (line.split() for line in done.stdout.splitlines())
    assert int(limit) in (512, 1024, 2048, 4096)
    assert float(norm) == pytest.approx(float(expected), rel=1e-3)


def test_a_training_is_guarded_collects_between_steps_and_finds_its_leak(tmp_path: Path) -> None:
    """All that `MemoryOptimizer` does beside recovery, in the trainer, and nothing of it afterwards."""
    trainer = regression(
        tmp_path, inject="leak@0x40", batch_size=8, epochs=4, leak_check_steps=4, gc="boundary"
    )
    within: set[tuple[bool, bool]] = set()
    before_forward = trainer.faults.before_forward

    def look(step: int) -> None:
        guarded = any(thread.name == "obsinfra-memory-guard" for thread in threading.enumerate())
        within.add((guarded, gc.isenabled()))
        before_forward(step)

    trainer.faults.before_forward = look  # type: ignore[method-assign]
    trainer.fit()
    assert within == {(True, False)}
    assert gc.isenabled() and not any(t.name == "obsinfra-memory-guard" for t in threading.enumerate())
    (leak,) = (one for one in trainer.memory.growing if one.shape == (LEAKED_BYTES,))
    assert leak.grown == 16 and leak.bytes_per_step == pytest.approx(LEAKED_BYTES)
    assert any("Faults._leaked" in way for way in leak.held_by), leak.held_by


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_memory_that_really_runs_out() -> None:
    device = torch.device("cuda")
    torch.cuda.set_per_process_memory_fraction(0.05)
    try:
        model = nn.Sequential(nn.Linear(64, 8192), nn.GELU(), nn.Linear(8192, 1)).to(device)
        total = torch.cuda.get_device_properties(device).total_memory
        batch = torch.ones(int(0.1 * total / (8192 * 4 * 2)), 64)  # activations of twice the 5 % allowed
        runner = OutOfMemoryRecovery(model, MicroBatching(), device)

        def attempt(shares: Sequence[Share]) -> None:
            for piece, weight, _ in shares:
                (model(piece.to(device)).mean() * weight).backward()

        runner.run(0, [batch], attempt)
        assert runner.micro_batching.limit is not None and runner.micro_batching.limit < len(batch)
        assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
