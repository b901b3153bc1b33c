"""What the doctor finds, with the machine's own parts and with parts taken away or broken."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from stack_tools import needs_stack, needs_tool

from obsinfra.deployment import doctor
from obsinfra.deployment.doctor import Finding, disk, examine, port, program, shared_memory


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@needs_stack
def test_it_looks_at_everything(tmp_path: Path) -> None:
    findings = by_name(examine(tmp_path / "runs"))
    names = [name for name in findings if not name.startswith("cgroup memory")]
    assert names == [
        "Python", "torch", "CUDA", "NVML", "host memory", "disk", "/dev/shm", "open files",
        "port 9464 (trainer)", "port 9090 (prometheus)", "port 9093 (alertmanager)", "port 9465 (sidecar)",
        "Prometheus", "Alertmanager", "promtool", "Docker",
    ]  # fmt: skip
    assert [name for name in findings if name.startswith("cgroup memory")]
    for name in ("Python", "torch", "disk", "Prometheus", "Alertmanager", "promtool"):
        assert findings[name].status == "ok", findings[name]
    assert findings["Prometheus"].detail.endswith(str(shutil.which("prometheus")))
    assert not (tmp_path / "runs").exists(), "looking must not change anything"


def test_whatever_is_not_ok_says_what_to_do_or_why_it_may_be_left(tmp_path: Path) -> None:
    for finding in examine(tmp_path):
        if finding.status == "problem":
            assert finding.fix, finding


def test_missing_programs_are_missing_not_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = by_name(examine(tmp_path))
    for name in ("Prometheus", "Alertmanager"):
        assert findings[name].status == "missing"
        assert "apt install prometheus prometheus-alertmanager" in (findings[name].fix or "")
    assert findings["promtool"].status == findings["Docker"].status == "missing"


def test_a_program_that_fails_is_a_problem_with_its_words(tmp_path: Path) -> None:
    broken = executable(tmp_path / "prometheus", "echo 'wrong processor' >&2; exit 126")
    found = program("Prometheus", [str(broken), "--version"])
    assert found.status == "problem"
    assert "126" in found.detail
    assert "wrong processor" in found.detail


def test_a_program_that_never_answers_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 0.2)
    hanging = executable(tmp_path / "promtool", "exec sleep 60")
    assert program("promtool", [str(hanging)]).status == "problem"


@needs_tool("docker")
def test_a_client_without_an_engine_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    found = by_name(examine(tmp_path))["Docker"]
    assert found.status == "missing"
    assert "no engine answers" in found.detail


def test_a_taken_port_is_told_and_its_rightful_owner_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        number = int(other.getsockname()[1])
        assert "next free one" in port("port", number).detail
        assert port("port", number, "the stack of this folder").detail == "in use by the stack of this folder"
    assert port("port", number).detail == "free"


def test_a_file_in_place_of_the_output_folder_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    found = disk(tmp_path / "runs" / "deeper")
    assert found.status == "problem"
    assert "not a writable folder" in found.detail


def test_little_space_is_a_problem_where_it_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(doctor, "LITTLE_DISK_BYTES", free + (1 << 40))
    monkeypatch.setattr(doctor, "LITTLE_SHM_BYTES", free + (1 << 40))
    assert disk(tmp_path).status == "problem"
    assert "--shm-size" in (shared_memory(tmp_path).fix or "")


def test_no_shared_memory_is_told_with_the_way_round(tmp_path: Path) -> None:
    assert "--num-workers 0" in (shared_memory(tmp_path / "shm").fix or "")


def test_a_look_that_fails_is_a_finding_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[Finding]:
        raise OSError("the kernel said no")

    monkeypatch.setattr(doctor, "_memory", broken)
    findings = by_name(examine(tmp_path))
    assert findings["memory"].status == "problem"
    assert "the kernel said no" in findings["memory"].detail
    assert findings["Python"].status == "ok"


def test_few_open_files_are_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "FEW_FILES", 1 << 62)
    found = by_name(examine(tmp_path))["open files"]
    assert found.status == "problem" or "unlimited" in found.detail
