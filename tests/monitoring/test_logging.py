"""Events reach the right files as strict JSON and a terminal as text; logging never raises into training."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from obsinfra.errors import ConfigError
from obsinfra.monitoring.log_lines import LINE_MAX_BYTES, json_line, plain_line
from obsinfra.monitoring.logging_config import (
    CHANNELS,
    bind,
    configure_logging,
    get_logger,
    log_beside,
    log_errors,
    shutdown_logging,
)


@pytest.fixture(autouse=True)
def _left_as_found() -> Iterator[None]:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    yield
    shutdown_logging()
    structlog.contextvars.clear_contextvars()
    assert (root.level, list(root.handlers)) == before


def refuse_constants(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def read(folder: Path, channel: str) -> list[dict[str, Any]]:
    text = (folder / f"{channel}.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse_constants) for line in text.splitlines()]


def into(folder: Path, **more: Any) -> None:
    configure_logging(folder, run="r1", model="digits", **{"terminal": False, **more})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_events_go_to_the_file_of_their_channel_with_who_and_when(tmp_path: Path) -> None:
    into(tmp_path, rank=0)
    get_logger("training").info("validation", accuracy=0.97)
    get_logger("performance").info("performance", samples_per_second=12.5)
    get_logger("system").info("run_ended")
    (event,) = read(tmp_path, "training")
    timestamp = event.pop("timestamp")
    assert timestamp.endswith("Z") and timestamp[10] == "T"
    assert event == {
        "level": "info",
        "event": "validation",
        "channel": "training",
        "run": "r1",
        "model": "digits",
        "rank": 0,
        "accuracy": 0.97,
    }
    assert [line["event"] for line in read(tmp_path, "performance")] == ["performance"]
    assert [line["event"] for line in read(tmp_path, "system")] == ["run_ended"]
    assert read(tmp_path, "errors") == []
    assert all((tmp_path / f"{name}.jsonl").stat().st_mode & 0o777 == 0o600 for name in CHANNELS)


def test_errors_gets_bad_news_of_every_channel_once(tmp_path: Path) -> None:
    """A warning stands in its own file and in errors; what is logged to errors stands there alone."""
    into(tmp_path)
    get_logger("training").warning("spike")
    get_logger("system").error("disk")
    get_logger("errors").info("note")
    get_logger("errors").error("failed")
    assert [line["event"] for line in read(tmp_path, "errors")] == ["spike", "disk", "note", "failed"]
    assert [line["channel"] for line in read(tmp_path, "errors")] == [
        "training",
        "system",
        "errors",
        "errors",
    ]
    assert [line["event"] for line in read(tmp_path, "training")] == ["spike"]


@pytest.mark.parametrize(("level", "written"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_events_below_the_level_are_left_out(tmp_path: Path, level: str, written: int) -> None:
    into(tmp_path, level=level)
    log = get_logger("training")
    for method in ("debug", "info", "warning", "error"):
        getattr(log, method)("x")
    assert len(read(tmp_path, "training")) == written


def test_step_and_trace_are_there_when_bound(tmp_path: Path) -> None:
    into(tmp_path)
    log = get_logger("training")
    bind(step=3, trace_id="a" * 32)
    log.info("bound")
    bind(step=None, trace_id=None)
    log.info("unbound")
    bound, unbound = read(tmp_path, "training")
    assert (bound["step"], bound["trace_id"]) == (3, "a" * 32)
    assert "step" not in unbound and "trace_id" not in unbound


def test_the_present_step_is_asked_for_only_when_something_is_logged(tmp_path: Path) -> None:
    into(tmp_path)
    steps = iter([5, 6])
    run = log_beside(tmp_path, context=lambda: {"step": next(steps), "trace_id": None})
    log = get_logger("training")
    log.info("a")
    log.debug("not written, so not asked")
    log.info("b", step=99)
    log.info("c")
    assert [line["step"] for line in read(tmp_path, "training")] == [5, 99]
    assert log_errors() > 0  # the source failed at c: counted, and the loop went on
    run.end()


def test_an_exception_is_a_structured_traceback(tmp_path: Path) -> None:
    into(tmp_path)

    def fail() -> None:
        secret = "s3cret"  # noqa: F841
        try:
            {}["inner"]
        except KeyError as error:
            raise ValueError("bad batch") from error

    try:
        fail()
    except ValueError as error:
        get_logger("errors").error("training_failed", exc_info=error)
        get_logger("errors").exception("again")
    for line in read(tmp_path, "errors"):
        outer, inner = line["exception"]
        assert (outer["exc_type"], outer["exc_value"]) == ("ValueError", "bad batch")
        assert [frame["name"] for frame in outer["frames"]][-1] == "fail"
        assert inner["exc_type"] == "KeyError"
    assert "s3cret" not in (tmp_path / "errors.jsonl").read_text(), "values of variables are not logged"


def test_the_standard_librarys_records_are_there_too(tmp_path: Path) -> None:
    into(tmp_path)
    logging.getLogger("their.code").info("epoch %d", 3, extra={"fold": 2})
    logging.getLogger("obsinfra.training").info("ours")
    logging.getLogger("urllib3.connectionpool").info("chatter")
    try:
        raise OSError("gone")
    except OSError:
        logging.getLogger("their.code").exception("failed")
    info, failed = read(tmp_path, "system")
    assert (info["event"], info["logger"], info["fold"]) == ("epoch 3", "their.code", 2)
    assert failed["exception"][0]["exc_type"] == "OSError"
    assert [line["event"] for line in read(tmp_path, "training")] == ["ours"]
    assert [line["event"] for line in read(tmp_path, "errors")] == ["failed"]


def test_a_record_that_cannot_be_formatted_is_counted_and_written_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into(tmp_path)
    before = log_errors()
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", logging.getLogger().handlers[-1:])  # not pytest's
        logging.getLogger("their.code").warning("%d items", "three")
    assert log_errors() == before + 1
    (line,) = read(tmp_path, "system")
    assert (line["event"], line["logger"], line["level"]) == ("%d items", "their.code", "warning")


def test_off_a_terminal_an_event_is_one_plain_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    into(tmp_path, terminal=True, terminal_level="info")
    log = get_logger("training")
    log.info("validation", accuracy=0.5, note="two words")
    log.info("performance", terminal=False)
    log.error("failed", exc_info=ValueError("bad\nbatch"))
    log.warning("\x1b[2J injected")
    first, second, third = stream.getvalue().splitlines()
    assert first[8:] == " info    validation accuracy=0.5 note='two words'"
    assert second.endswith(r"failed exception='ValueError: bad\nbatch'")
    assert "\x1b" not in third
    assert [line["event"] for line in read(tmp_path, "training")][1] == "performance"
    assert "terminal" not in read(tmp_path, "training")[1]


def test_on_a_terminal_it_is_coloured_and_shows_tracebacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv("NO_COLOR", raising=False)
    into(tmp_path, terminal=True)
    get_logger("training").info("quiet by default")
    try:
        raise ValueError("bad batch")
    except ValueError:
        get_logger("training").exception("failed", batch=3)
    text = stream.getvalue()
    assert "quiet" not in text
    assert "\x1b[" in text and "failed" in text and "batch" in text
    assert "Traceback (most recent call last)" in text and "ValueError: bad batch" in text
    assert "digits" not in text, "who logs is known at a terminal"


def test_no_color_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("NO_COLOR", "1")
    into(tmp_path, terminal=True)
    get_logger("training").warning("plain", text="\x1b[31mred")
    assert "plain" in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_a_closed_terminal_is_counted_and_files_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    into(tmp_path, terminal=True)
    before = log_errors()
    get_logger("training").warning("x")
    assert log_errors() == before + 1
    assert len(read(tmp_path, "training")) == 1


def test_a_full_disk_is_counted_and_never_raised(tmp_path: Path) -> None:
    (tmp_path / "training.jsonl").symlink_to("/dev/full")
    into(tmp_path)
    before = log_errors()
    for _ in range(3):
        get_logger("training").info("x")
    logging.getLogger("obsinfra.training").info("x")
    assert log_errors() == before + 4
    get_logger("training").warning("copied")
    assert [line["event"] for line in read(tmp_path, "errors")] == ["copied"]


def test_after_a_torn_line_the_next_stands_on_its_own(tmp_path: Path) -> None:
    """The disk was full in the middle of a line, here by a limit on the file's size; then there was space."""
    code = f"""
import resource, signal
from pathlib import Path
from obsinfra.monitoring.logging_config import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
configure_logging(Path({str(tmp_path)!r}), run="r1", terminal=False)
log = get_logger("training")
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
for number in range(5):
    log.info("x", number=number)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.info("space again")
print(log_errors())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    lines = (tmp_path / "training.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["number"] == 0
    with pytest.raises(ValueError):
        json.loads(lines[-2])
    assert json.loads(lines[-1])["event"] == "space again"
    whole = sum(1 for line in lines if line.endswith("}"))
    assert int(done.stdout) == 6 - whole


def test_files_are_rotated_and_bounded(tmp_path: Path) -> None:
    into(tmp_path, max_bytes=2_000, backups=2)
    for number in range(100):
        get_logger("training").info("x", number=number)
    files = [tmp_path / f"training.jsonl{suffix}" for suffix in (".2", ".1", "")]
    assert all(0 < file.stat().st_size <= 2_000 for file in files)
    assert not (tmp_path / "training.jsonl.3").exists()
    kept = [json.loads(line)["number"] for file in files for line in file.read_text().splitlines()]
    assert kept == list(range(kept[0], 100)) and len(kept) > 20


def test_a_restart_appends(tmp_path: Path) -> None:
    for number in range(2):
        into(tmp_path)
        get_logger("training").info("x", number=number)
        shutdown_logging()
    assert [line["number"] for line in read(tmp_path, "training")] == [0, 1]


def test_other_ranks_write_files_of_their_own(tmp_path: Path) -> None:
    into(tmp_path, rank=2)
    get_logger("training").info("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}-rank2.jsonl" for name in CHANNELS
    )
    assert json.loads((tmp_path / "training-rank2.jsonl").read_text())["rank"] == 2


def test_configuring_again_moves_everything(tmp_path: Path) -> None:
    """Loggers made before any configuration, and between, follow the present one."""
    log = get_logger("training")
    into(tmp_path / "a")
    log.info("first")
    into(tmp_path / "b")
    log.info("second")
    shutdown_logging()
    shutdown_logging()
    log.info("third")
    assert [line["event"] for line in read(tmp_path / "a", "training")] == ["first"]
    assert [line["event"] for line in read(tmp_path / "b", "training")] == ["second"]


def test_unconfigured_events_go_to_the_host_programs_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="obsinfra.training"):
        get_logger("training").info("validation", accuracy=0.5, terminal=False)
        try:
            raise ValueError("bad")
        except ValueError as error:
            get_logger("training").error("failed", exc_info=error)
    first, second = caplog.records
    assert (first.name, first.levelname, first.getMessage()) == (
        "obsinfra.training",
        "INFO",
        "validation accuracy=0.5",
    )
    assert second.exc_info is not None and second.exc_info[0] is ValueError


def test_the_host_programs_structlog_is_left_alone(tmp_path: Path) -> None:
    """Importing and configuring changes nothing for a program that uses structlog itself."""
    code = (
        "import structlog; before = structlog.get_config()['processors'];"
        "from obsinfra.monitoring.logging_config import *;"
        f"from pathlib import Path; configure_logging(Path({str(tmp_path)!r}), terminal=False);"
        "assert not structlog.is_configured();"
        "assert structlog.get_config()['processors'] == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_impossible_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of debug, info"):
        configure_logging(tmp_path, level="loud")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write logs"):
        configure_logging(tmp_path / "file")
    with pytest.raises(ValueError, match="one of training"):
        get_logger("trainig")


def test_many_threads_write_whole_lines(tmp_path: Path) -> None:
    into(tmp_path, max_bytes=20_000, backups=50)
    log = get_logger("training")
    threads = [
        threading.Thread(target=lambda name=name: [log.info("x", who=name, n=n) for n in range(200)])
        for name in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [
        (line["who"], line["n"])
        for path in tmp_path.glob("training.jsonl*")
        for line in map(json.loads, path.read_text().splitlines())
    ]
    assert sorted(found) == sorted((name, n) for name in "abcd" for n in range(200))


def test_a_forked_child_logs_while_the_parent_holds_the_lock(tmp_path: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
from obsinfra.monitoring import logging_config
logging_config.configure_logging(Path({str(tmp_path)!r}), terminal=False)
logging_config._sink.lock.acquire()
pid = os.fork()
if pid == 0:
    logging_config.get_logger("training").info("from the child")
    os._exit(0)
_, status = os.waitpid(pid, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
    assert [line["event"] for line in read(tmp_path, "training")] == ["from the child"]


def test_tensors_and_arrays_are_written_as_numbers() -> None:
    import numpy as np
    import torch

    line = json.loads(
        json_line({"loss": torch.tensor(0.5), "norm": np.float32(2), "nan": np.float64("nan")}, None)
    )
    assert line == {"loss": 0.5, "norm": 2.0, "nan": "nan"}


def test_an_object_that_cannot_be_shown_is_counted(tmp_path: Path) -> None:
    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError("no")

    into(tmp_path)
    before = log_errors()
    get_logger("training").info("x", thing=Hostile())
    assert log_errors() == before + 1


@pytest.mark.parametrize(
    "event",
    [
        {"event": "x", "text": "y" * 10_000_000},
        {"event": "x", **{f"key{n}": "y" * 1_000 for n in range(2_000)}},
        {"event": "x", "list": ["y" * 100] * 1_000_000},
        {"event": "x" * 10_000_000, "deep": [[["y" * 4_000] * 100] * 100]},
    ],
    ids=["long text", "many keys", "long list", "long and deep"],
)
def test_a_line_is_bounded_whatever_comes(event: dict[str, Any]) -> None:
    line = json_line(event, None)
    assert len(line) <= 4 * LINE_MAX_BYTES
    assert json.loads(line)["event"].startswith("x")
    assert json.loads(line)["truncated_from_characters"] > LINE_MAX_BYTES


def test_circular_values_end() -> None:
    circle: dict[str, Any] = {}
    circle["self"] = circle
    assert json.loads(json_line({"event": "x", "circle": circle}, None))["event"] == "x"


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary(max_size=5)
    | st.builds(object),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.tuples(st.booleans()), inner, max_size=3)
        | st.sets(st.integers(), max_size=2)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), values, max_size=4))
@settings(deadline=None)
def test_any_event_is_one_line_of_strict_json_and_of_text(event: dict[str, Any]) -> None:
    line = json_line(event, None)
    assert b"\n" not in line
    assert isinstance(json.loads(line, parse_constant=refuse_constants), dict)
    for value in event.values():
        assert "\n" not in plain_line({"event": "e", "key": value}, None)


def test_importing_it_stays_cheap() -> None:
    """Everybody imports the loggers; they bring neither torch nor OpenTelemetry."""
    code = (
        "import sys, obsinfra.monitoring.logging_config; "
        "sys.exit(any(name.split('.')[0] in ('torch', 'opentelemetry') for name in sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], timeout=60, check=False, env=os.environ).returncode == 0
    )
