"""Keeping the pages of freed memory in the process, so that the next step finds them there.

glibc gives a block of 128 KiB and more back to the kernel when it is freed, or when it lies at the top of its
heap. A training step on the CPU frees its activations in every backward pass and asks for the same ones again
in the next forward pass: the kernel maps and zeroes their pages in every step. `mallopt(3)` says how to turn
that off.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import Literal

import torch

from obsinfra.errors import ConfigError

WantedPages = Literal["auto", "on", "off"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1
LARGEST_KEPT_BYTES = 32 * 2**20
"""Blocks from this size on are the kernel's in any case: glibc takes no larger threshold."""

_USERS_OWN = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_MMAP_MAX_",
    "GLIBC_TUNABLES",
)
"""Who sets one of these has chosen already."""


def keep_freed_pages(
    wanted: WantedPages, device: torch.device, environment: Mapping[str, str] = os.environ
) -> tuple[bool, str]:
    """Have the C library keep what is freed, for the whole process and for good.

    `malloc_trim`, and so the guard of host memory, gives pages back all the same.

    Args:
        wanted: `auto` means where a model trains on the CPU and nobody has set glibc's own variables.
        device: the model's.
        environment: where those variables are looked up.

    Returns:
        Whether freed pages are kept now, and why or why not.

    Raises:
        ConfigError: `on`, and this C library cannot.
    """
    if wanted == "off":
        return False, "as asked for"
    if wanted == "auto":
        if device.type != "cpu":
            return False, f"the model is on {device}"
        named = [name for name in _USERS_OWN if name in environment]
        if named:
            return False, f"{named[0]} is set"
    if not _told_to_keep():
        if wanted == "on":
            raise ConfigError(
                "keep_freed_pages 'on' where the C library has no mallopt",
                "glibc",
                "leave it out; allocators such as jemalloc have settings of their own",
            )
        return False, "the C library has no mallopt"
    return True, "as asked for" if wanted == "on" else "the model is on the CPU"


def _told_to_keep() -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
