"""Structured logs: JSON lines in four files of the run folder, and something readable on a terminal.

`training` is what the model does, `performance` how fast, `system` what happened around it. `errors` gets
what is logged to it, and a copy of every warning or worse of the other three. Before `configure_logging`
(a library use) events go to the standard library's loggers `obsinfra.<channel>`: the host program decides;
`log_beside` writes the files of each run all the same.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, MutableMapping
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO, cast

import structlog

from obsinfra.errors import ConfigError
from obsinfra.monitoring.log_lines import console_line, json_line, plain_line
from obsinfra.monitoring.rotating_file import RotatingFile
from obsinfra.run.files import of_rank

CHANNELS = ("training", "performance", "errors", "system")
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
MAX_BYTES = 20 * 2**20
BACKUPS = 3
"""Each file is rotated at `MAX_BYTES` and keeps this many old ones."""

CHATTY = ("opentelemetry", "urllib3", "asyncio", "torch", "filelock", "httpx", "httpcore", "fsspec")
"""Libraries whose records below a warning are about themselves."""

_METHOD_LEVELS = {**LEVELS, "warn": 30, "exception": 40, "fatal": 50}
_LEVEL_NAMES = {number: name for name, number in LEVELS.items()}
_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


def get_logger(channel: str) -> Any:
    """A structlog logger of `training`, `performance`, `errors` or `system`; works before configuration too.

    Its methods are `debug`, `info`, `warning`, `error`, `exception` and `critical`, each taking an event name
    and values. `exc_info` is an exception, or True for the one being handled. `terminal=False` keeps an event
    off the terminal. Nothing it does raises. One that is made by a part of a run, while that is built, writes
    to that run's files; any other to those of every run there is.

    Raises:
        ValueError: there is no such channel.
    """
    if channel not in CHANNELS:
        raise ValueError(f"no log channel {channel!r}: expected one of {', '.join(CHANNELS)}")
    # Configured per logger: structlog's global configuration belongs to the program we live in.
    return structlog.wrap_logger(
        None,
        processors=[_route],
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
        context_class=dict,
        channel=channel,
        _of_run=_under_construction.get(),
    )


def bind(**values: Any) -> None:
    """Add values (`step`, `trace_id`) to every event of this thread or task from now on; None removes."""
    gone = [key for key, value in values.items() if value is None]
    structlog.contextvars.unbind_contextvars(*gone)
    structlog.contextvars.bind_contextvars(**{key: values[key] for key in values if key not in gone})


def log_errors() -> int:
    """Events this process could not write (disk full, terminal gone); counted, never raised."""
    return _log_errors


def configure_logging(
    log_dir: Path | None,
    *,
    level: str = "info",
    run: str = "",
    model: str = "",
    rank: int = 0,
    terminal: bool = True,
    terminal_level: str = "warning",
    max_bytes: int = MAX_BYTES,
    backups: int = BACKUPS,
) -> None:
    """Send this package's events and the standard library's records to the run's files and the terminal.

    May be called again; what was configured before ends. Standard-library records go to the channel they name
    (`obsinfra.training`), all others to `system`.

    Args:
        log_dir: folder of the four files, made when missing; None writes none. Ranks above 0 write files of
            their own beside those of rank 0: `training-rank1.jsonl`.
        level: least level written: debug, info, warning or error.
        run, model, rank: put into every event.
        terminal: also show events on stderr, coloured on a tty, plain one-liners elsewhere.
        terminal_level: least level shown there, never below `level`.
        max_bytes, backups: each file is rotated at this size, so many old ones are kept.

    Raises:
        ConfigError: unknown level, or a file cannot be opened.
    """
    global _sink
    least, shown = _level(level), max(_level(level), _level(terminal_level))
    files = _open_files(log_dir, rank, max_bytes, backups) if log_dir is not None else {}
    shutdown_logging()
    _sink = _Sink(files, _identity(run, model, rank), least, shown if terminal else None)


class RunLog:
    """The log of one run among those of this process; made by `log_beside`.

    Args:
        sink: its files; None where `configure_logging` decides where events go.
        context: asked for values (`step`, `trace_id`) at every event, so that the step path binds none; one
            of None is left out.
    """

    def __init__(self, sink: _Sink | None, context: Callable[[], Mapping[str, Any]]) -> None:
        self.sink = sink
        self.context = context

    def built(self) -> None:
        """The run's parts are there: loggers that are made from now on are not known to be its own."""
        if _under_construction.get() is self:
            _under_construction.set(None)

    def logger(self, channel: str) -> Any:
        """What `get_logger` gives, for this run alone."""
        return get_logger(channel).bind(_of_run=self)

    def set_level(self, level: str) -> str | None:
        """Change the least level written, until the run ends or `configure_logging` is called.

        Returns:
            The level until now; None where nothing is written.

        Raises:
            ConfigError: unknown level.
        """
        least, sink = _level(level), _sink or self.sink
        return sink.set_least(least) if sink is not None else None

    def end(self) -> None:
        """Close its files. May be called twice."""
        self.built()
        if self in _run_logs:
            _run_logs.remove(self)
        self.close_files()

    def close_files(self) -> None:
        """Write no more; what is logged goes to the standard library's loggers alone."""
        sink, self.sink = self.sink, None
        if sink is not None:
            sink.close()


