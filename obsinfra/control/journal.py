"""The sidecar's durable memory in SQLite (WAL): each alert it heard of, each firing, each command it took on.

What the sidecar writes goes through one thread that commits many pieces of work at once; a piece is done when
its commit is on the disk. `obsinfra history` and tests read the same file.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from obsinfra.control.command import Ack, Command

T = TypeVar("T")

KEEP_SECONDS = 30 * 86_400.0
"""Settled entries older than this are removed at a start."""

MAX_BATCH = 256
"""Pieces of work in one commit."""

LOCK_SECONDS = 5.0
"""Waited for another process that holds the file's lock."""

_HELD_BACK = "decision IN ('cool_down', 'hourly_limit', 'dry_run', 'unknown_action')"
"""Of the alerts, those whose step was not taken; the same text makes the index serve the query."""

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS alerts (
    received_at REAL NOT NULL, name TEXT NOT NULL, run TEXT NOT NULL, severity TEXT NOT NULL,
    status TEXT NOT NULL, fingerprint TEXT NOT NULL, starts_at REAL NOT NULL, decision TEXT NOT NULL,
    action TEXT NOT NULL DEFAULT '');
CREATE INDEX IF NOT EXISTS alerts_by_time ON alerts (received_at);
CREATE INDEX IF NOT EXISTS alerts_by_run ON alerts (run, received_at);
CREATE INDEX IF NOT EXISTS alerts_held_back ON alerts (run, fingerprint, starts_at) WHERE {_HELD_BACK};
CREATE TABLE IF NOT EXISTS commands (
    id TEXT PRIMARY KEY, run TEXT NOT NULL, action TEXT NOT NULL, alert TEXT NOT NULL,
    starts_at REAL NOT NULL, received_at REAL NOT NULL, command TEXT NOT NULL,
    outcome TEXT, ack TEXT, settled_at REAL);
CREATE INDEX IF NOT EXISTS commands_waiting ON commands (received_at) WHERE outcome IS NULL;
CREATE INDEX IF NOT EXISTS commands_by_run ON commands (run, received_at);
CREATE INDEX IF NOT EXISTS commands_by_time ON commands (received_at);
CREATE INDEX IF NOT EXISTS commands_by_alert ON commands (run, alert, starts_at);
CREATE TABLE IF NOT EXISTS firings (
    run TEXT NOT NULL, fingerprint TEXT NOT NULL, starts_at REAL NOT NULL, name TEXT NOT NULL,
    severity TEXT NOT NULL, summary TEXT NOT NULL, label TEXT NOT NULL, taken INTEGER NOT NULL,
    next_at REAL, undo TEXT NOT NULL, resolved_at REAL, again INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (run, fingerprint, starts_at));
CREATE INDEX IF NOT EXISTS firings_due ON firings (next_at) WHERE next_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS firings_open ON firings (run) WHERE resolved_at IS NULL;
"""


@dataclass(frozen=True, slots=True)
class AlertEntry:
    """What was decided about one alert, when it was heard of or as it went on. Times are epoch seconds.

    Attributes:
        decision: one of `responder.ALERT_DECISIONS`.
        action: what was, or would have been, done; empty for nothing.
    """

    received_at: float
    name: str
    run: str
    severity: str
    status: str
    fingerprint: str
    starts_at: float
    decision: str
    action: str = ""


@dataclass(frozen=True, slots=True)
class CommandEntry:
    """A command with where it came from and what became of it. Times are epoch seconds.

    Attributes:
        alert: name of the alert; empty for a command that somebody gave through the sidecar.
        starts_at: when the alert began to fire, as Prometheus says.
        received_at: when the webhook brought it, or the step was due.
        outcome: final ack state, `undelivered`, `unacknowledged`, or None while it waits.
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


@dataclass(frozen=True, slots=True)
class Firing:
    """One alert that fires for one run, and how far the policy's steps have come. Times are epoch seconds.

    Attributes:
        run, fingerprint, starts_at: together its identity.
        label: its label `action`.
        taken: number of steps taken or held back.
        next_at: when the next one is due; None: there is none.
        undo: actions to be undone when it resolves, in the order they were taken.
        resolved_at: when that was heard; None while it fires.
        again: how often it fired again after its end, with the same start.
    """

    run: str
    fingerprint: str
    starts_at: float
    name: str
    severity: str
    summary: str
    label: str
    taken: int
    next_at: float | None
    undo: tuple[str, ...] = ()
    resolved_at: float | None = None
    again: int = 0


