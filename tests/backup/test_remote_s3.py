"""The remote over S3's API: a round trip, a server killed in the middle of an upload, an empty machine."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faulty_files import QuickFiles, tree
from same import same, small_state
from waiting import wait_for

from obsinfra.backup.backup_system import BackupSystem, create_backup_system
from obsinfra.backup.mirror import Mirror
from obsinfra.backup.remote import Remote, RemoteError
from obsinfra.backup.transfer import fetch, push

pytest.importorskip("s3fs", reason="s3fs is not installed (pip install 'obsinfra[s3]')")
pytest.importorskip("moto.server", reason="moto's server is not installed (pip install 'moto[server]')")
from s3_server import S3Server

BUCKET = "checkpoints"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    found = S3Server()
    found.start(BUCKET)
    yield found
    found.kill()


@pytest.fixture
def url() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def backup(tmp_path: Path) -> BackupSystem:
    return create_backup_system(tmp_path / "store", files=QuickFiles())


def test_an_empty_machine_gets_the_newest_one_back(
    server: S3Server, url: str, backup: BackupSystem, tmp_path: Path
) -> None:
    for step in (1, 2):
        backup.save(small_state(step), step=step, epoch=0)
    done = push(backup.store, Remote(url, server.options))
    assert done.objects == 5 and push(backup.store, Remote(url, server.options)).objects == 0
    path = fetch(url, tmp_path / "empty", options=server.options)
    found = create_backup_system(tmp_path / "empty")
    assert found.load(path).info.step == 2 and same(small_state(2), found.load().state)


def test_damage_in_the_bucket_is_seen(
    server: S3Server, url: str, backup: BackupSystem, tmp_path: Path
) -> None:
    backup.save(small_state(1), step=1, epoch=0)
    second = backup.save(small_state(2), step=2, epoch=0)
    remote = Remote(url, server.options)
    push(backup.store, remote)
    manifest = backup.store.read_manifest(second.path)
    own = min(manifest.chunks() - backup.list()[0].chunks())
    remote.write_objects({own: b"\0" * remote.objects()[own]})
    path = fetch(url, tmp_path / "empty", options=server.options)
    assert create_backup_system(tmp_path / "empty").load(path).info.step == 1


def test_a_missing_bucket_and_a_missing_prefix(server: S3Server, url: str, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="no checkpoint at"):
        fetch(url, tmp_path / "empty", options=server.options)
    store = create_backup_system(tmp_path / "store")
    store.save(small_state(), step=1, epoch=0)
    with pytest.raises(RemoteError, match="no-such-bucket"):
        push(store.store, Remote("s3://no-such-bucket/x", server.options))


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_an_upload(
    backup: BackupSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes back empty; the mirror, which was told nothing, brings everything there again."""
    state = {f"layer{number}": torch.full((50, 50), float(number)) for number in range(40)}
    server, url = S3Server(), f"s3://{BUCKET}/run"
    server.start(BUCKET)
    first = backup.save(state, step=1, epoch=0).path
    mirror = Mirror(
        backup.store, url, options=server.options, first_wait_seconds=0.05, longest_wait_seconds=0.2
    )
    watched = Remote(url, server.options)
    read, reads = backup.store.objects.read_file, itertools.count()
    halfway, killed = threading.Event(), threading.Event()

    def read_and_pause(digest: str, wanted_by: str) -> tuple[str, bytes]:
        if next(reads) == 20:
            halfway.set()
            assert killed.wait(60)
        return read(digest, wanted_by)

    monkeypatch.setattr(backup.store.objects, "read_file", read_and_pause)
    try:
        mirror.start()
        assert halfway.wait(60)
        assert len(watched.objects()) == 20 and not watched.manifests()
        server.kill()
        killed.set()
        wait_for(lambda: mirror.status().failing >= 2, "the mirror sees it is down")
        second = backup.save({**state, "layer0": torch.ones(3)}, step=2, epoch=0).path
        mirror.enqueue(second)
        server.start(BUCKET)
        assert mirror.flush(60)
        status = mirror.status()
        assert (status.pending, status.failing, status.copied) == (0, 0, 2)
        assert list(watched.manifests()) == [first.name, second.name]
        path = fetch(url, tmp_path / "empty", options=server.options)
        assert same(
            {**state, "layer0": torch.ones(3)}, create_backup_system(tmp_path / "empty").load(path).state
        )
        assert tree(tmp_path / "empty" / "objects").keys() <= tree(backup.store.objects.root).keys()
    finally:
        mirror.stop(30)
        server.kill()
