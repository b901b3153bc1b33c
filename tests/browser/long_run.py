"""A training of very many steps under the real TrainingMonitor: in seconds what a page meets after hours."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch.nn import functional
from waiting import wait_for

from obsinfra.monitoring.history import MAX_POINTS
from obsinfra.monitoring.training_monitor import TrainingMonitor

STEPS = 10_000
SAMPLE_SECONDS = 0.005
"""The usual second would fill the history in half an hour."""

PAUSE_SECONDS = 0.02
VALIDATE_EVERY = 500


class LongRun:
    """A regression with a small network on its own thread, as fast as it goes for `STEPS`, then slower until
    it is stopped, so that the browser gets a processor.

    Args:
        folder: where the history file is written.
    """

    def __init__(self, folder: Path) -> None:
        self._monitor = TrainingMonitor(
            "regression",
            run="long-run",
            metrics_port=0,
            sample_seconds=SAMPLE_SECONDS,
            trace_every=0,
            disk_path=folder,
            history_file=folder / "history.jsonl",
        )
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._points = 0
        self._monitor.start_monitoring()
        self._thread = threading.Thread(target=self._run, name="long-run", daemon=True)
        self._thread.start()
        wait_for(self._is_long, f"{STEPS} steps and more points than are kept", 180)

    @property
    def url(self) -> str:
        assert self._monitor.url is not None
        return f"{self._monitor.url}/"

    @property
    def steps(self) -> int:
        return self._monitor.recorder.step

    def stop(self) -> None:
        """End the training and the monitor; raises what the training raised."""
        self._stop.set()
        self._thread.join(timeout=30)
        self._monitor.stop_monitoring()
        if self._error is not None:
            raise self._error

    def _is_long(self) -> bool:
        if self._error is not None:
            raise self._error
        self._points = self._monitor.history.since(self._points)["next"]
        return self.steps >= STEPS and self._points > MAX_POINTS

    def _run(self) -> None:
        try:
            self._train()
        except BaseException as error:
            self._error = error

    def _train(self) -> None:
        monitor = self._monitor
        generator = torch.Generator().manual_seed(0)
        inputs = torch.rand(256, 4, generator=generator)
        targets = inputs.square().sum(1, keepdim=True)
        model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        monitor.set_state("running")
        monitor.begin_epoch(0)
        while not self._stop.wait(PAUSE_SECONDS if self.steps >= STEPS else 0.0):
            with monitor.step():
                rows = torch.randint(256, (8,), generator=generator)
                with monitor.phase("forward"):
                    loss = functional.mse_loss(model(inputs[rows]), targets[rows])
                with monitor.phase("backward"):
                    optimizer.zero_grad()
                    loss.backward()
                with monitor.phase("optimizer"):
                    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                    optimizer.step()
                monitor.record(loss=loss, grad_norm=norm, samples=8, learning_rate=0.01)
            if self.steps % VALIDATE_EVERY == 0:
                with monitor.phase("validation"), torch.no_grad():
                    monitor.log_validation({"loss": functional.mse_loss(model(inputs), targets).item()})
