"""Finding and reading runbooks: in a checkout, in a wheel, and nothing but them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from obsinfra.errors import UserError
from obsinfra.run import runbooks
from obsinfra.run.runbooks import INDEX, find_runbooks, read_runbook

TOP = Path(__file__).parents[2]


def installed(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runbooks lie beside a package that is installed in `place`, and not in a checkout."""
    package = place / "site-packages" / "obsinfra"
    folder = package / "deployment" / "stack_files" / "runbooks"
    folder.mkdir(parents=True)
    monkeypatch.setattr(runbooks, "__file__", str(package / "run" / "runbooks.py"))
    return folder


def test_the_repositorys_own_are_found() -> None:
    assert find_runbooks() == TOP / "docs/runbooks"


def test_the_wheels_copy_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = installed(tmp_path, monkeypatch)
    (folder / "README.md").write_text("# Runbooks\n")
    assert find_runbooks() == folder


def test_the_wheel_takes_them_to_where_they_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())
    target = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]["docs/runbooks"]
    folder = installed(tmp_path, monkeypatch)
    assert folder == tmp_path / "site-packages" / target


def test_without_them_it_is_said_where_they_were_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = installed(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=f"no runbooks in {folder}"):
        find_runbooks()


def test_a_runbook_is_read_by_its_alerts_name_with_or_without_its_ending() -> None:
    folder = find_runbooks()
    text = read_runbook(folder, "HighMemory")
    assert text is not None and text.startswith("# HighMemory\n")
    assert read_runbook(folder, "HighMemory.md") == text
    assert read_runbook(folder, INDEX) is not None


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../secret", "..%2fsecret", "/etc/passwd", "sub/page", "sub\\page", "secret\0",
        "page\n", "-x", "Unknown", "secret.txt", "x" * 10_000, "é", "highmemory.MD",
    ],
)  # fmt: skip
def test_nothing_else_is_read(tmp_path: Path, name: str) -> None:
    """Whatever stands in the address: neither a file outside the folder nor one that is no runbook."""
    folder = tmp_path / "runbooks"
    (folder / "sub").mkdir(parents=True)
    for place in (
        tmp_path / "secret.md",
        folder / "secret.txt",
        folder / "sub/page.md",
        folder / "README.md",
    ):
        place.write_text("secret")
    assert read_runbook(folder, name) is None
