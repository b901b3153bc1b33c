"""The page's files as a server hands them out; needs no browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from obsinfra.monitoring import page


def test_every_file_of_the_folder_is_served_and_nothing_else_exists() -> None:
    folder = Path(page.__file__).parent
    present = {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.suffix not in {".py", ".pyc"} and file.is_file()
    }
    assert present == page.ASSETS
    for name in page.ASSETS:
        assert page.asset(f"/{name}") == page.asset(name)
    assert page.asset("/") == page.asset("index.html")


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/page.css", "text/css; charset=utf-8"),
        ("/vendor/LICENSE", "text/plain; charset=utf-8"),
    ],
)
def test_content_types(path: str, content_type: str) -> None:
    found = page.asset(path)
    assert found is not None
    assert found[0]
    assert found[1] == content_type


@pytest.mark.parametrize(
    "path",
    ["/__init__.py", "/../__init__.py", "/vendor/../page.js", "//page.js", "/vendor", "/vendor/",
     "/page.js/", "/%2e%2e/x",
     "/page.js\x00", "/etc/passwd", "C:\\page.js"],
)  # fmt: skip
def test_other_paths_do_not_exist(path: str) -> None:
    assert page.asset(path) is None


def test_no_file_refers_to_another_site() -> None:
    for name in page.ASSETS - {"vendor/LICENSE"}:
        found = page.asset(name)
        assert found is not None
        addresses = set(re.findall(r"(?:https?:)?//[a-z][a-z0-9.-]+\.[a-z]{2,}[^\s\"')]*", found[0].decode()))
        # An XML namespace and the licence banner are names, not requests.
        assert addresses <= {"http://www.w3.org/2000/svg", "https://github.com/leeoniya/uPlot"}, name


def test_own_scripts_never_make_markup_from_text() -> None:
    for name in page.ASSETS:
        found = page.asset(name)
        assert found is not None
        if name.endswith(".js") and not name.startswith("vendor/"):
            assert not re.search(
                rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", found[0]
            ), name
