"""The supervisor as the process it is, keeping programs of the test's own making."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stack_tools import processes_naming
from waiting import wait_for

from obsinfra.deployment.ports import free_port
from obsinfra.deployment.stack_state import Plan, Program, StackState

Start = Callable[..., StackState]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a supervisor over Python programs given as text, and ends it after the test."""

    def begin(*programs: str, stop_seconds: float = 10.0, log_bytes: int = 1 << 20) -> StackState:
        (tmp_path / "logs").mkdir(exist_ok=True)
        plan = Plan(
            str(tmp_path),
            str(tmp_path),
            "now",
            [
                Program(f"p{number}", [sys.executable, "-c", text, str(tmp_path)], 1, "", "/")
                for number, text in enumerate(programs)
            ],
        )
        plan.write()
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from pathlib import Path; from obsinfra.deployment import supervisor\n"
                f"supervisor.STOP_SECONDS = {stop_seconds}; supervisor.LOG_BYTES = {log_bytes}\n"
                "supervisor.main(Path(sys.argv[1]))",
                str(tmp_path),
            ],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return wait_for(lambda: _all_started(tmp_path), "the supervisor started everything")

    yield begin
    state = StackState.read(tmp_path)
    if state is not None and state.supervisor.alive():
        os.kill(state.supervisor.pid, signal.SIGTERM)
    wait_for(lambda: processes_naming(tmp_path) == [], "nothing is left")


def _all_started(state_dir: Path) -> StackState | None:
    state = StackState.read(state_dir)
    if state is None or any(child.process is None for child in state.children.values()):
        return None
    return state


WAIT = "import signal; signal.pause()"


def test_the_supervisor_detaches_from_its_caller(start: Start) -> None:
    state = start(WAIT)
    assert os.getsid(state.supervisor.pid) == state.supervisor.pid
    assert os.getsid(state.supervisor.pid) != os.getsid(0)


def test_a_program_waits_for_the_one_before_it_to_be_ready(tmp_path: Path) -> None:
    """Prometheus must not have alerts to hand over before Alertmanager takes them."""
    port = free_port("127.0.0.1", 0, set())
    first = f"""
import http.server, pathlib, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if pathlib.Path(sys.argv[1], "go").exists() else 503)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""
    here, url = str(tmp_path), f"http://127.0.0.1:{port}"
    programs = [
        Program("second", [sys.executable, "-c", WAIT, here], 1, "", "/", after=["first"]),
        Program("first", [sys.executable, "-c", first, here], port, url, "/ready"),
    ]
    (tmp_path / "logs").mkdir()
    Plan(here, here, "now", programs).write()
    subprocess.run([sys.executable, "-m", "obsinfra.deployment.supervisor", here], check=True)
    asked = tmp_path / "logs/first.log"
    try:
        wait_for(lambda: asked.exists() and asked.read_text().count("503") >= 2, "the first is asked again")
        state = StackState.read(tmp_path)
        assert state is not None and state.children["second"].process is None
        (tmp_path / "go").touch()
        state = wait_for(lambda: _all_started(tmp_path), "the second is started as well")
        assert state.children["second"].restarts == 0
    finally:
        state = StackState.read(tmp_path)
        assert state is not None
        os.kill(state.supervisor.pid, signal.SIGTERM)
        wait_for(lambda: processes_naming(tmp_path) == [], "nothing is left")


def test_sigterm_stops_every_child_and_the_supervisor(start: Start, tmp_path: Path) -> None:
    state = start(WAIT, WAIT)
    os.kill(state.supervisor.pid, signal.SIGTERM)
    wait_for(lambda: processes_naming(tmp_path) == [], "supervisor and children ended")
    # A process that is ending has no command line any more, a moment before it is gone.
    wait_for(lambda: not any(process.alive() for process in state.processes().values()), "all are gone")


def test_a_child_that_ignores_sigterm_is_killed(start: Start, tmp_path: Path) -> None:
    deaf = "import signal, pathlib, sys; signal.signal(15, 1); pathlib.Path(sys.argv[1], 'deaf').touch(); "
    state = start(deaf + "\nwhile True: signal.pause()", stop_seconds=0.3)
    wait_for(lambda: (tmp_path / "deaf").exists(), "the child ignores SIGTERM")
    os.kill(state.supervisor.pid, signal.SIGTERM)
    wait_for(lambda: processes_naming(tmp_path) == [], "the deaf child was killed")


def test_a_child_starts_with_no_signal_blocked(start: Start, tmp_path: Path) -> None:
    """The supervisor blocks signals to wait for them; a child that inherited that could not be stopped."""
    start("import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True); signal.pause()")
    log = tmp_path / "logs/p0.log"
    assert wait_for(log.read_text, "the child's mask is in its log").strip() == "set()"


@pytest.mark.slow
def test_a_crashing_program_is_restarted_ever_more_slowly_and_the_other_left_alone(
    start: Start, tmp_path: Path
) -> None:
    state = start("import time; print(time.monotonic(), flush=True)", WAIT)
    steady = state.children["p1"]

    def lives() -> list[float]:
        return [float(line) for line in (tmp_path / "logs/p0.log").read_text().split()]

    wait_for(lambda: len(lives()) >= 4, "it was started four times")
    first, second, third, fourth = lives()[:4]
    assert second - first < third - second < fourth - third
    now = StackState.read(tmp_path)
    assert now is not None
    assert now.children["p1"] == steady
    assert now.children["p0"].restarts >= 3


def test_children_end_with_a_killed_supervisor(start: Start, tmp_path: Path) -> None:
    state = start(WAIT)
    os.kill(state.supervisor.pid, signal.SIGKILL)
    wait_for(lambda: processes_naming(tmp_path) == [], "the child ended with its supervisor")


def test_without_its_state_folder_it_ends(start: Start, tmp_path: Path) -> None:
    """Somebody removed the runs folder: no `down` could find the stack any more."""
    start(WAIT)
    shutil.rmtree(tmp_path)
    wait_for(lambda: processes_naming(tmp_path) == [], "supervisor and child ended")
    tmp_path.mkdir()


def test_a_large_log_is_put_aside_when_its_program_starts(start: Start, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/p0.log").write_text("x" * 2000)
    start("print('fresh', flush=True); import signal; signal.pause()", log_bytes=1000)
    wait_for(lambda: (tmp_path / "logs/p0.log").read_text() == "fresh\n", "the new log has only the new life")
    assert (tmp_path / "logs/p0.log.1").stat().st_size == 2000


def test_a_program_that_cannot_be_executed_is_tried_again(tmp_path: Path, start: Start) -> None:
    state = start(WAIT)
    os.kill(state.supervisor.pid, signal.SIGTERM)
    wait_for(lambda: processes_naming(tmp_path) == [], "ended")
    plan = Plan.read(tmp_path)
    program = tmp_path / "appears-later"
    late = Program("late", [str(program), str(tmp_path)], 1, "", "/")
    Plan(plan.state_dir, plan.output_dir, "later", [late]).write()
    (tmp_path / "stack.json").unlink()
    subprocess.run([sys.executable, "-m", "obsinfra.deployment.supervisor", str(tmp_path)], check=True)
    wait_for(lambda: StackState.read(tmp_path), "the supervisor runs without it")
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    wait_for(lambda: _all_started(tmp_path), "it runs once it is there")
