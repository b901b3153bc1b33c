"""What Compose itself reads in docker-compose.yml: valid, with the example's environment and with none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from compose_tool import compose

TOP = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The file alone in a folder, so that no .env of the checkout is read."""
    shutil.copy(TOP / "docker-compose.yml", tmp_path)
    return tmp_path


def test_compose_takes_the_file_with_all_its_profiles(project: Path) -> None:
    read = compose(project, "--profile", "*", "config", "--format", "json")
    assert read.returncode == 0, read.stderr
    assert "level=warning" not in read.stderr
    document = json.loads(read.stdout)
    assert len(document["services"]) == 13
    for name, part in document["services"].items():
        for port in part.get("ports", ()):
            assert port["host_ip"] == "127.0.0.1", name
        assert part["read_only"] and part["cap_drop"] == ["ALL"], name


def test_without_a_profile_neither_a_trainer_nor_what_needs_a_gpu_is_started(project: Path) -> None:
    read = compose(project, "config", "--services")
    assert read.returncode == 0, read.stderr
    assert set(read.stdout.split()) == {
        *("prometheus", "alertmanager", "grafana", "otel-collector", "jaeger", "node-exporter", "sidecar")
    }


def test_the_example_environment_changes_nothing(project: Path) -> None:
    plain = compose(project, "--profile", "*", "config")
    shutil.copy(TOP / ".env.example", project / ".env")
    assert compose(project, "--profile", "*", "config").stdout == plain.stdout != ""


def test_ports_and_folders_are_the_environments(project: Path) -> None:
    read = compose(
        project, "config", "--format", "json", OBSINFRA_PORT_PROMETHEUS="19090", OBSINFRA_RUNS="/some/runs"
    )
    services = json.loads(read.stdout)["services"]
    assert services["prometheus"]["ports"][0]["published"] == "19090"
    assert "--web.external-url=http://127.0.0.1:19090" in services["prometheus"]["command"]
    assert {"type": "bind", "source": "/some/runs", "target": "/runs"}.items() <= services["sidecar"][
        "volumes"
    ][0].items()
