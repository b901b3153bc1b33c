"""`/runbooks/…` of the sidecar: what the link in a message about an alert leads to."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from sidecar_face import Face

from obsinfra.alerting.prometheus_rules import RUNBOOKS
from obsinfra.catalog.alerts import ALERTS
from obsinfra.control.runbook_pages import as_page
from obsinfra.run.runbooks import find_runbooks


@pytest.fixture(params=[False, True], ids=["loopback", "wide"])
def face(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Face]:
    """A sidecar as it is on this machine and as it is away from it, where all else asks for the token."""
    face = Face(tmp_path, guard_all=request.param)
    yield face
    face.sidecar.stop()


def test_every_alerts_link_leads_to_its_runbook_without_a_token(face: Face) -> None:
    for alert in ALERTS:
        path = f"{RUNBOOKS}/{alert.name}".removeprefix("http://127.0.0.1:9465")
        answer = face.ask("GET", path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert f"<title>{alert.name}</title>" in answer.text
        shown = re.search(r"(?s)<pre>(.*)</pre>", answer.text)
        assert shown is not None
        plain = re.sub(r'<a href="(\w+)">([^<]*)</a>', r"[\2](\1.md)", shown[1])
        assert html.unescape(plain) == (find_runbooks() / f"{alert.name}.md").read_text()


def test_links_between_runbooks_can_be_followed(face: Face) -> None:
    links = set(re.findall(r'href="([^"]*)"', face.ask("GET", "/runbooks/README").text))
    assert links == {alert.name for alert in ALERTS}
    links = set(re.findall(r'href="([^"]*)"', face.ask("GET", "/runbooks/TrainerGone").text))
    assert {"README", "HighMemory"} <= links
    for link in links:
        assert face.ask("GET", f"/runbooks/{link}").status_code == 200
    assert face.ask("GET", "/runbooks/HighMemory.md").status_code == 200
    index = face.ask("GET", "/runbooks")
    assert (index.status_code, index.headers["location"]) == (307, "runbooks/README")


@pytest.mark.parametrize(
    "path",
    [
        "/runbooks/NoSuchAlert", "/runbooks/", "/runbooks/../actions", "/runbooks/..%2f..",
        "/runbooks/..%2factions.md", "/runbooks/%2e%2e%2f%2e%2e%2fpyproject.toml",
        "/runbooks/%2fetc%2fpasswd", "/runbooks/HighMemory%00", "/runbooks/HighMemory%0a",
        "/runbooks/" + "x" * 5_000,
    ],
)  # fmt: skip
def test_anything_else_is_unknown(tmp_path: Path, path: str) -> None:
    face = Face(tmp_path)
    try:
        answer = face.ask("GET", path)
        assert answer.status_code == 404
        assert "detail" in answer.json() and len(answer.content) < 500
    finally:
        face.sidecar.stop()


def test_a_page_runs_nothing(face: Face) -> None:
    policy = face.ask("GET", "/runbooks/HighMemory").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src" not in policy
    page = as_page("<i>", '<script>alert(1)</script> [x](javascript:alert) [<b>](Name.md) & "')
    assert "<script>" not in page and "<b>" not in page and "<i>" not in page
    assert 'href="javascript' not in page and '<a href="Name">&lt;b&gt;</a>' in page


def test_they_are_no_part_of_the_programs_interface(face: Face) -> None:
    assert not [path for path in face.app.openapi()["paths"] if path.startswith("/runbooks")]
