"""The `docker` command with its Compose plugin, as the tests find them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNPACKED = Path(sys.prefix) / "docker"
"""Where `run_tests.sh` has `.ci/docker_compose.sh` put the plugin where none is installed."""


def docker_environment() -> dict[str, str]:
    """This process's environment, and in it where the plugin is."""
    return os.environ | ({"DOCKER_CONFIG": str(UNPACKED)} if UNPACKED.is_dir() else {})


@functools.cache
def compose_version() -> str | None:
    """Compose's version; None where it is not installed."""
    if shutil.which("docker") is None:
        return None
    said = subprocess.run(
        ["docker", "compose", "version", "--short"],
        env=docker_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return said.stdout.strip() if said.returncode == 0 else None


def compose(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`docker compose …` in a folder; skips the test, saying so, where there is no Compose."""
    if compose_version() is None:
        pytest.skip(f"docker compose is missing (.ci/docker_compose.sh {UNPACKED} unpacks it)")
    return subprocess.run(
        ["docker", "compose", *arguments],
        cwd=folder,
        env=docker_environment() | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
