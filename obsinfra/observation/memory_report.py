"""What holds memory, as one JSON document: the process, the tensors, Python's allocations, each CUDA device.

May be made on any thread, also while the main one hangs. Knows no run and no commands.
"""

from __future__ import annotations

import contextlib
import gc
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from obsinfra.optimization.gc_schedule import all_objects
from obsinfra.optimization.reclaim import cuda_in_use

TRACE_FRAMES = 8
"""Source lines kept of a Python allocation."""

HISTORY_ENTRIES = 100_000
"""Allocations and frees kept of a CUDA device."""


def memory_report(
    *,
    tensors: Callable[[], Mapping[str, Any]],
    top: int,
    trace_seconds: float,
    pause: Callable[[float], object],
    device_file: Path,
) -> dict[str, Any]:
    """What holds memory now.

    Args:
        tensors: gives what `live_tensors` found; called after the recording.
        top: source lines listed.
        trace_seconds: how long allocations are recorded first; 0: only what is there.
        pause: waits so many seconds, or until the run ends.
        device_file: where the CUDA allocator's snapshot goes, for https://pytorch.org/memory_viz; only where
            CUDA is in use.

    Raises:
        OSError: that file cannot be written.
    """
    in_use = cuda_in_use()
    python = _traced(trace_seconds, pause, in_use, top)
    report = {
        "process": _process(),
        "tensors": dict(tensors()),
        "python": {"gc_objects": len(gc.get_objects()), "gc_counts": list(gc.get_count()), **python},
        "cuda": [_device(index) for index in range(torch.cuda.device_count())] if in_use else [],
    }
    if in_use:
        _write_device_snapshot(device_file, stop_recording=trace_seconds > 0)
        report["cuda_snapshot"] = str(device_file)
    return report


def _process() -> dict[str, Any]:
    """Resident memory and what it is made of, bytes."""
    found: dict[str, Any] = {"resident_bytes": int(psutil.Process().memory_info().rss)}
    with contextlib.suppress(OSError):
        parts = {}
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
            name, _, rest = line.partition(":")
            parts[name] = int(rest.split()[0]) * 1024
        found["smaps_rollup_bytes"] = parts
    return found


def live_tensors(model: nn.Module, top: int, *, between_steps: bool) -> dict[str, Any]:
    """Live tensors by storage: views of one storage count once. Those only C++ holds are not seen.

    Args:
        model: whose parameters are named.
        top: tensors listed.
        between_steps: whether no step is under way. While autograd works, on its threads and without the
            interpreter's lock, nobody else may look at a gradient: then those are left out.
    """
    names: dict[int, str] = {}
    with contextlib.suppress(RuntimeError):  # the loop may be changing the model
        names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
    storages: dict[tuple[str, int], tuple[int, torch.Tensor]] = {}
    views: Counter[tuple[str, int]] = Counter()

    def see(tensor: torch.Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
            key = (str(tensor.device), storage.data_ptr())
            size = storage.nbytes()
        except (RuntimeError, NotImplementedError):  # fake, sparse or freed: it holds nothing we could name
            return
        if size and key[1]:
            views[key] += 1
            storages.setdefault(key, (size, tensor))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in all_objects():
            if issubclass(type(thing), torch.Tensor):  # not isinstance: proxies would run code of their own
                see(thing)
                if between_steps and type(thing) is nn.Parameter and thing.grad is not None:
                    see(thing.grad)
    by_kind: Counter[str] = Counter()
    for size, tensor in storages.values():
        by_kind[f"{tensor.device} {str(tensor.dtype).removeprefix('torch.')}"] += size
    largest = sorted(storages.items(), key=lambda item: -item[1][0])[:top]
    return {
        "between_steps": between_steps,
        "count": len(storages),
        "total_bytes": sum(by_kind.values()),
        "bytes_by_device_and_dtype": dict(by_kind.most_common()),
        "largest": [
            {
                "bytes": size,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "device": str(tensor.device),
                "views": views[key],
                "parameter": names.get(key[1]),
                "requires_grad": tensor.requires_grad,
            }
            for key, (size, tensor) in largest
        ],
    }


def _traced(seconds: float, pause: Callable[[float], object], device: bool, top: int) -> dict[str, Any]:
    """Python's allocations by source line, recorded for `seconds`; CUDA's history is recorded beside."""
    ours = False
    before: tracemalloc.Snapshot | None = None
    if seconds > 0:
        if not tracemalloc.is_tracing():
            tracemalloc.start(TRACE_FRAMES)
            ours = True
        if device:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)
        before = tracemalloc.take_snapshot()
        pause(seconds)
    if not tracemalloc.is_tracing():
        return {"traced": False, "hint": "Python's allocations are not traced; ask with trace_seconds=10"}
    try:
        snapshot = tracemalloc.take_snapshot()
        current, peak = tracemalloc.get_traced_memory()
    finally:
        if ours:
            tracemalloc.stop()
    found: dict[str, Any] = {"traced": True, "traced_bytes": current, "traced_peak_bytes": peak}
    found["largest"] = [
        {"bytes": stat.size, "blocks": stat.count, "at": str(stat.traceback)}
        for stat in snapshot.statistics("lineno")[:top]
    ]
    if before is not None:
        grown = snapshot.compare_to(before, "lineno")
        found["grown"] = [
            {"bytes": stat.size_diff, "blocks": stat.count_diff, "at": str(stat.traceback)}
            for stat in sorted(grown, key=lambda stat: -stat.size_diff)[:top]
            if stat.size_diff > 0
        ]
    return found


def _device(index: int) -> dict[str, Any]:
    stats = torch.cuda.memory_stats(index)
    wanted = ("allocated_bytes", "reserved_bytes", "active_bytes", "inactive_split_bytes")
    free, total = torch.cuda.mem_get_info(index)
    return {
        "device": index,
        "free_bytes": free,
        "total_bytes": total,
        **{name: stats.get(f"{name}.all.current", 0) for name in wanted},
        **{f"peak_{name}": stats.get(f"{name}.all.peak", 0) for name in wanted[:2]},
        "retries": stats.get("num_alloc_retries", 0),
        "out_of_memory_errors": stats.get("num_ooms", 0),
    }


def _write_device_snapshot(path: Path, *, stop_recording: bool) -> None:
    try:
        torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
    finally:
        if stop_recording:  # else somebody else records, or nobody
            torch.cuda.memory._record_memory_history(enabled=None)
    if not path.exists():
        raise OSError(f"the CUDA allocator wrote no snapshot to {path}")
