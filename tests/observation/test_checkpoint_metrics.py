"""No entry of the catalogue about checkpoints is dead: a run with all kinds of trouble feeds every one."""

from __future__ import annotations

import contextlib
import os
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import nn
from waiting import wait_for

from obsinfra.catalog import metrics as catalog
from obsinfra.observation import ObservedRun, observe

PROMISED = 123.0
LAG = "obsinfra_checkpoint_remote_lag_seconds"

EXPECTED: dict[str, Callable[[float], bool]] = {
    "obsinfra_checkpoints_total": lambda value: value == 3,
    "obsinfra_checkpoint_failures_total": lambda value: value == 1,
    "obsinfra_checkpoint_writer_restarts_total": lambda value: value == 1,
    "obsinfra_checkpoint_bytes": lambda value: 0 < value < 10_000_000,
    "obsinfra_checkpoint_written_bytes_total": lambda value: 0 < value < 10_000_000,
    "obsinfra_checkpoint_duration_seconds_count": lambda value: value == 3,
    "obsinfra_checkpoint_age_seconds": lambda value: 0 <= value < 120,
    "obsinfra_checkpoint_promise_seconds": lambda value: value == PROMISED,
    "obsinfra_checkpoint_step": lambda value: value == 5,
    "obsinfra_checkpoint_remote_pending": lambda value: value == 0,
    "obsinfra_checkpoint_remote_lag_seconds": lambda value: value == 0,
    "obsinfra_checkpoint_remote_failures_total": lambda value: 1 <= value < 100,
    "obsinfra_checkpoint_remote_copied_bytes_total": lambda value: 0 < value < 10_000_000,
    "obsinfra_checkpoint_remote_restarts_total": lambda value: value == 1,
    "obsinfra_snapshot_seconds_count": lambda value: value >= 4,
}
"""What each should be after the run below, summed over its own labels."""


def of_checkpoints() -> set[str]:
    """Sample names of the catalogue's metrics about checkpoints."""
    found = [m for m in catalog.METRICS if m.name.startswith(("obsinfra_checkpoint", "obsinfra_snapshot"))]
    return {m.sample_name + ("_count" if m.kind == "histogram" else "") for m in found}


def scraped(run: ObservedRun) -> dict[str, float]:
    """Values as a Prometheus gets them, by sample name, summed over labels."""
    with urllib.request.urlopen(f"{run.monitor.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


def test_every_metric_about_checkpoints_is_fed(tmp_path: Path) -> None:
    assert set(EXPECTED) == of_checkpoints(), "every metric has an expectation here"
    place = tmp_path / "copies" / "alpha"
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with observe(
        model, optimizer, run="alpha", output_dir=tmp_path / "runs", metrics_port=0,
        checkpoint_seconds=PROMISED, checkpoint_remote=f"file://{tmp_path}/copies",
    ) as run:  # fmt: skip
        objects = run.folder.checkpoints / "objects"
        for number, batch in enumerate(run.steps(list(torch.ones(5, 2, 4)))):
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            run.record(loss=loss)
            if number == 0:
                assert run.checkpoint() is not None
                wait_for(lambda: list(place.glob("manifests/*")), "the remote has it")
            elif number == 1:  # the disk fails
                objects.rename(objects.with_name("aside"))
                objects.write_text("no folder")
                assert run.checkpoint() is None
                objects.unlink()
                objects.with_name("aside").rename(objects)
            elif number == 2:  # the writer is killed
                os.kill(child(run, "obsinfra.backup.writer"), signal.SIGKILL)
                assert run.checkpoint() is not None
            elif number == 3:  # the remote is down, then its mirror is killed
                wait_for(lambda: len(list(place.glob("manifests/*"))) == 2, "the remote has the second")
                wait_for(
                    lambda: not list((run.folder.checkpoints / "outbox").rglob("*.json")),
                    "and the mirror has noted it",
                )
                place.rename(place.with_name("aside"))
                place.write_text("down")
            elif number == 4:
                assert run.checkpoint("emergency") is not None
                wait_for(lambda: scraped(run)[LAG] > 0.5, "the lag grows")
                during = scraped(run)
                assert during["obsinfra_checkpoint_remote_pending"] == 1
                assert during["obsinfra_checkpoint_remote_failures_total"] >= 1
                os.kill(child(run, "obsinfra.backup.mirror_process"), signal.SIGKILL)
                place.unlink()
                place.with_name("aside").rename(place)
                wait_for(lambda: len(list(place.glob("manifests/*"))) == 3, "the remote has the third")
                wait_for(lambda: scraped(run)[LAG] == 0, "and the trainer knows")
                values = scraped(run)
    wrong = {
        name: values.get(name) for name, sensible in EXPECTED.items() if not sensible(values.get(name, -1))
    }
    assert wrong == {}


def test_without_a_remote_there_are_no_series_about_one(tmp_path: Path) -> None:
    with observe(nn.Linear(2, 1), output_dir=tmp_path, metrics_port=0) as run:
        assert not [name for name in scraped(run) if "remote" in name]


def child(run: ObservedRun, module: str) -> int:
    """The process of this trainer that runs `module` for its folder."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # an earlier test's, that has ended
            words = process.cmdline()
            if module in words and str(run.folder.checkpoints) in words[-1]:
                return process.pid
    raise AssertionError(f"no {module}")