def log_beside(
    log_dir: Path,
    *,
    level: str = "info",
    run: str = "",
    model: str = "",
    rank: int = 0,
    context: Callable[[], Mapping[str, Any]] = dict,
) -> RunLog:
    """In a program that configures its own logging: write this package's events to the run's files, too.

    They go to the standard library's loggers as before. Opens no files after `configure_logging`. Several
    runs of one process each have their own: an event that belongs to none of them is in the files of all.

    Args:
        log_dir, level, run, model, rank: as for `configure_logging`.
        context: as for `RunLog`.

    Returns:
        The run's log. Loggers that this thread makes until `built` is called write to it alone.

    Raises:
        ConfigError: unknown level, or a file cannot be opened.
    """
    least = _level(level)
    sink = None
    if _sink is None:
        files = _open_files(log_dir, rank, MAX_BYTES, BACKUPS)
        sink = _Sink(files, _identity(run, model, rank), least, None, beside=True)
    made = RunLog(sink, context)
    _run_logs.append(made)
    _under_construction.set(made)
    return made


def _identity(run: str, model: str, rank: int) -> dict[str, Any]:
    return {key: value for key, value in (("run", run), ("model", model)) if value} | {"rank": rank}


def _open_files(log_dir: Path, rank: int, max_bytes: int, backups: int) -> dict[str, RotatingFile]:
    files: dict[str, RotatingFile] = {}
    try:
        log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for channel in CHANNELS:
            path = of_rank(log_dir / f"{channel}.jsonl", rank)
            files[channel] = RotatingFile(path, max_bytes=max_bytes, backups=backups)
            files[channel].open()
    except OSError as error:
        for file in files.values():
            file.close()
        raise ConfigError(
            f"cannot write logs to {log_dir}: {error.strerror or error}",
            "a writable folder",
            "choose another --output-dir",
        ) from error
    return files


def shutdown_logging() -> None:
    """Close all log files and leave the standard library as it was. May be called twice."""
    global _sink
    sink, _sink = _sink, None
    if sink is not None:
        sink.close()
    for run_log in _run_logs:
        run_log.close_files()


class _Sink:
    """The configured files and terminal. `write` never raises.

    Args:
        beside: the standard library's loggers are somebody else's: nothing is taken from them, and they get
            our events as if nothing were configured.
    """

    def __init__(
        self,
        files: Mapping[str, RotatingFile],
        identity: Mapping[str, Any],
        least: int,
        terminal_least: int | None,
        *,
        beside: bool = False,
    ) -> None:
        self.least = least
        self.beside = beside
        self._files = files
        self._identity = identity
        self._terminal_least = terminal_least
        self.lock = threading.Lock()
        self._handler = _FromStandardLibrary(self)
        root = logging.getLogger()
        self._root_level = root.level
        if not beside:
            root.addHandler(self._handler)
            root.setLevel(min(root.level, least))  # never hides a record from a handler of somebody else

    def set_least(self, least: int) -> str:
        before, self.least = self.least, least
        if not self.beside:
            self._handler.setLevel(least)
            logging.getLogger().setLevel(min(self._root_level, least))
        return _level_name(before)

    def close(self) -> None:
        if not self.beside:
            root = logging.getLogger()
            root.removeHandler(self._handler)
            root.setLevel(self._root_level)
        with self.lock:
            for file in self._files.values():
                file.close()

    def write(
        self,
        level: int,
        channel: str,
        event: Mapping[str, Any],
        exc_info: ExcInfo | None,
        of_run: RunLog | None = None,
    ) -> None:
        """One event to its channel's file, a copy of bad news to `errors`, and to the terminal."""
        if level < self.least:
            return
        try:
            values = dict(event)
            on_terminal = bool(values.pop("terminal", True))
            now = datetime.now(UTC)
            document = {
                "timestamp": now.isoformat(timespec="microseconds").replace("+00:00", "Z"),
                "level": _level_name(level),
                "event": values.pop("event", ""),
                "channel": channel,
                **self._identity,
                **_present_context(of_run),
                **structlog.contextvars.get_contextvars(),
                **values,
            }
            if self._files:
                line = json_line(document, exc_info)
                self._append(channel, line)
                if level >= logging.WARNING and channel != "errors":
                    self._append("errors", line)
            if on_terminal and self._terminal_least is not None and level >= self._terminal_least:
                self._show(document, exc_info)
        except Exception:  # an object that cannot even be shown as text, say; training goes on
            _count_error()  # in a metric and an alert: a log that fails cannot log it

    def _append(self, channel: str, line: bytes) -> None:
        try:
            with self.lock:
                self._files[channel].append(line)
        except OSError:
            _count_error()

    def _show(self, document: Mapping[str, Any], exc_info: ExcInfo | None) -> None:
        # Looked up anew each time: a progress display puts itself in stderr's place while it is shown.
        stream: TextIO | None = sys.stderr
        if stream is None:
            return
        hidden = {"channel", "trace_id", *self._identity}
        shown = {key: value for key, value in document.items() if key not in hidden}
        try:
            if stream.isatty():
                text = console_line(shown, exc_info, colors="NO_COLOR" not in os.environ)
            else:
                text = plain_line(shown, exc_info)
            stream.write(text + "\n")
            stream.flush()
        except (OSError, ValueError):  # ValueError: the stream was closed
            _count_error()