@dataclass(frozen=True, slots=True)
class ActionTaken:
    """What came of an action about an alert that fires, whichever of its firings asked. Times: epoch seconds.

    Attributes:
        outcome: as of `CommandEntry`; or the decision with which it was held back.
        received_at: when it was decided.
        settled_at: when the outcome was known; None while it is under way, or was held back.
        step: as of the final ack.
    """

    run: str
    alert: str
    action: str
    outcome: str | None
    received_at: float
    settled_at: float | None = None
    step: int | None = None


class Pages:
    """The journal inside one transaction; made by `Journal.submit`, valid for the call."""

    def __init__(self, cursor: sqlite3.Cursor) -> None:
        self._cursor = cursor

    def known(self, id: str) -> bool:
        """Whether a command of that id was taken on before."""
        return self._cursor.execute("SELECT 1 FROM commands WHERE id = ?", (id,)).fetchone() is not None

    def count(self, run: str, action: str, since: float, until: float) -> int:
        """Commands of this action for this run in that time that were done or may still be."""
        found = self._cursor.execute(
            "SELECT count(*) FROM commands WHERE run = ? AND received_at > ? AND received_at < ?"
            " AND action = ? AND (outcome IS NULL OR outcome = 'done')",
            (run, since, until, action),
        ).fetchone()
        return int(found[0])

    def add_alert(self, alert: AlertEntry) -> None:
        """Note what was decided."""
        self._cursor.execute(
            "INSERT INTO alerts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                alert.received_at,
                alert.name,
                alert.run,
                alert.severity,
                alert.status,
                alert.fingerprint,
                alert.starts_at,
                alert.decision,
                alert.action,
            ),
        )

    def add_command(self, entry: CommandEntry) -> bool:
        """Take a command on; False when its id is known already."""
        command = entry.command
        self._cursor.execute(
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
        return self._cursor.rowcount > 0

    def settle(self, id: str, outcome: str, ack: Ack | None) -> None:
        """A command came to its end."""
        self._cursor.execute(
            "UPDATE commands SET outcome = ?, ack = ?, settled_at = ? WHERE id = ?",
            (outcome, ack.to_json() if ack else None, time.time(), id),
        )

    def put(self, firing: Firing) -> None:
        """Keep a firing, in place of what was known of it."""
        values = asdict(firing) | {"undo": ",".join(firing.undo)}
        self._cursor.execute(
            "INSERT OR REPLACE INTO firings VALUES (:run, :fingerprint, :starts_at, :name, :severity,"
            " :summary, :label, :taken, :next_at, :undo, :resolved_at, :again)",
            values,
        )

    def firing(self, run: str, fingerprint: str, starts_at: float) -> Firing | None:
        """That firing, resolved or not."""
        found = _firings(
            self._cursor, "WHERE run = ? AND fingerprint = ? AND starts_at = ?", (run, fingerprint, starts_at)
        )
        return found[0] if found else None

    def open_firings(self, run: str | None = None) -> list[Firing]:
        """What fires, for that run or for any, oldest first."""
        where, values = ("AND run = ?", (run,)) if run is not None else ("", ())
        return _firings(self._cursor, f"WHERE resolved_at IS NULL {where} ORDER BY starts_at", values)

    def last_step_at(self, firing: Firing) -> float | None:
        """When the last step about that firing was taken or held back; None: that is not known any more."""
        found = self._cursor.execute(
            "SELECT max(received_at) FROM alerts WHERE run = ? AND fingerprint = ? AND starts_at = ?"
            " AND status = 'firing' AND action != '' AND decision NOT IN ('duplicate', 'again')",
            (firing.run, firing.fingerprint, firing.starts_at),
        ).fetchone()
        return None if found[0] is None else float(found[0])

    def runs_of(self, fingerprint: str, until: float) -> list[Firing]:
        """Open firings of that alert, in whichever run, that began at `until` or before."""
        return _firings(
            self._cursor,
            "WHERE resolved_at IS NULL AND fingerprint = ? AND starts_at <= ? ORDER BY run, starts_at",
            (fingerprint, until),
        )

    def postpone(self, until: float) -> None:
        """Let no step be due before `until`."""
        self._cursor.execute(
            "UPDATE firings SET next_at = max(next_at, ?) WHERE next_at IS NOT NULL", (until,)
        )


@dataclass(slots=True)
class _Work(Generic[T]):
    do: Callable[[Pages], T]
    then: Callable[[T], None] | None
    future: Future[T]


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
        self._database = _connect(path)
        try:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            _migrate(self._database)
            self._reader = _connect(path)
            self._reader.execute("PRAGMA query_only = ON")
        except BaseException:
            self._database.close()
            raise
        self._waiting: queue.SimpleQueue[_Work[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    # ---- writing -------------------------------------------------------------------------------------

    def submit(self, do: Callable[[Pages], T], then: Callable[[T], None] | None = None) -> Future[T]:
        """Have `do` called inside a transaction, whole or not at all.

        Args:
            do: writes; called once, or twice when the first attempt to commit it among others fails.
            then: called with its result after the commit, before the future is done.

        Returns:
            Its result, once that is on the disk; or what it raised, or the `sqlite3.Error` of the commit.
        """
        work = _Work(do, then, Future())
        work.future.set_running_or_notify_cancel()  # who no longer waits for it does not undo it
        with self._lock:
            if self._closed:
                work.future.set_exception(sqlite3.ProgrammingError("the journal is closed"))
                return work.future
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="obsinfra-journal", daemon=True)
                self._thread.start()
            self._waiting.put(work)
        return work.future

    def add(self, alerts: Sequence[AlertEntry], commands: Sequence[CommandEntry]) -> list[CommandEntry]:
        """Keep these durably, all or nothing; returns the commands that were not known before.

        Raises:
            sqlite3.Error: the disk failed; nothing was kept.
        """

        def write(pages: Pages) -> list[CommandEntry]:
            for alert in alerts:
                pages.add_alert(alert)
            return [entry for entry in commands if pages.add_command(entry)]

        return self.submit(write).result()

    def settle(self, id: str, outcome: str, ack: Ack | None) -> None:
        """A command came to its end.

        Raises:
            sqlite3.Error: the disk failed.
        """
        self.submit(lambda pages: pages.settle(id, outcome, ack)).result()

    def prune(self) -> None:
        """Remove what is older than `KEEP_SECONDS`; commands that wait stay."""
        old = time.time() - KEEP_SECONDS

        def delete(pages: Pages) -> None:
            pages._cursor.execute("DELETE FROM alerts WHERE received_at < ?", (old,))
            pages._cursor.execute(
                "DELETE FROM commands WHERE received_at < ? AND outcome IS NOT NULL", (old,)
            )
            pages._cursor.execute("DELETE FROM firings WHERE starts_at < ?", (old,))

        self.submit(delete).result()

    # ---- reading -------------------------------------------------------------------------------------

    def waiting(self) -> list[CommandEntry]:
        """Commands without an outcome, oldest first."""
        return self._commands("WHERE outcome IS NULL ORDER BY received_at, rowid")

    def commands(
        self, limit: int = 100, *, run: str | None = None, since: float = 0.0, until: float | None = None
    ) -> list[CommandEntry]:
        """The newest commands, newest first; of one run, or of a time from `since` to `until`."""
        where, values = _where(run, since, until)
        return self._commands(f"{where} ORDER BY received_at DESC, rowid DESC LIMIT ?", (*values, limit))

    def command(self, id: str) -> CommandEntry | None:
        """The command of that id."""
        found = self._commands("WHERE id = ?", (id,))
        return found[0] if found else None

    def alerts(
        self, limit: int = 100, *, run: str | None = None, since: float = 0.0, until: float | None = None
    ) -> list[AlertEntry]:
        """The newest alerts, newest first; of one run, or of a time from `since` to `until`."""
        where, values = _where(run, since, until)
        columns = ", ".join(field.name for field in fields(AlertEntry))
        rows = self._read(
            f"SELECT {columns} FROM alerts {where} ORDER BY received_at DESC, rowid DESC LIMIT ?",
            (*values, limit),
        )
        return [AlertEntry(*row) for row in rows]

    def firing(self, run: str | None = None) -> list[Firing]:
        """What fires, oldest first."""
        where, values = ("AND run = ?", (run,)) if run is not None else ("", ())
        with self._lock, contextlib.closing(self._reader.cursor()) as cursor:
            return _firings(cursor, f"WHERE resolved_at IS NULL {where} ORDER BY starts_at", values)

    def actions_taken(self, limit: int) -> list[ActionTaken]:
        """The last of each action about each alert that fires; of so many firings, the newest.

        What was held back counts where no firing of the alert had it done.
        """
        newest = (
            "(SELECT DISTINCT run, name, starts_at{} FROM firings WHERE resolved_at IS NULL"
            " ORDER BY starts_at DESC LIMIT ?) AS open"
        )
        held_back = self._read(
            "SELECT alerts.run, alerts.name, alerts.action, alerts.decision, max(alerts.received_at)"
            f" FROM {newest.format(', fingerprint')} JOIN alerts INDEXED BY alerts_held_back ON"
            " alerts.run = open.run AND alerts.fingerprint = open.fingerprint"
            " AND alerts.starts_at = open.starts_at"
            f" WHERE {_HELD_BACK}"
            " GROUP BY alerts.run, alerts.name, alerts.action",
            (limit,),
        )
        taken = {(row[0], row[1], row[2]): ActionTaken(*row) for row in held_back}
        told = self._read(
            "SELECT commands.run, alert, action, outcome, max(received_at), settled_at, ack"
            f" FROM {newest.format('')} JOIN commands INDEXED BY commands_by_alert ON"
            " commands.run = open.run AND alert = open.name AND commands.starts_at = open.starts_at"
            " GROUP BY commands.run, alert, action",
            (limit,),
        )
        for run, alert, action, outcome, received_at, settled_at, ack in told:
            step = json.loads(ack).get("step") if ack else None
            taken[run, alert, action] = ActionTaken(
                run, alert, action, outcome, received_at, settled_at, step if isinstance(step, int) else None
            )
        return list(taken.values())

    def due(self, now: float) -> list[Firing]:
        """Firings whose next step is due, the longest first."""
        with self._lock, contextlib.closing(self._reader.cursor()) as cursor:
            return _firings(cursor, "WHERE next_at <= ? AND resolved_at IS NULL ORDER BY next_at", (now,))

    def close(self) -> None:
        """Write what was submitted, then close the file."""
        with self._lock:
            already, self._closed = self._closed, True
            thread = self._thread
        if already:
            return
        if thread is not None:
            self._waiting.put(None)
            thread.join()
        with self._lock:
            self._reader.close()
            self._database.close()

    # ---- the writing thread ----------------------------------------------------------------------------

    def _write(self) -> None:
        ended = False
        while not ended:
            batch: list[_Work[Any]] = []
            work = self._waiting.get()
            while True:
                if work is None:
                    ended = True
                    break
                batch.append(work)
                if len(batch) >= MAX_BATCH or self._waiting.empty():
                    break
                work = self._waiting.get()
            if not self._commit(batch) and len(batch) > 1:
                for work in batch:  # one that fails must not fail the others
                    self._commit([work])

    def _commit(self, batch: list[_Work[Any]]) -> bool:
        """Write these in one transaction; False when that failed, and each shall be tried alone."""
        results: list[Any] = []
        error: BaseException | None = None
        with contextlib.closing(self._database.cursor()) as cursor:
            try:
                cursor.execute("BEGIN IMMEDIATE")
                try:
                    pages = Pages(cursor)
                    for work in batch:
                        results.append(work.do(pages))
                    cursor.execute("COMMIT")
                except BaseException:
                    if self._database.in_transaction:
                        cursor.execute("ROLLBACK")
                    raise
            except BaseException as raised:
                error = raised
        if error is not None:
            if len(batch) > 1 and not isinstance(error, sqlite3.OperationalError):
                return False
            for work in batch:
                work.future.set_exception(error)
            return True
        for work, result in zip(batch, results, strict=True):
            try:
                if work.then is not None:
                    work.then(result)
            except BaseException as raised:
                work.future.set_exception(raised)
            else:
                work.future.set_result(result)
        return True

    def _read(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        with self._lock, contextlib.closing(self._reader.cursor()) as cursor:
            return cursor.execute(query, values).fetchall()

    def _commands(self, where: str, values: tuple[Any, ...] = ()) -> list[CommandEntry]:
        rows = self._read(
            "SELECT command, alert, starts_at, received_at, outcome, ack, settled_at FROM commands " + where,
            values,
        )
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


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=LOCK_SECONDS)


def _migrate(database: sqlite3.Connection) -> None:
    """Bring the file, which an older version may have made, to the present tables."""
    columns = [row[1] for row in database.execute("PRAGMA table_info(alerts)")]
    if columns and "action" not in columns:
        database.execute("ALTER TABLE alerts ADD COLUMN action TEXT NOT NULL DEFAULT ''")
    columns = [row[1] for row in database.execute("PRAGMA table_info(firings)")]
    if columns and "again" not in columns:
        database.execute("ALTER TABLE firings ADD COLUMN again INTEGER NOT NULL DEFAULT 0")
    database.executescript(_SCHEMA)


def _where(run: str | None, since: float, until: float | None) -> tuple[str, tuple[Any, ...]]:
    parts: list[str] = ["received_at >= ?"]
    values: list[Any] = [since]
    if run is not None:
        parts.append("run = ?")
        values.append(run)
    if until is not None:
        parts.append("received_at <= ?")
        values.append(until)
    return "WHERE " + " AND ".join(parts), tuple(values)


def _firings(cursor: sqlite3.Cursor, where: str, values: tuple[Any, ...]) -> list[Firing]:
    names = [field.name for field in fields(Firing)]
    rows = cursor.execute(f"SELECT {', '.join(names)} FROM firings {where}", values).fetchall()
    found = [dict(zip(names, row, strict=True)) for row in rows]
    return [Firing(**values | {"undo": tuple(filter(None, values["undo"].split(",")))}) for values in found]
