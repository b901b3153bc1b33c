"""The versions of Prometheus and Alertmanager tests run on: the installed one, and a newer one beside it.

`.ci/newer_stack.sh` unpacks the newer one; `OBSINFRA_NEWER_STACK` names its folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

NEWER_FOLDER = "OBSINFRA_NEWER_STACK"
NAMES = {"alertmanager": ("alertmanager", "prometheus-alertmanager")}
"""Programs that upstream and Debian call differently."""


@dataclass(frozen=True, slots=True)
class StackVersion:
    """One set of programs; `search_path` is where they are looked for, None the caller's PATH."""

    name: str
    search_path: str | None

    def find(self, program: str) -> str | None:
        """The program's path; None where it is not there."""
        for name in NAMES.get(program, (program,)):
            if found := shutil.which(name, path=self.search_path):
                return found
        return None

    def require(self, *programs: str) -> list[str]:
        """Paths of these programs; skips the test, saying so, where one is missing."""
        found = {program: self.find(program) for program in programs}
        missing = [program for program, path in found.items() if path is None]
        if missing:
            where = "on PATH" if self.search_path is None else f"in {NEWER_FOLDER}={self.search_path!r}"
            pytest.skip(f"no {', '.join(missing)} {where} ({self.name})")
        return [path for path in found.values() if path is not None]

    def run(self, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run one of the programs to its end; the caller judges the exit status."""
        [path] = self.require(program)
        return subprocess.run(
            [path, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
        )

    def number(self, program: str) -> tuple[int, ...]:
        """Its version."""
        said = self.run(program, "--version")
        found = re.search(r"version (\d+)\.(\d+)", said.stdout + said.stderr)
        assert found is not None, said
        return int(found[1]), int(found[2])


def _newer_path() -> str:
    folder = os.environ.get(NEWER_FOLDER, "")
    return str(Path(folder) / "usr/bin") if folder else ""


INSTALLED = StackVersion("installed", None)
NEWER = StackVersion("newer", _newer_path())

each_version = pytest.mark.parametrize("version", [INSTALLED, NEWER], ids=lambda version: version.name)
"""Runs a test with `version` being each of them in turn; the test says with `require` what it needs."""
