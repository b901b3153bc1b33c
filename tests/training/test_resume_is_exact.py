"""A run that was interrupted and resumed equals one that was not, bit for bit, for every workload."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import Training, assert_same, end
from waiting import wait_for

from obsinfra.backup.checkpointer import wait_for_heir

pytestmark = pytest.mark.slow

DIGITS = ("--model-name=probes:digits", "--epochs=2")
CASES: dict[str, tuple[str, ...]] = {
    "tactical_mappo": ("--model-name=probes:tactical_mappo", "--epochs=2", "--validate-every=1"),
    "byte_gpt": ("--model-name=probes:byte_gpt", "--epochs=2", "--batch-size=8"),
    "digits": DIGITS,
    "accumulate": (*DIGITS, "--accumulate=3"),
    "workers": (*DIGITS, "--num-workers=2"),
    "plateau": ("--model-name=probes:digits", "--epochs=8", "--schedule=plateau", "--learning-rate=1e-5"),
    "fp16": (*DIGITS, "--precision=fp16"),
}

Reference = Callable[[str], Training]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 20 kB of text: an epoch of byte_gpt in a second."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"{i} squared is {i * i}, and cubed {i**3}.\n" for i in range(600)))
    return path


@pytest.fixture(scope="module")
def flags_of(corpus: Path) -> Callable[[str], tuple[str, ...]]:
    def flags(case: str) -> tuple[str, ...]:
        return (*CASES[case], f"--data-path={corpus}") if case == "byte_gpt" else CASES[case]

    return flags


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory, flags_of: Callable[[str], tuple[str, ...]]
) -> Reference:
    """The uninterrupted run of a case, trained once."""
    done: dict[str, Training] = {}

    def trained(case: str) -> Training:
        if case not in done:
            training = Training(tmp_path_factory.mktemp("reference"), "whole", flags_of(case))
            assert training.run().returncode == 0
            done[case] = training
        return done[case]

    return trained


@pytest.mark.parametrize("case", ["tactical_mappo", "byte_gpt", "digits"])
def test_max_steps_then_a_signal_then_a_command_change_nothing(
    case: str, reference: Reference, flags_of: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    """Three interruptions and three resumes: in the first epoch, in the same again, and in the second."""
    whole, run = reference(case), Training(tmp_path / "runs", "cut", flags_of(case))
    steps = len(whole.losses())
    second_epoch = steps // 2 + 3

    assert run.run("--max-steps=4").returncode == 0
    assert run.losses() == whole.losses()[:4]
    assert run.state() == ("stopped", "--max-steps 4 reached")

    assert run.run("--max-steps=0", resume="cut", at="3:SIGTERM").returncode == 128 + 15
    assert run.losses() == whole.losses()[:7]
    (emergency,) = run.checkpoints("emergency")
    assert (emergency.step, emergency.reason) == (7, "signal SIGTERM")

    assert run.run(resume="auto", at=f"{second_epoch - 7}:stop").returncode == 0
    assert run.losses() == whole.losses()[:second_epoch]
    assert run.state() == ("stopped", "command stop (cli: by hand)")

    last = run.run(resume=str(run.folder.root))
    assert last.returncode == 0 and f"(step {second_epoch})" in last.stderr
    assert run.losses() == whole.losses()
    assert run.state() == ("finished", None)
    assert run.folder.read_info().restarts == 3
    assert_same(run.newest(), whole.newest())


@pytest.mark.parametrize("case", ["tactical_mappo", "byte_gpt", "digits", "workers"])
def test_a_rollback_is_as_exact_as_a_resume(
    case: str, reference: Reference, flags_of: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    """In the same process, with loaders, compiled model and all: within an epoch, and into an earlier one."""
    whole = reference(case)
    steps = len(whole.losses())
    for name, checkpoint, back in (("within", 3, 7), ("before", 5, steps // 2 + 3)):
        run = Training(tmp_path / "runs", name, (*flags_of(case), "--checkpoint-epochs=0"))
        done = run.run(at=f"{checkpoint}:checkpoint,{back}:rollback")
        assert done.returncode == 0, done.stderr
        assert run.losses() == whole.losses()[:back] + whole.losses()[checkpoint:]
        assert_same(run.newest(), whole.newest())


@pytest.mark.parametrize(("case", "at"), [("accumulate", 10), ("workers", 30), ("plateau", 100), ("fp16", 9)])
def test_a_signal_changes_nothing(
    case: str, at: int, reference: Reference, flags_of: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    whole, run = reference(case), Training(tmp_path / "runs", "cut", flags_of(case))
    assert run.run(at=f"{at}:SIGTERM").returncode == 128 + 15
    done = len(run.losses())
    assert at <= done < len(whole.losses())
    assert run.run(resume="cut").returncode == 0
    assert run.losses() == whole.losses()
    assert_same(run.newest(), whole.newest())


def test_sigkill_costs_the_steps_since_the_last_snapshot_and_nothing_else(
    reference: Reference, tmp_path: Path
) -> None:
    whole, run = reference("digits"), Training(tmp_path / "runs", "cut", DIGITS)
    # A checkpoint at every boundary, as an interval that has always passed makes it.
    assert run.run("--checkpoint-seconds=0.000001", at="30:SIGKILL").returncode == -9
    assert run.folder.present_state(run.folder.read_info()) == "dead"
    assert wait_for_heir(run.folder.checkpoints, 60)  # the writer commits what the trainer copied last
    saved = run.newest().info.step
    assert 0 < saved <= 30
    before = run.losses()
    assert run.run("--checkpoint-seconds=300", resume="auto").returncode == 0
    again = run.losses()[len(before) :]
    assert before == whole.losses()[:30] and again == whole.losses()[saved:]
    assert_same(run.newest(), whole.newest())


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(
    reference: Reference, tmp_path: Path
) -> None:
    same, other = (Training(tmp_path / name, "run", DIGITS) for name in ("same", "other"))
    assert same.run("--deterministic").returncode == 0
    assert other.run("--seed=1").returncode == 0
    assert same.losses() == reference("digits").losses()
    assert_same(same.newest(), reference("digits").newest())
    assert len(other.losses()) == len(same.losses())
    assert set(other.losses()).isdisjoint(same.losses())


def test_a_group_signal_with_loader_workers_changes_nothing(reference: Reference, tmp_path: Path) -> None:
    """Ctrl-C reaches the workers too; the batches they prepare are still waited for or loaded again."""
    run = Training(tmp_path / "runs", "cut", CASES["workers"])
    process = run.start(at="12:wait")
    wait_for(run.mark.exists, "the twelfth batch")
    os.killpg(process.pid, signal.SIGINT)
    run.mark.unlink()
    code, stderr = end(process)
    assert code == 128 + 2, stderr
    assert "Traceback" not in stderr
    assert run.run(resume="cut").returncode == 0
    assert run.losses() == reference("workers").losses()
    assert_same(run.newest(), reference("workers").newest())
