"""A sidecar with its HTTP face, and a run that it can command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sidecar_face import Face
from trainer_double import run_folder, trainer

from obsinfra.control.command import Command


@pytest.fixture
def face(tmp_path: Path) -> Iterator[Face]:
    """Watches `tmp_path`, in which the run r1 is said to live."""
    run_folder(tmp_path)
    made = Face(tmp_path)
    yield made
    made.sidecar.stop()


@pytest.fixture
def executed(face: Face, tmp_path: Path) -> Iterator[list[Command]]:
    """What the trainer of r1 was told and did."""
    with trainer(run_folder(tmp_path)) as executed:
        yield executed
