"""The detached process that keeps the native stack's programs running (`python -m …supervisor STATE_DIR`).

Started by NativeStack.up with a plan, tells by stack.json what runs, restarts what crashes, and stops its
children when told by SIGTERM. Knows nothing of what the programs do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from obsinfra.deployment.readiness import answers
from obsinfra.deployment.stack_state import Child, Plan, Program, StackState
from obsinfra.run.process import ProcessId

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
STEADY_SECONDS = 30.0
"""A program that ran this long is restarted at once when it ends; a shorter life doubles the wait."""

STOP_SECONDS = 10.0
"""From SIGTERM to SIGKILL of a child."""

CHECK_SECONDS = 2.0
"""How often to see whether the state folder is still there."""

LOG_BYTES = 16 << 20
"""A log larger than this is put aside (one generation) before the program is started again."""

READY_POLL_SECONDS = 0.1
"""How often a program that others wait for is asked whether it is ready."""

PR_SET_PDEATHSIG = 1
_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


@dataclass(slots=True)
class _Kept:
    """A program being kept running."""

    program: Program
    process: subprocess.Popen[bytes] | None = None
    id: ProcessId | None = None
    started: float = 0.0
    restarts: int = -1
    backoff: float = FIRST_BACKOFF_SECONDS
    due: float = 0.0


class Supervisor:
    """Keeps the programs of a plan running until SIGTERM, SIGINT or SIGHUP.

    Args:
        plan: what to run; logs go to `<state_dir>/logs/<name>.log`.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._state_dir = Path(plan.state_dir)
        self._kept = [_Kept(program) for program in plan.programs]
        self._me = ProcessId.current()
        self._die_with_parent = _dies_with(os.getpid())

    def run(self) -> None:
        """Start everything, watch, and stop everything at the end. Blocks; signals must be blocked before."""
        try:
            while True:
                self._start_what_is_due()
                waits = [kept.due - time.monotonic() for kept in self._kept if kept.process is None]
                told = signal.sigtimedwait(_WATCHED, max(0.0, min([*waits, CHECK_SECONDS])))
                if told is not None and told.si_signo != signal.SIGCHLD:
                    _say(f"told to stop by {signal.Signals(told.si_signo).name}")
                    return
                if not (self._state_dir / "plan.json").exists():
                    _say("the state folder was removed; nobody could stop this any more")
                    return
                self._reap()
        finally:
            self._stop_all()

    def _start_what_is_due(self) -> None:
        for kept in self._kept:
            if kept.process is None and kept.due <= time.monotonic():
                if kept.restarts < 0 and not self._ready(kept.program.after):
                    kept.due = time.monotonic() + READY_POLL_SECONDS
                    continue
                self._start(kept)
                self._write_state()

    def _ready(self, names: list[str]) -> bool:
        before = [kept for kept in self._kept if kept.program.name in names]
        return all(kept.process is not None and answers(kept.program, seconds=0.5) for kept in before)

    def _start(self, kept: _Kept) -> None:
        program = kept.program
        log = self._state_dir / "logs" / f"{program.name}.log"
        kept.restarts += 1
        kept.started = time.monotonic()
        try:
            if log.exists() and log.stat().st_size > LOG_BYTES:
                log.replace(log.with_suffix(".log.1"))
            with log.open("ab") as output:
                kept.process = subprocess.Popen(
                    program.arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    preexec_fn=self._die_with_parent,
                )
        except (OSError, subprocess.SubprocessError) as error:
            _say(f"cannot start {program.name}: {error}")
            self._wait_before_next(kept)
            return
        try:
            kept.id = ProcessId(kept.process.pid, psutil.Process(kept.process.pid).create_time())
        except psutil.NoSuchProcess:
            kept.id = None  # ended already; the next round reaps it
        _say(f"started {program.name}, pid {kept.process.pid}")

    def _reap(self) -> None:
        for kept in self._kept:
            if kept.process is not None and (status := kept.process.poll()) is not None:
                _say(f"{kept.program.name} ended with status {status}")
                kept.process = kept.id = None
                self._wait_before_next(kept)
                self._write_state()

    def _wait_before_next(self, kept: _Kept) -> None:
        now = time.monotonic()
        if now - kept.started >= STEADY_SECONDS:
            kept.backoff = FIRST_BACKOFF_SECONDS
        kept.due = now + kept.backoff
        kept.backoff = min(LONGEST_BACKOFF_SECONDS, 2 * kept.backoff)

    def _stop_all(self) -> None:
        """Stop the last started first: Prometheus before whom it talks to."""
        running = [kept.process for kept in reversed(self._kept) if kept.process is not None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _say(f"pid {process.pid} ignores SIGTERM, killing it")
                process.kill()
                process.wait()

    def _write_state(self) -> None:
        children = {
            kept.program.name: Child(
                process=kept.id, restarts=max(0, kept.restarts), port=kept.program.port, url=kept.program.url
            )
            for kept in self._kept
        }
        try:
            StackState(plan=self._plan, supervisor=self._me, children=children).write()
        except OSError as error:  # a full disk must not end what watches the training
            _say(f"cannot write stack.json: {error}")


def _dies_with(supervisor: int) -> Callable[[], None]:
    """What a child does between fork and exec: asks the kernel to be stopped when the supervisor dies."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != supervisor:  # it died before the request took effect
                os.kill(os.getpid(), signal.SIGTERM)

    return prepare


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # its own log is the only place, and that disk may be full
        print(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {text}", flush=True)


def main(state_dir: Path) -> None:
    """Detach from the caller, then supervise the plan in `state_dir`."""
    plan = Plan.read(state_dir)
    # Forking once more makes init the parent: whoever called up never gets a zombie to reap.
    if os.fork():
        os._exit(0)
    os.setsid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    Supervisor(plan).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
