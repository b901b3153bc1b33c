"""Real errors of the kernel, for one process that is running: strace fails, or kills at, its system calls."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_for

TRACED = "write,fsync,openat,/^rename,/^mkdir,/^unlink"
"""What a commit asks of the kernel, on any architecture: some have `renameat2` alone."""


@functools.cache
def why_not() -> str | None:
    """Why no system call can be failed here; None when it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    script = "import os\ntry: os.fsync(os.open('.', 0))\nexcept OSError as error: print(error.errno)"
    inject = ["-e", "trace=fsync", "-e", "inject=fsync:error=EIO"]
    done = subprocess.run(
        ["strace", "-f", "-qq", *inject, sys.executable, "-c", script], capture_output=True, text=True
    )
    return None if done.stdout == "5\n" else f"strace cannot trace here: {done.stderr.strip()[-300:]}"


def need_strace() -> None:
    """Skip the test where strace is missing or ptrace not permitted."""
    if (problem := why_not()) is not None:
        pytest.skip(problem)


class Trace:
    """What strace saw of a process: each system call by its name, and how often it failed one."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def lines(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines()

    @property
    def injected(self) -> int:
        return sum("(INJECTED)" in line for line in self.lines())

    def calls(self) -> Counter[str]:
        found = (re.match(r"\d+\s+(\w+)\(", line) for line in self.lines())
        return Counter(match[1] for match in found if match)


@contextlib.contextmanager
def traced(pid: int, log: Path, *injections: str) -> Iterator[Trace]:
    """Have strace at a process and its threads meanwhile.

    Args:
        log: for what strace sees; written anew.
        injections: as strace's `-e inject=` takes them, e.g. `fsync:error=EIO:when=3`. Calls are counted for
            each thread from now on.
    """
    faults = [part for injection in injections for part in ("-e", f"inject={injection}")]
    command = ["strace", "-f", "-qq", "-o", str(log), "-e", f"trace={TRACED}", *faults, "-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def attached() -> bool:
        assert tracer.poll() is None, tracer.communicate()[1]
        return f"TracerPid:\t{tracer.pid}\n" in Path(f"/proc/{pid}/status").read_text()

    wait_for(attached, "strace is at the process")
    try:
        yield Trace(log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            tracer.send_signal(signal.SIGINT)  # it lets the process go
        tracer.communicate()
