"""`resume` at the URL of a remote copy: a machine that has nothing goes on exactly where another one was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from eight_steps import state_of, trained
from s3_server import S3Server

from obsinfra.backup.compare import differences
from obsinfra.backup.remote import Remote
from obsinfra.backup.transfer import push
from obsinfra.errors import CheckpointError

BUCKET = "runs"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket that the usual environment variables lead to, as on a machine of one's own."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (pip install 'obsinfra[s3]')")
    pytest.importorskip("moto.server", reason="moto's server is not installed (pip install 'moto[server]')")
    server = S3Server()
    for name, value in {
        "AWS_ENDPOINT_URL": server.options["endpoint_url"],
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server.start(BUCKET)
    s3fs.S3FileSystem.clear_instance_cache()  # it keeps connections, whatever the address
    yield f"s3://{BUCKET}/mine"
    server.kill()


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("bucket"))
    return f"file://{tmp_path / 'copy'}"


def test_an_empty_machine_goes_on_exactly_where_the_other_was(tmp_path: Path, url: str) -> None:
    whole = trained(tmp_path / "whole", 8)
    first = trained(tmp_path / "lost", 5)
    assert first.keeper.backup is not None
    push(first.keeper.backup.store, Remote(url))
    shutil.rmtree(tmp_path / "lost")
    second = trained(tmp_path / "empty", 8, resume=url)
    assert second.resumed is not None and second.resumed.info.step == 5
    assert second.folder.read_info().parent == url
    assert differences(state_of(second), state_of(whole)) == []


def test_a_remote_with_nothing_is_one_clear_error_and_leaves_no_run_behind(tmp_path: Path, url: str) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        trained(tmp_path / "empty", 8, resume=url)
    assert not (tmp_path / "empty").exists() or list((tmp_path / "empty").iterdir()) == []
