"""Recording some steps with torch.profiler, from outside: a Chrome trace and its top operators as files.

Driven from step to step by the actions. Knows no commands.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile, schedule

from obsinfra.errors import CommandError
from obsinfra.optimization.reclaim import cuda_in_use
from obsinfra.run.files import write_atomic

_under_way = False
"""Whether one of ours is: torch itself does not say so before the warm-up is over."""

_PYTHON = re.compile(r"\(\d+\): |^<|^nn\.Module: ")
"""Python functions, which a profile with stacks has among the operators."""


@dataclass(frozen=True, slots=True)
class ProfileFiles:
    """What a profile leaves: for https://ui.perfetto.dev, for programs, for people."""

    trace: Path
    summary_json: Path
    summary_text: Path

    def remove(self) -> None:
        """Take away whatever was written of it."""
        for path in (self.trace, self.summary_json, self.summary_text):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def profile_steps(
    files: ProfileFiles, *, steps: int, warmup: int, top: int, memory: bool, shapes: bool, stacks: bool
) -> Generator[None, None, Sequence[dict[str, Any]]]:
    """Record `steps` steps after `warmup` others; between two steps it yields.

    Returns:
        The top operators, most of their own time first: on the device where there is one, else on the CPU.

    Raises:
        CommandError: another profiler is recording; two at once take the process down.
        OSError: the files cannot be written; none is left then.
    """
    global _under_way
    if _under_way or torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        raise CommandError(
            "a profiler is recording already; expected none; fix: wait for its end, or stop the loop's own"
        )
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells stderr of every start and stop
    on_device = cuda_in_use()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    profiler = profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=warmup, active=steps, repeat=1),
        record_shapes=shapes,
        profile_memory=memory,
        with_stack=stacks,
    )
    _under_way = True
    try:
        profiler.start()
        try:
            for _ in range(warmup + steps):
                yield
                profiler.step()
        finally:
            profiler.stop()
    finally:
        _under_way = False
    averages = profiler.key_averages(group_by_input_shape=shapes)
    found = _top(averages, top, on_device)
    document = {"steps": steps, "warmup": warmup, "sorted_by": _sorted_by(on_device), "operators": found}
    try:
        files.trace.parent.mkdir(mode=0o700, exist_ok=True)
        _export(profiler, files.trace)
        write_atomic(files.summary_json, json.dumps(document, indent=1), mode=0o644)
        order = "self_device_time_total" if on_device else "self_cpu_time_total"
        table = averages.table(sort_by=order, row_limit=top, max_name_column_width=80)
        write_atomic(files.summary_text, table, mode=0o644)
    except OSError:
        files.remove()
        raise
    return found


def _export(profiler: profile, path: Path) -> None:
    """Write the trace under a name that begins with a dot, then rename it.

    Raises:
        OSError: it was not written whole. Kineto itself only says so on stderr.
    """
    unfinished = path.with_name("." + path.name)
    try:
        profiler.export_chrome_trace(str(unfinished))
        with unfinished.open("rb") as file:
            file.seek(max(0, unfinished.stat().st_size - 64))
            whole = file.read().rstrip().endswith(b"}")
        if not whole:
            raise OSError(f"the trace {path} is cut off; expected enough free space")
        unfinished.rename(path)
    except FileNotFoundError as error:
        raise OSError(
            f"the trace {path} was not written; expected a writable folder with free space"
        ) from error
    finally:
        for left in (unfinished, unfinished.with_name(unfinished.name + ".tmp")):  # the second is kineto's
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)


def _sorted_by(on_device: bool) -> str:
    return "self_device_seconds" if on_device else "self_cpu_seconds"


def _top(averages: EventList, top: int, on_device: bool) -> list[dict[str, Any]]:
    operators = [
        {
            "name": event.key,
            "calls": int(event.count),
            "self_cpu_seconds": event.self_cpu_time_total / 1e6,
            "cpu_seconds": event.cpu_time_total / 1e6,
            "self_device_seconds": event.self_device_time_total / 1e6,
            "device_seconds": event.device_time_total / 1e6,
            **({"self_cpu_bytes": int(event.self_cpu_memory_usage)} if event.self_cpu_memory_usage else {}),
            **({"input_shapes": str(event.input_shapes)} if event.input_shapes else {}),
        }
        for event in averages
        if not event.key.startswith("ProfilerStep") and not _PYTHON.search(event.key)
    ]
    key = _sorted_by(on_device)
    return sorted(operators, key=lambda operator: -float(operator[key]))[:top]
