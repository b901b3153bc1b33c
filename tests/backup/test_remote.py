"""Copies at a URL: only what is missing moves, all of it is verified, and a mirror survives its remote."""

from __future__ import annotations

import contextlib
import itertools
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from events import captured_events
from faulty_files import QuickFiles, tree
from fsspec.implementations.memory import MemoryFileSystem
from same import same, small_state
from waiting import wait_for

from obsinfra.backup.backup_system import BackupSystem, create_backup_system
from obsinfra.backup.mirror import Mirror, MirrorStatus
from obsinfra.backup.remote import Remote, RemoteError
from obsinfra.backup.remote_url import is_url
from obsinfra.backup.store import CheckpointStore
from obsinfra.backup.transfer import fetch, pull, push
from obsinfra.errors import CheckpointError


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/remote/prefix"
    return f"memory://{uuid.uuid4().hex}/prefix"


@pytest.fixture
def backup(tmp_path: Path) -> BackupSystem:
    return create_backup_system(tmp_path / "store", files=QuickFiles())


def save(backup: BackupSystem, step: int) -> Path:
    return backup.save(small_state(step), step=step, epoch=0).path


def remote_files(url: str) -> dict[str, bytes]:
    files, root = fsspec.core.url_to_fs(url)
    with contextlib.suppress(FileNotFoundError):
        return {str(path): files.cat_file(path) for path in files.find(root)}
    return {}


def damage(url: str, digest_or_name: str) -> None:
    files, _ = fsspec.core.url_to_fs(url)
    (path,) = [path for path in remote_files(url) if path.endswith(digest_or_name)]
    files.pipe_file(path, b"\0" * files.size(path))


