"""Throughput in a report of a loop that never told its samples."""

from __future__ import annotations

from pathlib import Path

import torch

from obsinfra import observe
from obsinfra.reporting.compose import _mean_rate
from obsinfra.reporting.gather import gather


def test_samples_that_nobody_told_are_unknown_and_not_0(tmp_path: Path) -> None:
    rates = {}
    for name, told in (("silent", {}), ("told", {"samples": 8})):
        model = torch.nn.Linear(2, 1)
        with observe(model, output_dir=tmp_path, run=name, metrics_port=0) as run:
            for _ in run.steps(range(3)):
                run.record(loss=1.0, **told)
        rates[name] = _mean_rate(gather(run.folder, None))
    assert rates["silent"] is None and rates["told"] is not None and rates["told"] > 0
