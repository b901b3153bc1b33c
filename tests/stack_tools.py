"""Asking a running stack: its HTTP answers and its processes."""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from obsinfra.deployment.native_stack import find_binary

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

needs_stack = pytest.mark.skipif(
    any(find_binary(name) is None for name in ("Prometheus", "Alertmanager")),
    reason="Prometheus or Alertmanager is missing (Debian: apt install prometheus prometheus-alertmanager)",
)


def needs_tool(name: str) -> pytest.MarkDecorator:
    """Skip, saying so, where a command-line tool is not installed."""
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed")


def get_json(url: str) -> Any:
    """The JSON document at `url`, asked without a proxy."""
    with _direct.open(url, timeout=10) as answer:
        return json.load(answer)


def processes_naming(place: Path) -> list[str]:
    """Command lines of all live processes that have `place` among their arguments."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or ())
        if str(place) in command and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(command)
    return found