def test_a_round_trip_gives_every_byte(backup: BackupSystem, url: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save(backup, step)
    done = push(backup.store, url)
    assert done.checkpoints == tuple(info.path.name for info in backup.list()[::-1]), "newest first"
    other = create_backup_system(tmp_path / "other", files=QuickFiles())
    back = pull(url, other.store)
    assert (back.objects, back.bytes) == (done.objects, done.bytes)
    assert tree(backup.store.objects.root) == tree(other.store.objects.root)
    assert tree(backup.store.manifests) == tree(other.store.manifests)
    assert same(small_state(2), other.load().state)


def test_only_missing_chunks_move(backup: BackupSystem, url: str, tmp_path: Path) -> None:
    save(backup, 1)
    assert push(backup.store, url).objects == 3
    save(backup, 2)
    assert push(backup.store, url).objects == 2, "one of three is the same in both"
    again = push(backup.store, url)
    assert (again.checkpoints, again.objects) == ((), 0)
    other = CheckpointStore(tmp_path / "other")
    assert pull(url, other, "latest").objects == 3
    assert pull(url, other).objects == 2
    assert pull(url, other).checkpoints == ()


class BreakingFiles(MemoryFileSystem):
    """Fails at the operations on the remote that `fails` names by their number."""

    fails: Callable[[int], bool] = staticmethod(lambda number: False)
    numbers = itertools.count()
    written: list[str] = []  # noqa: RUF012 - shared on purpose, as MemoryFileSystem's store is
    protocol = "breaking"

    def pipe_file(self, path: str, value: bytes, **options: Any) -> Any:
        if BreakingFiles.fails(next(BreakingFiles.numbers)):
            raise ConnectionResetError("gone")
        BreakingFiles.written.append(path.rpartition("/")[2])
        return super().pipe_file(path, value, **options)


@pytest.fixture
def breaking() -> Iterator[str]:
    fsspec.register_implementation("breaking", BreakingFiles, clobber=True)
    BreakingFiles.fails = staticmethod(lambda number: False)
    BreakingFiles.numbers = itertools.count()
    BreakingFiles.written = []
    yield f"breaking://{uuid.uuid4().hex}/x"
    BreakingFiles.fails = staticmethod(lambda number: False)


def test_a_push_broken_at_any_point_goes_on_where_it_was(
    backup: BackupSystem, breaking: str, tmp_path: Path
) -> None:
    for step in (1, 2, 3):
        save(backup, step)
    total = 3 + 2 + 2 + 3  # chunks and manifests
    for at in range(total):
        url = f"{breaking}/{at}"
        BreakingFiles.numbers, BreakingFiles.written = itertools.count(), []
        BreakingFiles.fails = staticmethod(lambda number, at=at: number == at)
        with pytest.raises(RemoteError, match="gone"):
            push(backup.store, url)
        arrived = list(BreakingFiles.written)
        there = Remote(url)
        for name in there.manifests():
            manifest = backup.store.read_manifest(backup.store.manifests / name)
            assert manifest.chunks() <= there.objects().keys(), "a manifest is there only with its chunks"
        push(backup.store, url)
        # Of a batch that broke, others may come again; nothing that had been settled does.
        assert len(BreakingFiles.written) - len(arrived) <= total - at + 3
        fetched = create_backup_system(tmp_path / str(at), files=QuickFiles())
        pull(url, fetched.store)
        assert same(small_state(3), fetched.load().state) and len(fetched.list()) == 3


def test_damage_there_is_seen_and_an_older_one_is_fetched(
    backup: BackupSystem, url: str, tmp_path: Path
) -> None:
    for step in (1, 2, 3):
        save(backup, step)
    push(backup.store, url)
    newest, middle = backup.list()[2], backup.list()[1]
    alone = newest.chunks() - middle.chunks()
    damage(url, min(alone))
    damage(url, middle.path.name)
    with captured_events() as logs:
        path = fetch(url, tmp_path / "empty")
    assert [log["event"] for log in logs] == ["damaged_checkpoint_skipped"] * 2
    found = create_backup_system(tmp_path / "empty")
    assert found.load(path).info.step == 1 and same(small_state(1), found.load().state)
    assert len(found.list()) == 1, "no manifest of what did not come whole"
    with pytest.raises(CheckpointError, match="damaged"):
        pull(url, CheckpointStore(tmp_path / "other"), "latest")
    assert not CheckpointStore(tmp_path / "other").manifest_paths()


def test_fetch_takes_a_named_one_and_no_other(backup: BackupSystem, url: str, tmp_path: Path) -> None:
    paths = [save(backup, step) for step in (1, 2)]
    push(backup.store, url)
    named = f"{url}/manifests/{paths[0].name}"
    assert fetch(named, tmp_path / "one").name == paths[0].name
    damage(url, paths[0].name)
    with pytest.raises(CheckpointError, match="damaged"):
        fetch(named, tmp_path / "two")


def test_fetch_passes_over_what_cannot_be_resumed(backup: BackupSystem, url: str, tmp_path: Path) -> None:
    first = save(backup, 1)
    backup.save(small_state(2), step=2, epoch=0, kind="best", attributes={"resumable": False})
    push(backup.store, url)
    assert fetch(url, tmp_path / "empty").name == first.name


def test_a_url_with_nothing_there(tmp_path: Path, url: str) -> None:
    with pytest.raises(RemoteError, match="no checkpoint at"):
        fetch(url, tmp_path / "empty")


@pytest.mark.parametrize(
    ("given", "wrong"), [("nonsense://x/y", "nonsense"), ("abfs://x/y", "abfs:// cannot be used here")]
)
def test_urls_that_cannot_be_used(given: str, wrong: str) -> None:
    with pytest.raises(RemoteError, match=wrong):
        Remote(given)


def test_what_is_a_url() -> None:
    assert is_url("s3://bucket/x") and is_url("memory://x") and is_url("file:///x")
    assert not is_url("my-run") and not is_url("/x/y") and not is_url("c://x")


def test_a_damaged_one_here_is_not_copied_and_the_others_are(backup: BackupSystem, url: str) -> None:
    for step in (1, 2):
        save(backup, step)
    first, second = backup.list()
    (own, *_) = sorted(second.chunks() - first.chunks())
    file = backup.store.objects.path(own)
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(CheckpointError, match="1 damaged and not copied"):
        push(backup.store, url)
    assert list(Remote(url).manifests()) == [first.path.name]


def test_what_is_pruned_during_a_push_is_left_out(backup: BackupSystem, breaking: str) -> None:
    for step in (1, 2):
        save(backup, step)
    backup.policy = type(backup.policy)(keep_last=1)

    def prune_once(number: int) -> bool:
        if number == 3:  # the newest one's manifest
            backup.prune()
        return False

    BreakingFiles.fails = staticmethod(prune_once)
    done = push(backup.store, breaking)
    assert [name[:12] for name in done.checkpoints] == ["000000000002"]


@pytest.mark.parametrize("name", ["../../x", "0" * 63 + "g"])
def test_a_manifest_that_names_strange_chunks_makes_no_files(
    backup: BackupSystem, url: str, tmp_path: Path, name: str
) -> None:
    from dataclasses import replace

    from obsinfra.backup.manifest import Head, file_name, sealed

    save(backup, 1)
    entry = replace(backup.list()[0].tensors[0], chunks=(name,))
    body = Head("", "regular", 1, 0, {}, None, {}, {}).body(None, {}, [entry])
    Remote(url).write_manifest(file_name(body), sealed(body))
    with pytest.raises(CheckpointError, match="names a chunk"):
        pull(url, CheckpointStore(tmp_path / "other"))
    assert not (tmp_path / "x").exists() and not list(tmp_path.rglob("other/objects/*/*"))


def test_a_manifest_under_the_name_of_another_is_refused(
    backup: BackupSystem, url: str, tmp_path: Path
) -> None:
    path = save(backup, 1)
    push(backup.store, url)
    Remote(url).write_manifest(path.name.replace("0001-", "0002-"), path.read_bytes())
    with pytest.raises(CheckpointError, match="is that of"):
        pull(url, CheckpointStore(tmp_path / "other"), "latest")
    assert fetch(url, tmp_path / "empty").name == path.name


def test_a_pull_mends_what_is_damaged_here(backup: BackupSystem, url: str) -> None:
    save(backup, 1)
    push(backup.store, url)
    digest = min(backup.list()[0].chunks())
    backup.store.objects.path(digest).write_bytes(b"rot")
    assert pull(url, backup.store).objects == 1
    assert all(result.problem is None for result in backup.verify())


def test_progress_ends_at_the_whole(backup: BackupSystem, url: str, tmp_path: Path) -> None:
    save(backup, 1)
    for move in (
        lambda progress: push(backup.store, url, progress=progress),
        lambda progress: pull(url, CheckpointStore(tmp_path / "other"), progress=progress),
    ):
        seen: list[tuple[int, int]] = []
        done = move(lambda *both, seen=seen: seen.append(both))
        assert seen == sorted(seen) and seen[-1] == (done.bytes, done.bytes)


def test_of_several_runs_below_a_url_one_must_be_named(
    backup: BackupSystem, url: str, tmp_path: Path
) -> None:
    other = create_backup_system(tmp_path / "other store", files=QuickFiles())
    mine, theirs = save(backup, 1), save(other, 2)
    push(backup.store, f"{url}/alpha")
    assert fetch(url, tmp_path / "only").name == mine.name, "the only one is meant"
    assert pull(url, CheckpointStore(tmp_path / "pulled")).checkpoints == (mine.name,)
    push(other.store, f"{url}/beta")
    with pytest.raises(RemoteError, match=r"several runs: alpha, beta; expected the URL of one"):
        fetch(url, tmp_path / "which")
    with pytest.raises(RemoteError, match="several runs"):
        pull(url, CheckpointStore(tmp_path / "which"))
    assert fetch(url, tmp_path / "named", run="alpha").name == mine.name
    assert fetch(f"{url}/beta", tmp_path / "below", run="alpha").name == theirs.name
    push(other.store, url)
    assert fetch(url, tmp_path / "itself", run="alpha").name == theirs.name, "a copy at the URL itself is it"


# ---- the mirror --------------------------------------------------------------------------------------


@contextlib.contextmanager
def mirroring(store: CheckpointStore, url: str, **options: Any) -> Iterator[Mirror]:
    mirror = Mirror(store, url, first_wait_seconds=0.01, longest_wait_seconds=0.05, **options)
    mirror.start()
    try:
        yield mirror
    finally:
        assert mirror.stop(30)


def test_a_mirror_copies_what_was_there_and_what_comes(backup: BackupSystem, url: str) -> None:
    save(backup, 1)
    statuses: list[MirrorStatus] = []
    with mirroring(backup.store, url, on_status=statuses.append) as mirror:
        assert mirror.flush(30)
        for step in (2, 3):
            mirror.enqueue(save(backup, step))
        assert mirror.flush(30)
        status = mirror.status()
    assert len(Remote(url).manifests()) == 3
    assert (status.pending, status.copied, status.failing, status.lag_seconds) == (0, 3, 0, 0.0)
    assert statuses[-1].copied == 3 and statuses[-1].copied_bytes == status.copied_bytes > 0
    assert not list((backup.store.root / "outbox").rglob("*.json"))
    assert "obsinfra-mirror" not in [thread.name for thread in threading.enumerate()]


def test_a_mirror_outlasts_an_outage_and_says_so_once(backup: BackupSystem, breaking: str) -> None:
    BreakingFiles.fails = staticmethod(lambda number: True)
    statuses: list[MirrorStatus] = []
    with captured_events() as logs, mirroring(backup.store, breaking, on_status=statuses.append) as mirror:
        mirror.enqueue(save(backup, 1))
        wait_for(lambda: mirror.status().failing >= 3, "it tries again and again")
        during = mirror.status()
        mirror.enqueue(save(backup, 2))
        BreakingFiles.fails = staticmethod(lambda number: False)
        assert mirror.flush(30)
        after = mirror.status()
    assert during.pending == 1 and during.lag_seconds > 0 and "gone" in (during.error or "")
    assert (after.pending, after.failing, after.error, after.copied) == (0, 0, None, 2)
    assert after.failures >= 3 and max(status.failing for status in statuses) >= 3
    assert [log["event"] for log in logs].count("checkpoint_mirror_failing") == 1


def test_what_waits_is_on_disk_and_another_mirror_goes_on(backup: BackupSystem, breaking: str) -> None:
    BreakingFiles.fails = staticmethod(lambda number: True)
    with mirroring(backup.store, breaking) as first:
        path = save(backup, 1)
        first.enqueue(path)
        wait_for(lambda: first.status().failing >= 1, "it failed")
        lag = first.status().lag_seconds
    (note,) = (backup.store.root / "outbox").rglob("*.json")
    assert note.name == path.name
    with mirroring(backup.store, breaking) as second:
        wait_for(lambda: second.status().failing >= 1, "it failed too")
        assert second.status().lag_seconds > lag, "the wait counts from the first mirror on"
        BreakingFiles.fails = staticmethod(lambda number: False)
        assert second.flush(30)
    assert list(Remote(breaking).manifests()) == [path.name] and not note.exists()


def test_a_caller_never_waits_for_the_remote(backup: BackupSystem, breaking: str) -> None:
    held, release = threading.Event(), threading.Event()

    def hang(number: int) -> bool:
        held.set()
        return not release.wait(60)

    BreakingFiles.fails = staticmethod(hang)
    paths = [save(backup, step) for step in (1, 2, 3)]
    with mirroring(backup.store, breaking) as mirror:
        assert held.wait(30)
        for path in paths:
            mirror.enqueue(path)  # returns, though the thread hangs in an upload
        assert mirror.status().pending == 3
        assert mirror.stop(0) is False and not release.is_set()
        release.set()


def test_the_newest_is_copied_first_after_an_outage(backup: BackupSystem, breaking: str) -> None:
    for step in (1, 2, 3):
        save(backup, step)
    with mirroring(backup.store, breaking) as mirror:
        assert mirror.flush(30)
    manifests = [name[:12] for name in BreakingFiles.written if name.endswith(".json")]
    assert manifests == ["000000000003", "000000000002", "000000000001"]


def test_what_is_pruned_during_an_outage_no_longer_waits_but_the_lag_goes_on(
    backup: BackupSystem, breaking: str
) -> None:
    BreakingFiles.fails = staticmethod(lambda number: True)
    with mirroring(backup.store, breaking) as mirror:
        mirror.enqueue(save(backup, 1))
        wait_for(lambda: mirror.status().failing >= 1, "it failed")
        before = mirror.status()
        mirror.enqueue(save(backup, 2))
        backup.policy = type(backup.policy)(keep_last=1)
        backup.prune()
        after = mirror.status()
        assert (before.pending, after.pending) == (1, 1) and after.lag_seconds > before.lag_seconds
        BreakingFiles.fails = staticmethod(lambda number: False)
        assert mirror.flush(30)
        assert (mirror.status().lag_seconds, mirror.status().copied) == (0.0, 1)
    assert [name[:12] for name in Remote(breaking).manifests()] == ["000000000002"]


def test_copied_bytes_are_seen_while_a_large_one_is_under_way(backup: BackupSystem, breaking: str) -> None:
    reached, release = threading.Event(), threading.Event()

    def hang(number: int) -> bool:
        if number == 3:  # the manifest, after three chunks
            reached.set()
            return not release.wait(60)
        return False

    BreakingFiles.fails = staticmethod(hang)
    save(backup, 1)
    with mirroring(backup.store, breaking) as mirror:
        assert reached.wait(30)
        assert mirror.status().copied == 0 and mirror.status().copied_bytes > 0
        release.set()
        assert mirror.flush(30)
        assert mirror.status().copied_bytes == sum(Remote(breaking).objects().values())


def test_a_damaged_checkpoint_does_not_hold_up_the_others(backup: BackupSystem, url: str) -> None:
    first, second = save(backup, 1), save(backup, 2)
    second.write_bytes(second.read_bytes()[:-9])
    with mirroring(backup.store, url) as mirror:
        assert mirror.flush(30)
        assert mirror.status().failures == 1
    assert list(Remote(url).manifests()) == [first.name]


def test_a_status_hook_that_fails_stops_nothing(backup: BackupSystem, url: str) -> None:
    def broken(status: MirrorStatus) -> None:
        raise RuntimeError("no such metric")

    save(backup, 1)
    save(backup, 2)
    with captured_events() as logs, mirroring(backup.store, url, on_status=broken) as mirror:
        assert mirror.flush(30)
    assert len(Remote(url).manifests()) == 2
    (said,) = (log for log in logs if log["event"] == "mirror_status_not_taken")
    assert "no such metric" in said["error"], "once, with what it was"
