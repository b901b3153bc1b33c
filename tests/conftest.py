"""Shared by all tests: a clean environment."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither the caller's environment nor an obsinfra.toml of the working folder may steer a test."""
    from obsinfra.config.settings import Settings, environment_names

    for field in Settings.model_fields:
        for name in environment_names(field):
            monkeypatch.delenv(name, raising=False)
    yield
