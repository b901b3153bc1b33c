"""A run of eight steps whose end depends on all it went through: fixed data, dropout, AdamW."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from obsinfra.observation import ObservedRun, observe


def trained(output: Path, until: int, **how: object) -> ObservedRun:
    """A run of eight steps over fixed data with dropout, up to step `until`."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = list(torch.arange(64.0).reshape(8, 2, 4) / 64)
    run = observe(model, optimizer, model_name="M", output_dir=output, disable_monitoring=True, **how)
    for _ in run.epochs(1):
        for batch in run.steps(data):
            loss = model(batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.record(loss=loss)
            if run.step + 1 == until:
                run.request_stop("far enough")
    run.checkpoint("final")
    run.finish()
    return run


def state_of(run: ObservedRun) -> dict[str, object]:
    assert run.keeper.backup is not None
    return dict(run.keeper.backup.load().state)
