"""What a person sees while training: a live line on a terminal, one plain line per interval elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from obsinfra.monitoring.logging_config import get_logger
from obsinfra.observation.observed_run import ObservedRun

if TYPE_CHECKING:
    from obsinfra.training.trainer import Trainer

REFRESH_SECONDS = 0.25

WIDE = 130
"""Columns of a terminal that have room for the run's name and a bar in front of the numbers."""


def progress_of(run: ObservedRun, trainer: Trainer) -> Progress | NoProgress:
    """What is shown of a run: one line, by its rank 0."""
    return Progress(run, trainer) if run.ranks.first else NoProgress()


def live_line(console: Console) -> RichProgress:
    """Steps done of all and the task's field `numbers`, of which nothing is cut: it is wrapped."""
    columns: list[ProgressColumn] = [
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=False)),
    ]
    if console.width >= WIDE:
        columns = [TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), *columns]
    return RichProgress(*columns, console=console, refresh_per_second=4, transient=False)


class NoProgress:
    """Of ranks above 0 their metrics and logs tell."""

    def __enter__(self) -> NoProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def step(self) -> None:
        pass

    def epoch(self) -> None:
        pass


class Progress:
    """Shows loss, learning rate, gradient norm, throughput, ETA and firing alerts.

    Args:
        run: where the numbers come from.
        trainer: where the totals come from.
    """

    def __init__(self, run: ObservedRun, trainer: Trainer) -> None:
        self._run = run
        self._trainer = trainer
        self._terminal = sys.stderr.isatty()
        self._every = REFRESH_SECONDS if self._terminal else trainer.settings.log_every_seconds
        self._due = 0.0 if self._terminal else time.monotonic() + self._every
        self._log = get_logger("performance")
        self._file_due = time.monotonic() + trainer.settings.log_every_seconds
        self._bar: RichProgress | None = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._terminal:
            self._bar = live_line(Console(stderr=True))
            total = self._trainer.epochs * len(self._trainer.batches)
            self._task = self._bar.add_task(self._run.folder.id, total=total, numbers="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._show()
            self._bar.stop()

    def step(self) -> None:
        """A step was done; shows something when it is time to."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + self._every
        self._show()

    def epoch(self) -> None:
        """An epoch was done."""
        if self._terminal:
            self._show()

    def _show(self) -> None:
        now = time.monotonic()
        summary = self._run.monitor.get_performance_summary()
        if now >= self._file_due:
            self._file_due = now + self._trainer.settings.log_every_seconds
            self._log.info("performance", terminal=False, **summary)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._run.step, numbers=self._numbers(summary))
        else:
            line = f"epoch {self._run.position.epoch} step {self._run.step} {self._numbers(summary)}"
            print(line, file=sys.stderr, flush=True)

    def _numbers(self, summary: dict[str, Any]) -> str:
        parts = []
        if summary["loss"] is not None:
            parts.append(f"loss {summary['loss']:.4f}")
        parts.append(f"lr {self._trainer.schedule.learning_rate:.2e}")
        if summary["gradient_norm"] is not None:
            parts.append(f"grad {summary['gradient_norm']:.3g}")
        parts.append(f"{summary['samples_per_second']:.0f} samples/s")
        metric = self._trainer.workload.defaults.metric
        if metric in self._run.monitor.validation:
            parts.append(f"val {metric} {self._run.monitor.validation[metric]:.4f}")
        eta = self._run.monitor.live(-1)["progress"]["eta_seconds"] if self._bar is not None else None
        if eta is not None:
            parts.append(f"ETA {int(eta // 60)}:{int(eta % 60):02d}")
        firing = [status.alert.name for status in self._run.monitor.alerts if status.state == "firing"]
        if firing:
            parts.append("ALERT " + ", ".join(firing))
        return "  ".join(parts)
