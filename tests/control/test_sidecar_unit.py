"""The systemd unit: systemd understands it, it is hardened, and its command line is one the sidecar takes."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sidecar_tools import SidecarProcess

UNIT = Path(__file__).parents[2] / "deploy" / "obsinfra-sidecar.service"
MOST_EXPOSED = 2.0
"""systemd's own figure, from 0 (nothing to attack) to 10; a service without any hardening has 9.6."""

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


class Unit(configparser.RawConfigParser):
    """Keys of a unit keep their case, and may come twice: the last one counts."""

    def optionxform(self, optionstr: str) -> str:
        return optionstr


@pytest.fixture
def service() -> dict[str, str]:
    unit = Unit(strict=False)
    unit.read_string(re.sub(r"\\\n\s*", "", UNIT.read_text()))
    return dict(unit["Service"])


@needs_systemd
def test_systemd_understands_it(tmp_path: Path) -> None:
    there = tmp_path / UNIT.name
    there.write_text(UNIT.read_text().replace("/opt/obsinfra/.venv/bin/python", sys.executable))
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", there], capture_output=True, text=True, check=False
    )
    assert [line for line in found.stderr.splitlines() if UNIT.name in line] == []


@needs_systemd
def test_systemd_finds_little_to_attack() -> None:
    found = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", UNIT],
        capture_output=True,
        text=True,
        check=False,
    )
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", found.stdout)
    assert exposure is not None, found.stdout + found.stderr
    assert float(exposure[1]) <= MOST_EXPOSED


def test_it_can_gain_nothing_and_write_only_where_the_runs_are(service: dict[str, str]) -> None:
    assert service["CapabilityBoundingSet"] == service["AmbientCapabilities"] == ""
    assert service["NoNewPrivileges"] == "yes" and service["ProtectSystem"] == "strict"
    assert service["ReadWritePaths"] == "/var/lib/obsinfra" and service["UMask"] == "0077"
    assert service["User"] not in ("", "root")
    # Whether a trainer lives is read from /proc; these would hide it.
    assert not {"PrivateUsers", "PrivatePIDs"} & service.keys()
    assert service.get("ProtectProc", "default") == "default"


def test_its_command_line_is_one_the_sidecar_takes(service: dict[str, str], tmp_path: Path) -> None:
    """All of it but paths and port, by starting that very command."""
    words = shlex.split(service["ExecStart"])
    assert words[1:3] == ["-m", "obsinfra.control.sidecar"] and "--host=127.0.0.1" in words
    process = SidecarProcess(tmp_path)
    here = {option.partition("=")[0]: option for option in process.arguments[3:]}
    given = [here.get(word.partition("=")[0], word) for word in words[3:]]
    assert {option.partition("=")[0] for option in given} >= here.keys()
    process.arguments[3:] = given
    try:
        process.start()
        assert process.answers()
        process.end()
    finally:
        process.client.close()
        if process.process is not None and process.process.poll() is None:
            process.process.kill()
            process.process.wait()


def test_it_comes_back_whatever_ended_it(service: dict[str, str]) -> None:
    assert service["Restart"] == "always"
    assert "StartLimitIntervalSec=0" in UNIT.read_text()
