"""A training on scikit-learn's digits that runs until it is stopped, watched by the real TrainingMonitor."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from obsinfra.monitoring.training_monitor import TrainingMonitor

BATCH = 32
CHECKPOINT_EVERY = 100
HISTORY_POINTS = 40


class MonitoredDigits:
    """Trains on its own thread; `url` is the page of the monitor's own server.

    Args:
        folder: where checkpoints are written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._monitor = TrainingMonitor(
            "digits",
            run="digits-monitored",
            metrics_port=0,
            sample_seconds=0.05,
            trace_every=0,
            disk_path=folder,
            epochs=10_000,
        )
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._monitor.start_monitoring()
        self._thread = threading.Thread(target=self._run, name="monitored-digits", daemon=True)
        self._thread.start()
        self._wait_for_history()

    @property
    def url(self) -> str:
        assert self._monitor.url is not None
        return self._monitor.url.removesuffix("metrics").rstrip("/") + "/"

    def stop(self) -> None:
        """End the training and the monitor; raises what the training raised."""
        self._stop.set()
        self._thread.join(timeout=30)
        self._monitor.stop_monitoring()
        if self._error is not None:
            raise self._error

    def _wait_for_history(self) -> None:
        deadline = time.monotonic() + 60
        while len(self._monitor.history.since(0)["series"]["time"]) < HISTORY_POINTS:
            if self._error is not None:
                raise self._error
            assert time.monotonic() < deadline, "the monitor's history does not grow"
            self._stop.wait(0.05)

    def _run(self) -> None:
        try:
            self._train()
        except BaseException as error:
            self._error = error

    def _train(self) -> None:
        monitor = self._monitor
        images, labels = load_digits(return_X_y=True)
        inputs, targets = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
        train_x, train_y, held_x, held_y = inputs[:1500], targets[:1500], inputs[1500:], targets[1500:]
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        monitor.steps_per_epoch = len(train_x) // BATCH
        monitor.set_state("running")
        step = epoch = 0
        while True:
            monitor.begin_epoch(epoch)
            for rows in torch.randperm(len(train_x)).split(BATCH)[: monitor.steps_per_epoch]:
                with monitor.phase("data"):
                    x, y = train_x[rows], train_y[rows]
                    # Leaves the other core of a small machine to the browser that looks at this.
                    if self._stop.wait(0.004):
                        return
                with monitor.step():
                    with monitor.phase("forward"):
                        loss = functional.cross_entropy(model(x), y)
                    with monitor.phase("backward"):
                        optimizer.zero_grad()
                        loss.backward()
                    with monitor.phase("optimizer"):
                        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                        optimizer.step()
                    monitor.record(loss=loss, grad_norm=norm, samples=len(rows), learning_rate=0.05)
                step += 1
                if step % CHECKPOINT_EVERY == 0:
                    with monitor.phase("checkpoint"):
                        self._checkpoint(model, step)
            with monitor.phase("validation"), torch.no_grad():
                held = model(held_x)
                accuracy = (held.argmax(1) == held_y).float().mean().item()
            monitor.log_validation(
                {"loss": functional.cross_entropy(held, held_y).item(), "accuracy": accuracy}
            )
            monitor.end_epoch()
            epoch += 1

    def _checkpoint(self, model: torch.nn.Module, step: int) -> None:
        requested = time.time()
        target = self._folder / "weights.pt"
        torch.save(model.state_dict(), target)
        size = target.stat().st_size
        self._monitor.checkpoint_committed(
            kind="regular",
            step=step,
            requested_at=requested,
            bytes_total=size,
            bytes_written=size,
            path=str(target),
        )
