"""benchmarks/bench_training.py on two gloo ranks: bare DDP and the trainer take turns at one training."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "benchmarks" / "bench_training.py"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_two_ranks_are_measured_against_bare_ddp_at_the_same_training() -> None:
    done = bench("--ranks", "2", "--models", "mlp", "--rounds", "2", "--seconds", "0.01")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("2 gloo ranks; ")
    apart = re.search(r"relative to bare: kept (\S+), obsinfra (\S+)\n", done.stdout)
    assert apart and max(abs(float(one)) for one in apart.groups()) < 1e-6, done.stdout
    figures = r" +([\d.]+) +(-?[\d.]+) +-?[\d.]+ … -?[\d.]+ +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +(\d+)$"
    ours = re.search("^obsinfra" + figures, done.stdout, flags=re.M)
    assert ours, done.stdout
    step, over, _, processor, _, faults, memory = map(float, ours.groups())
    assert step > 0 and processor > 0 and over < step and faults >= 0 and memory > 100
    assert re.search(r"^obsinfra is (within|OVER) the goal: at most 1.01 × bare$", done.stdout, flags=re.M)


def test_a_number_of_ranks_that_is_none_is_refused() -> None:
    done = bench("--ranks", "0")
    assert done.returncode == 2 and "--ranks 0: expected a number of ranks from 1 on" in done.stderr
