"""What every thread of this process is doing, as text: for a person who wants to know why nothing moves.

Python frames from the interpreter, the kernel's view of each thread, and native frames where py-spy is
installed. May be called on any thread, also while the main one hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import psutil

PY_SPY_SECONDS = 20.0
"""How long py-spy may take; it halts the process meanwhile."""

_PR_SET_PTRACER = 0x59616D61


@dataclass(frozen=True, slots=True)
class StackDump:
    """What was written.

    Attributes:
        path: the file.
        threads: Python threads in it.
        native: `included`, or why there are no native frames.
    """

    path: Path
    threads: int
    native: str


def dump_stacks(folder: Path, *, native: bool) -> StackDump:
    """Write `stacks-<time>.txt` into `folder`.

    Args:
        native: also ask py-spy for native frames, which halts the process for a moment.

    Raises:
        OSError: it cannot be written; nothing is left there then.
    """
    path = folder / f"stacks-{time.time_ns()}.txt"
    threads, text = _python_stacks()
    parts = [f"process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n", text, _children()]
    told = _native_stacks() if native else (None, "not asked for")
    parts.append(f"== Native frames\n{told[0] or told[1]}\n")
    try:
        with path.open("w") as file:
            file.write("\n".join(parts))
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise
    return StackDump(path, threads, told[1])


def dump_stacks_plainly(folder: Path) -> Path:
    """Python frames alone, by faulthandler: no Python code runs, so it works when little else does.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / f"stacks-{time.time_ns()}.txt"
    with path.open("w") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
    return path


def _python_stacks() -> tuple[int, str]:
    frames = sys._current_frames()
    threads = {thread.ident: thread for thread in threading.enumerate()}
    lines = []
    for ident, frame in sorted(frames.items(), key=lambda item: item[0] != threading.main_thread().ident):
        thread = threads.get(ident)
        name = thread.name if thread is not None else "unknown to Python's threading"
        native_id = thread.native_id if thread is not None else None
        lines.append(f"== Thread {name!r} ({native_id or ident}){_kernel_view(native_id)}\n")
        lines.append("".join(traceback.format_stack(frame)))
    return len(frames), "".join(line if line.endswith("\n") else line + "\n" for line in lines)


def _kernel_view(native_id: int | None) -> str:
    """State and place of sleep of a thread, as far as Linux tells."""
    task = Path(f"/proc/self/task/{native_id}")
    with contextlib.suppress(OSError, IndexError):
        state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        words = {"R": "running", "S": "sleeping", "D": "waiting for I/O", "T": "stopped", "Z": "gone"}
        place = ""
        with contextlib.suppress(OSError):
            place = (task / "wchan").read_text().strip("0\n")
        return f", {words.get(state, state)}" + (f" in {place}" if place else "")
    return ""


def _children() -> str:
    """Loader workers, the checkpoint writer and the like: a loop often hangs because one of them does."""
    lines = ["== Child processes"]
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                lines.append(f"{child.pid} {child.status()} {' '.join(child.cmdline())[:160]}")
    return "\n".join(lines if len(lines) > 1 else [*lines, "none"]) + "\n"


def _native_stacks() -> tuple[str | None, str]:
    """py-spy's text and `included`, or None and why not."""
    program = shutil.which("py-spy") or shutil.which("py-spy", path=sysconfig.get_path("scripts"))
    if program is None:
        return None, "py-spy is not installed; fix: pip install py-spy"
    _let_children_trace()
    try:
        found = subprocess.run(
            [program, "dump", "--native", "--pid", str(os.getpid())],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PY_SPY_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"py-spy failed: {error}"
    if found.returncode != 0:
        told = (found.stderr or found.stdout).strip().splitlines()
        return None, f"py-spy failed: {told[0][:300] if told else f'exit code {found.returncode}'}"
    return found.stdout, "included"


def _let_children_trace() -> None:
    """Where the kernel allows only parents to trace (Yama), allow it to any process of this user."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
