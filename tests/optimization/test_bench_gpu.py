"""benchmarks/bench_gpu.py on the CPU: every part measures what it names, or says that it does not apply."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from obsinfra.workloads.byte_gpt import SIZES

BENCH = Path(__file__).parents[2] / "benchmarks" / "bench_gpu.py"
PARTS = "precision,checkpointing,attention,layout,threads,syncs,instrumentation,snapshots"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    small = ["--device=cpu", "--rounds=1", "--steps=1", "--batch-size=2", "--context=32", "--no-compile"]
    return subprocess.run(
        [sys.executable, str(BENCH), *small, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
def test_every_part_has_its_figures() -> None:
    done = bench("--parts", PARTS)
    assert done.returncode == 0, done.stderr
    parts = dict(re.findall(r"## (\w+)\n(.*?)(?=\n## |\Z)", done.stdout, flags=re.S))
    assert list(parts) == PARTS.split(",")
    head = done.stdout.partition("\n##")[0]
    assert "torch" in head and "batch 2 × 32 bytes" in head
    times = dict(re.findall(r"^(fp32|mixed) +([\d.]+) ms/step", parts["precision"], flags=re.M))
    assert set(times) == {"fp32", "mixed"} and all(float(ms) > 0 for ms in times.values())
    assert "no peak for a cpu" in parts["precision"] and "MFU of 124m ≥ 45 %" in parts["precision"]
    saved = re.findall(r"([\d.]+) MB +([\d.]+)% saved", parts["checkpointing"])
    none, half, whole, budget = (float(share) for _, share in saved)
    assert none == 0 < half < whole and budget >= 50
    assert f"of {SIZES['nano'].layers}" in parts["checkpointing"]
    assert re.search(r"flash +[\d.]+ ms", parts["attention"])
    assert "measured: " in parts["layout"] and "chosen: " in parts["threads"]
    assert parts["syncs"].strip() == "does not apply: nothing waits for a cpu"
    assert re.search(r"instrumentation: -?[\d.]+ µs a step, -?[\d.]+% of a step", parts["instrumentation"])
    assert re.search(r"state: [\d.]+ MB; checkpoints: 1\n", parts["snapshots"])
    assert re.search(r"step alone [\d.]+ ms, while one is written [\d.]+ ms", parts["snapshots"])
