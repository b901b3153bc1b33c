"""What a benchmark's figures are of, for its first line."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """The processor's name by Linux, else what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
