"""The sidecar's durable memory: every alert it heard of and every command it took on, in SQLite (WAL).

A command is in here before the webhook is answered, so a killed sidecar delivers it after its restart.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from obsinfra.control.command import Ack, Command

KEEP_SECONDS = 30 * 86_400.0
"""Settled entries older than this are removed at a start."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS alerts (
    received_at REAL NOT NULL, name TEXT NOT NULL, run TEXT NOT NULL, severity TEXT NOT NULL,
    status TEXT NOT NULL, fingerprint TEXT NOT NULL, starts_at REAL NOT NULL, decision TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS alerts_by_time ON alerts (received_at);
CREATE TABLE IF NOT EXISTS commands (
    id TEXT PRIMARY KEY, run TEXT NOT NULL, action TEXT NOT NULL, alert TEXT NOT NULL,
    starts_at REAL NOT NULL, received_at REAL NOT NULL, command TEXT NOT NULL,
    outcome TEXT, ack TEXT, settled_at REAL);
CREATE INDEX IF NOT EXISTS commands_waiting ON commands (received_at) WHERE outcome IS NULL;
"""


@dataclass(frozen=True, slots=True)
class AlertEntry:
    """One alert of one notification, and what was decided. Times are epoch seconds."""

    received_at: float
    name: str
    run: str
    severity: str
    status: str
    fingerprint: str
    starts_at: float
    decision: str


@dataclass(frozen=True, slots=True)
class CommandEntry:
    """A command with where it came from and what became of it. Times are epoch seconds.

    Attributes:
        alert: name of the alert.
        starts_at: when the alert began to fire, as Prometheus says.
        received_at: when the webhook brought it.
        outcome: final ack state, `undelivered`, `dry_run`, or None while it waits.
        ack: the trainer's final ack.
        settled_at: when the outcome was known.
    """

    command: Command
    alert: str
    starts_at: float
    received_at: float
    outcome: str | None = None
    ack: dict[str, Any] | None = None
    settled_at: float | None = None


class Journal:
    """One SQLite file; every method may be called from any thread.

    Args:
        path: the file, made 0600 if missing; its folder exists.

    Raises:
        sqlite3.Error: it is no database, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600, exist_ok=True)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=5)
        with self._lock:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.executescript(_SCHEMA)
            old = time.time() - KEEP_SECONDS
            self._database.execute("DELETE FROM alerts WHERE received_at < ?", (old,))
            self._database.execute(
                "DELETE FROM commands WHERE received_at < ? AND outcome IS NOT NULL", (old,)
            )

    def known(self, id: str) -> bool:
        """Whether a command of that id was taken on before."""
        with self._lock, closing(self._database.cursor()) as cursor:
            return cursor.execute("SELECT 1 FROM commands WHERE id = ?", (id,)).fetchone() is not None

    def add(self, alerts: Sequence[AlertEntry], commands: Sequence[CommandEntry]) -> list[CommandEntry]:
        """Keep a notification durably, all of it or nothing.

        Returns:
            The commands that were not known before.

        Raises:
            sqlite3.Error: the disk failed; nothing was kept.
        """
        fresh = []
        with self._lock, closing(self._database.cursor()) as cursor:
            cursor.execute("BEGIN IMMEDIATE")
            try:
                cursor.executemany(
                    "INSERT INTO alerts VALUES (:received_at, :name, :run, :severity, :status, :fingerprint,"
                    " :starts_at, :decision)",
                    [asdict(alert) for alert in alerts],
                )
                for entry in commands:
                    command = entry.command
                    cursor.execute(
                        "INSERT OR IGNORE INTO commands VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL)",
                        (
                            command.id,
                            command.run,
                            command.action,
                            entry.alert,
                            entry.starts_at,
                            entry.received_at,
                            command.to_json(),
                            entry.outcome,
                        ),
                    )
                    if cursor.rowcount:
                        fresh.append(entry)
                cursor.execute("COMMIT")
            except BaseException:
                cursor.execute("ROLLBACK")
                raise
        return fresh

    def settle(self, id: str, outcome: str, ack: Ack | None) -> None:
        """A command came to its end.

        Raises:
            sqlite3.Error: the disk failed.
        """
        with self._lock, closing(self._database.cursor()) as cursor:
            cursor.execute(
                "UPDATE commands SET outcome = ?, ack = ?, settled_at = ? WHERE id = ?",
                (outcome, ack.to_json() if ack else None, time.time(), id),
            )

    def waiting(self) -> list[CommandEntry]:
        """Commands without an outcome, oldest first."""
        return self._commands("WHERE outcome IS NULL ORDER BY received_at")

    def commands(self, limit: int = 100) -> list[CommandEntry]:
        """The newest commands, newest first."""
        return self._commands("ORDER BY received_at DESC LIMIT ?", (limit,))

    def alerts(self, limit: int = 100) -> list[AlertEntry]:
        """The newest alerts, newest first."""
        with self._lock, closing(self._database.cursor()) as cursor:
            rows = cursor.execute(
                "SELECT received_at, name, run, severity, status, fingerprint, starts_at, decision"
                " FROM alerts ORDER BY received_at DESC, rowid DESC LIMIT ?",
                (limit,),
            ).fetchall()
        return [AlertEntry(*row) for row in rows]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def _commands(self, where: str, values: tuple[Any, ...] = ()) -> list[CommandEntry]:
        with self._lock, closing(self._database.cursor()) as cursor:
            rows = cursor.execute(
                "SELECT command, alert, starts_at, received_at, outcome, ack, settled_at FROM commands "
                + where,
                values,
            ).fetchall()
        return [
            CommandEntry(
                Command(**json.loads(command)),
                alert,
                starts_at,
                received_at,
                outcome,
                json.loads(ack) if ack else None,
                settled_at,
            )
            for command, alert, starts_at, received_at, outcome, ack, settled_at in rows
        ]
