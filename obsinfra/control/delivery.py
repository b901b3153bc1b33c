"""Delivering journalled commands to their runs, and writing down what became of them.

A few daemon threads of the sidecar. What is not settled when the process ends stays in the journal and is
delivered after the next start; its id keeps it from taking effect twice.
"""

from __future__ import annotations

import queue
import random
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

from obsinfra.control.client import NoAnswerError, NotUnderstoodError, send_command
from obsinfra.control.command import FINAL_STATES, Ack
from obsinfra.control.journal import CommandEntry, Journal
from obsinfra.control.ledger import AckLedger
from obsinfra.errors import ConfigError, ObsinfraError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.run.folder import ENDED_STATES, RunFolder

WORKERS = 64
"""A hanging run holds one for each of its commands until that expires; other runs must find one free."""

LATEST_ACK_SECONDS = 10.0
"""Waited beyond a command's expiry for its last ack."""

FIRST_RETRY_SECONDS, LATEST_RETRY_SECONDS = 0.2, 5.0
"""Between two attempts to hand a command over; doubled each time, and half as much more or less by chance."""

OUTCOMES = (*sorted(FINAL_STATES), "undelivered", "unacknowledged")
"""The trainer's final ack; or `undelivered`: the run ended or could not be reached before the command
expired; or `unacknowledged`: handed over, and no word in time that it was begun or ended."""


class Deliverer:
    """Sends commands, each until its final ack or its expiry; what was begun, as long as its trainer lives.

    Args:
        output_dir: the folder of runs.
        journal: where outcomes go.
        settled: called with the entry, the outcome and the ack, on a worker's thread.
    """

    def __init__(
        self, output_dir: Path, journal: Journal, settled: Callable[[CommandEntry, str, Ack | None], None]
    ) -> None:
        self._output_dir = output_dir
        self._journal = journal
        self._settled = settled
        self._waiting: queue.SimpleQueue[CommandEntry | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._lines: dict[str, deque[CommandEntry]] = {}
        self._stopping = threading.Event()
        self._log = get_logger("system")
        for number in range(WORKERS):
            threading.Thread(target=self._work, name=f"obsinfra-delivery-{number}", daemon=True).start()

    def deliver(self, entry: CommandEntry) -> None:
        """Begin to deliver; returns at once. A run gets its commands in this order, whatever delays one."""
        run = entry.command.run
        with self._lock:
            if run in self._lines:
                self._lines[run].append(entry)
                return
            self._lines[run] = deque()
        self._waiting.put(entry)

    def _next(self, run: str) -> None:
        """The run has the command whose turn it was, or will never have it."""
        with self._lock:
            following = self._lines[run].popleft() if self._lines[run] else None
            if following is None:
                del self._lines[run]
        if following is not None:
            self._waiting.put(following)

    def stop(self) -> None:
        """Begin no further delivery; workers end, each after the one under way."""
        self._stopping.set()
        for _ in range(WORKERS):
            self._waiting.put(None)

    def _work(self) -> None:
        while (entry := self._waiting.get()) is not None and not self._stopping.is_set():
            turn = _Once(partial(self._next, entry.command.run))
            try:
                self._deliver(entry, turn)
            except Exception as error:  # a worker that ends would leave later commands undelivered
                self._log.error("delivery_error", id=entry.command.id, exc_info=error)
            finally:
                turn()

    def _deliver(self, entry: CommandEntry, turn: Callable[[], None]) -> None:
        command = entry.command
        folder = RunFolder(self._output_dir / command.run)
        ack: Ack | None = None
        outcome = ""
        pause = FIRST_RETRY_SECONDS
        while not outcome:
            try:
                ack = send_command(
                    folder,
                    command,
                    timeout_seconds=max(0.0, command.expires_at - time.time()) + LATEST_ACK_SECONDS,
                    taken=turn,
                )
                outcome = ack.state
            except NoAnswerError as error:
                if _under_way(folder, command.id):
                    if self._stopping.is_set():
                        return
                    continue
                outcome = "unacknowledged"
                self._log.error("unacknowledged", id=command.id, label_run=command.run, error=str(error))
            except NotUnderstoodError as error:
                outcome = "rejected"
                self._log.error("not_understood", id=command.id, label_run=command.run, error=str(error))
            except (ObsinfraError, OSError) as error:
                if _over(folder) or time.time() >= command.expires_at:
                    outcome = "undelivered"
                    self._log.error("undelivered", id=command.id, label_run=command.run, error=str(error))
                elif self._stopping.wait(pause * random.uniform(0.5, 1.5)):
                    return
                pause = min(2 * pause, LATEST_RETRY_SECONDS)
        self._settled(entry, outcome, ack)
        self._write_down(command.id, outcome, ack)

    def _write_down(self, id: str, outcome: str, ack: Ack | None) -> None:
        """Journal the outcome, as soon as the disk takes it; after a restart the run tells it again."""
        told = False
        while True:
            try:
                self._journal.settle(id, outcome, ack)
                return
            except sqlite3.Error as error:
                if not told:
                    self._log.error("journal_not_written", id=id, error=str(error))
                told = True
            if self._stopping.wait(LATEST_RETRY_SECONDS):
                return


class _Once:
    """Calls `do` at the first call, and never again."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do, self._done = do, False

    def __call__(self) -> None:
        if not self._done:
            self._done = True
            self._do()


def _under_way(folder: RunFolder, id: str) -> bool:
    """Whether a trainer that lives is at it: it may take longer than the command was valid."""
    ack = AckLedger(folder.acks).last(id)
    try:
        return ack is not None and ack.state == "running" and folder.lives(folder.read_info())
    except ConfigError:
        return False


def _over(folder: RunFolder) -> bool:
    """Whether trying again is no use: the run ended, or is gone."""
    if not folder.run_json.exists():
        return True
    try:
        return folder.read_info().state in ENDED_STATES
    except ConfigError:  # unreadable for the moment, perhaps
        return False
