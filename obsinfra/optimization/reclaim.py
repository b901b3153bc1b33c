"""Giving memory back to the system: garbage, the C library's free lists, the device allocator's cache.

For the host-memory guard, the action `free_memory` and `MemoryOptimizer.optimize_memory`.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def cuda_in_use() -> bool:
    """Whether this process has begun to use CUDA; asking does not begin it."""
    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def resident_bytes() -> int:
    """Resident memory of this process."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    except OSError:
        return int(psutil.Process().memory_info().rss)


def trim_allocator() -> bool:
    """Have the C library give free pages back to the system. False where it has no way to (glibc has)."""
    trim = _malloc_trim()
    if trim is None:
        return False
    trim(0)
    return True


def free_memory() -> dict[str, Any]:
    """Collect garbage and give caches back; bytes before and after."""
    before = _held()
    collected = gc.collect()
    if cuda_in_use():
        torch.cuda.empty_cache()
    trim_allocator()
    after = _held()
    return {
        "objects_collected": collected,
        "before_bytes": before,
        "after_bytes": after,
        "freed_bytes": {name: before[name] - after[name] for name in before},
    }


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    found: Callable[[int], int] = trim
    return found


def _held() -> dict[str, int]:
    held = {"resident": resident_bytes()}
    if cuda_in_use():
        held["cuda_reserved"] = sum(
            int(torch.cuda.memory_reserved(index)) for index in range(torch.cuda.device_count())
        )
    return held