class _FromStandardLibrary(logging.Handler):
    """Brings records of the `logging` module into the files."""

    def __init__(self, sink: _Sink) -> None:
        super().__init__(sink.least)
        self._sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING and record.name.split(".", 1)[0] in CHATTY:
            return
        try:
            message = record.getMessage()
        except Exception:  # arguments that do not fit the format, or fail to be shown: somebody else's code
            _count_error()
            message = record.msg if isinstance(record.msg, str) else type(record.msg).__name__
        event = {
            "event": message,
            "logger": record.name,
            **{key: value for key, value in vars(record).items() if key not in _RECORD_FIELDS},
        }
        channel = record.name.removeprefix("obsinfra.")
        exc_info = record.exc_info if record.exc_info and record.exc_info[0] else None
        self._sink.write(record.levelno, channel if channel in CHANNELS else "system", event, exc_info)


def _route(logger: Any, method: str, event: MutableMapping[str, Any]) -> NoReturn:
    """The one processor of our loggers: hands the event on and tells structlog that it is dealt with."""
    level = _METHOD_LEVELS.get(method, logging.INFO)
    values = dict(event)
    channel = str(values.pop("channel"))
    exc_info = _exc_info(values.pop("exc_info", None))
    of_run: RunLog | None = values.pop("_of_run")
    if (sink := _sink) is not None:
        sink.write(level, channel, values, exc_info, of_run)
    else:
        for run_log in [of_run] if of_run is not None else list(_run_logs):
            if (sink := run_log.sink) is not None:
                sink.write(level, channel, values, exc_info, run_log)
        values.pop("terminal", None)
        name = str(values.pop("event", ""))
        host = logging.getLogger(f"obsinfra.{channel}")
        if host.isEnabledFor(level):
            text = plain_line({"event": name, **structlog.contextvars.get_contextvars(), **values}, None)
            host.log(level, "%s", text, exc_info=exc_info)
    raise structlog.DropEvent


def _exc_info(given: Any) -> ExcInfo | None:
    """What `exc_info` means: an exception, a triple, or anything true for the one being handled."""
    if isinstance(given, BaseException):
        return type(given), given, given.__traceback__
    if isinstance(given, tuple):
        return given if len(given) == 3 and given[0] is not None else None
    if given:
        present = sys.exc_info()
        return cast(ExcInfo, present) if present[0] is not None else None
    return None


def _present_context(of_run: RunLog | None) -> dict[str, Any]:
    """What the run says of itself now; of an event that names no run, the newest one."""
    run_log = of_run or (_run_logs[-1] if _run_logs else None)
    values = run_log.context() if run_log in _run_logs and run_log is not None else {}
    return {key: value for key, value in values.items() if value is not None}


def _level(name: str) -> int:
    try:
        return LEVELS[name.lower()]
    except KeyError:
        raise ConfigError(
            f"log level {name!r}", "one of " + ", ".join(LEVELS), "correct --log-level"
        ) from None


def _level_name(level: int) -> str:
    """The name of `level`, or of the nearest one below it: libraries invent levels of their own."""
    return _LEVEL_NAMES[max((number for number in _LEVEL_NAMES if number <= level), default=10)]


def _count_error() -> None:
    global _log_errors
    _log_errors += 1


def _after_fork_in_child() -> None:
    """A data-loader worker logs on, but the lock it inherited may be held by a thread it does not have."""
    for sink in (_sink, *(run_log.sink for run_log in _run_logs)):
        if sink is not None:
            sink.lock = threading.Lock()


_sink: _Sink | None = None
_run_logs: list[RunLog] = []
_under_construction: ContextVar[RunLog | None] = ContextVar("obsinfra_run_under_construction", default=None)
_log_errors = 0
os.register_at_fork(after_in_child=_after_fork_in_child)
