"""Shared by all tests: a clean environment, and waiting for conditions instead of sleeping."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

T = TypeVar("T")

os.environ.setdefault("OMP_NUM_THREADS", "1")


def wait_for(condition: Callable[[], T], what: str, seconds: float = 30.0) -> T:
    """Poll until `condition` returns something true, and return that; fail naming `what` otherwise."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what}")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[None]:
    """Neither the caller's environment nor an obsinfra.toml of the working folder may steer a test."""
    from obsinfra.config.settings import Settings, environment_names

    for field in Settings.model_fields:
        for name in environment_names(field):
            monkeypatch.delenv(name, raising=False)
    yield
