"""The retention's rules one by one, tags and confirmations, and room made when the disk is short."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from events import captured_events
from faulty_files import QuickFiles, WatchedFiles
from hypothesis import given
from hypothesis import strategies as st
from same import same, small_state

from obsinfra.backup import store as store_module
from obsinfra.backup import tags
from obsinfra.backup.backup_system import BackupSystem, Kind, create_backup_system
from obsinfra.backup.manifest import Manifest
from obsinfra.backup.retention import Retention, doomed, prune
from obsinfra.errors import CheckpointError


def save(backup: BackupSystem, step: int, kind: Kind = "regular", loss: float | None = None) -> Path:
    metrics = {} if loss is None else {"loss": loss}
    return backup.save(small_state(step), step=step, epoch=0, kind=kind, metrics=metrics).path


def quick(root: Path, **policy: object) -> BackupSystem:
    return create_backup_system(root, files=QuickFiles(), **policy)  # type: ignore[arg-type]


def steps(backup: BackupSystem) -> list[int]:
    return [info.step for info in backup.list()]


def test_the_first_at_or_after_each_multiple_stays_however_often_it_prunes(tmp_path: Path) -> None:
    backup = quick(tmp_path, keep_last=1, keep_every=100)
    for step in range(30, 500, 35):  # 30 65 100 135 170 205 240 275 310 345 380 415 450 485
        save(backup, step)
        backup.prune()
    assert steps(backup) == [100, 205, 310, 415, 485]


def test_pruning_seldom_keeps_the_same_milestones(tmp_path: Path) -> None:
    backup = quick(tmp_path, keep_last=1, keep_every=100)
    for step in range(30, 500, 35):
        save(backup, step)
    backup.prune()
    assert steps(backup) == [100, 205, 310, 415, 485]


@pytest.mark.parametrize(("mode", "kept"), [("min", [3, 5]), ("max", [2, 4])])
def test_the_best_by_a_metric_stay_whatever_their_kind(tmp_path: Path, mode: str, kept: list[int]) -> None:
    backup = quick(tmp_path, keep_last=1, keep_best=2, best_metric="loss", best_mode=mode)
    for step, loss in enumerate([5.0, 9.0, 1.0, 8.0, 2.0, float("nan"), 4.0, None], start=1):
        save(backup, step, loss=loss)
    backup.prune()
    assert steps(backup) == [*kept, 8]


def test_of_equally_good_ones_the_newest_stays(tmp_path: Path) -> None:
    backup = quick(tmp_path, keep_last=1, best_metric="loss")
    for step, loss in enumerate([1.0, 1.0, 3.0, 3.0], start=1):
        save(backup, step, loss=loss)
    backup.prune()
    assert steps(backup) == [2, 4]


def test_emergencies_stay_until_confirmed(tmp_path: Path) -> None:
    backup = quick(tmp_path, keep_last=2, keep_emergency=None)
    emergencies = [save(backup, step, "emergency") for step in range(1, 9)]
    for step in (10, 11, 12):
        save(backup, step)
    backup.prune()
    assert steps(backup) == [*range(1, 9), 11, 12]
    backup.confirm(emergencies[2])
    assert backup.prune() == [emergencies[2]]
    assert steps(backup) == [1, 2, *range(4, 9), 11, 12]
    assert tags.confirmed(backup.store) == set(), "a mark does not outlive its checkpoint"


def test_a_confirmed_emergency_is_kept_as_a_regular_one(tmp_path: Path) -> None:
    backup = quick(tmp_path, keep_last=2)
    save(backup, 1)
    save(backup, 2)
    backup.confirm(save(backup, 3, "emergency"))
    save(backup, 4, "best")
    backup.prune()
    assert steps(backup) == [2, 3, 4]


def test_only_an_emergency_can_be_confirmed(tmp_path: Path) -> None:
    backup = quick(tmp_path)
    with pytest.raises(CheckpointError, match="of kind regular; expected an emergency"):
        backup.confirm(save(backup, 1))


def test_a_tagged_one_stays_and_loads_by_its_name(tmp_path: Path) -> None:
    backup = quick(tmp_path, keep_last=1)
    first = save(backup, 1)
    backup.tag(first, "before-lr-change")
    for step in (2, 3):
        save(backup, step)
    backup.prune()
    assert steps(backup) == [1, 3]
    assert same(small_state(1), backup.load("before-lr-change").state)
    backup.untag("before-lr-change")
    assert backup.prune() == [first]
    with pytest.raises(CheckpointError, match="no checkpoint 'before-lr-change'"):
        backup.load("before-lr-change")


def test_names_that_find_a_checkpoint(tmp_path: Path) -> None:
    backup = quick(tmp_path)
    paths = [save(backup, step) for step in (1, 2)]
    info = backup.list()[0]
    for name in (info.id, info.path.stem, info.path.name, str(info.path)):
        assert backup.find(name) == paths[0]
    assert backup.find("latest") == paths[1]


@pytest.mark.parametrize(
    "name", ["latest", "", "../x", ".hidden", "a/b", "x" * 65, "0123abcd", "000000000001-regular-aa", "a b"]
)
def test_names_that_no_tag_may_have(tmp_path: Path, name: str) -> None:
    backup = quick(tmp_path / "store")
    path = save(backup, 1)
    with pytest.raises(CheckpointError, match="expected 1 to 64 letters"):
        backup.tag(path, name)
    assert not (tmp_path / "store" / "tags").exists()


def test_a_tag_is_not_taken_from_another_unless_asked(tmp_path: Path) -> None:
    backup = quick(tmp_path)
    one, two = save(backup, 1), save(backup, 2)
    backup.tag(one, "good")
    backup.tag(one, "good")
    with pytest.raises(CheckpointError, match="that of 000000000001"):
        backup.tag(two, "good")
    backup.tag(two, "good", move=True)
    assert backup.find("good") == two


def test_while_a_tag_cannot_be_read_nothing_is_removed(tmp_path: Path) -> None:
    backup = quick(tmp_path, keep_last=1)
    backup.tag(save(backup, 1), "good")
    save(backup, 2)
    save(backup, 3)
    file = tmp_path / "tags" / "good"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"01-", b"02-"))
    with captured_events() as logs:
        assert backup.prune() == []
    assert [log["event"] for log in logs] == ["prune_held_back"]
    file.write_bytes(whole)
    backup.prune()
    assert steps(backup) == [1, 3]


def test_a_damaged_confirmation_confirms_nothing(tmp_path: Path) -> None:
    backup = quick(tmp_path, keep_last=1)
    emergency = save(backup, 1, "emergency")
    backup.confirm(emergency)
    (tmp_path / "confirmed" / emergency.name).write_bytes(b"x")
    save(backup, 2)
    assert backup.prune() == []


def test_a_dry_run_tells_what_a_prune_removes_and_changes_nothing(tmp_path: Path) -> None:
    backup = quick(tmp_path)
    for step in range(5):
        save(backup, step)
    before = sorted(tmp_path.rglob("*"))
    told = [manifest.path for manifest in doomed(backup.store, Retention(keep_last=2))]
    assert sorted(tmp_path.rglob("*")) == before
    assert told == prune(backup.store, Retention(keep_last=2)) and len(told) == 3


def test_a_later_process_keeps_the_one_committed_last_though_its_step_is_lower(tmp_path: Path) -> None:
    """Training was rewound, then its machine restarted, or a person prunes by hand."""
    backup = quick(tmp_path)
    for step in (10, 20, 30, 12):
        save(backup, step)
    quick(tmp_path, keep_last=1).prune()
    assert steps(backup) == [12, 30]


@pytest.mark.parametrize(
    "wrong",
    [{"keep_last": 0}, {"keep_best": 0}, {"keep_emergency": 0}, {"keep_every": 0}, {"best_mode": "x"}],
)
def test_impossible_policies_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"at least one|keep_every|best_mode"):
        Retention(**wrong)  # type: ignore[arg-type]


def _manifest(step: int, kind: str, loss: float | None, number: int) -> Manifest:
    metrics = {} if loss is None else {"loss": loss}
    path = Path(f"{step:012d}-{kind}-{number:08x}.json")
    made = f"2026-01-01T00:00:{number:02d}"
    return Manifest(path, f"{number:08x}", "", kind, step, 0, made, metrics, None, {}, None, {}, {}, ())


@given(
    made=st.lists(
        st.tuples(
            st.integers(0, 60),
            st.sampled_from(["regular", "final", "best", "emergency"]),
            st.none() | st.floats(-3, 3),
        ),
        max_size=20,
    ),
    keep_last=st.integers(1, 4),
    keep_every=st.none() | st.integers(1, 30),
    best=st.sampled_from([None, "min", "max"]),
)
def test_what_is_kept_once_is_kept_again_and_no_rule_is_short(
    made: list[tuple[int, str, float | None]], keep_last: int, keep_every: int | None, best: str | None
) -> None:
    """Pruning what was pruned removes nothing, and each rule has as many as it asks for, where there are."""
    policy = Retention(
        keep_last,
        keep_every,
        best_metric="loss" if best else None,
        best_mode=best or "min",  # type: ignore[arg-type]
    )
    manifests = sorted((_manifest(*one, number) for number, one in enumerate(made)), key=tags.age)
    kept = policy.kept(manifests, set())
    left = [manifest for manifest in manifests if manifest.path in kept]
    assert policy.kept(left, set()) == kept
    regular = [manifest for manifest in manifests if manifest.kind == "regular"]
    assert kept >= {manifest.path for manifest in regular[-keep_last:]}
    losses = [manifest.metrics["loss"] for manifest in manifests if manifest.metrics]
    if best and losses:
        wanted = min(losses) if best == "min" else max(losses)
        assert wanted in [manifest.metrics.get("loss") for manifest in left]


# ---- pressure ----------------------------------------------------------------------------------------


def _free_depends_on(backup: BackupSystem, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """The disk has room for so many checkpoints in all."""
    one = small_bytes()

    class Answer:
        f_frsize = 1

        def __init__(self) -> None:
            self.f_bavail = (
                store_module.SPACE_MARGIN_BYTES + (room - len(backup.store.manifest_paths())) * one
            )

    monkeypatch.setattr(store_module.os, "statvfs", lambda path: Answer())


def small_bytes() -> int:
    return sum(tensor.nbytes for tensor in small_state().values() if hasattr(tensor, "nbytes"))


def test_short_of_space_it_prunes_by_policy_and_then_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = quick(tmp_path, keep_last=2)
    for step in range(1, 5):
        save(backup, step)
    _free_depends_on(backup, monkeypatch, room=4)
    with captured_events() as logs:
        save(backup, 5)
    (event,) = [log for log in logs if log["event"] == "checkpoint_space_short"]
    assert len(event["pruned"]) == 2 and event["needed_bytes"] == small_bytes()
    assert steps(backup) == [3, 4, 5] and same(small_state(5), backup.load().state)


def test_short_of_space_with_nothing_to_prune_it_refuses_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = quick(tmp_path, keep_last=2)
    for step in (1, 2):
        save(backup, step)
    _free_depends_on(backup, monkeypatch, room=2)
    with captured_events() as logs, pytest.raises(CheckpointError, match="MB free"):
        save(backup, 3)
    assert [log["event"] for log in logs] == ["checkpoint_space_short"]
    assert steps(backup) == [1, 2]


def test_a_full_disk_takes_old_unconfirmed_emergencies_only_when_nothing_else_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = quick(tmp_path, keep_last=1)
    emergencies = [save(backup, step, "emergency") for step in (1, 2, 3)]
    tagged = save(backup, 4, "emergency")
    backup.tag(tagged, "crash")
    save(backup, 5)
    save(backup, 6)
    _free_depends_on(backup, monkeypatch, room=6)
    save(backup, 7)
    assert steps(backup) == [1, 2, 3, 4, 6, 7], "first goes what the policy does not keep"
    _free_depends_on(backup, monkeypatch, room=5)
    with captured_events() as logs:
        save(backup, 8)
    assert steps(backup) == [2, 3, 4, 7, 8], "then the oldest emergency, and no more than it takes"
    gone = [log["checkpoint"] for log in logs if log["event"] == "unconfirmed_emergency_given_up"]
    assert gone == [emergencies[0].stem]
    assert all(result.problem is None for result in backup.verify())


def test_the_newest_emergency_is_never_given_up_nor_any_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = quick(tmp_path, keep_last=1)
    for step in (1, 2, 3):
        save(backup, step, "emergency")
    save(backup, 4)
    _free_depends_on(backup, monkeypatch, room=0)  # all that may go would not make room for one more
    with captured_events() as logs, pytest.raises(CheckpointError, match="MB free"):
        save(backup, 5)
    assert steps(backup) == [1, 2, 3, 4] and [log["event"] for log in logs] == ["checkpoint_space_short"]
    _free_depends_on(backup, monkeypatch, room=2)
    with pytest.raises(CheckpointError, match="MB free"):
        save(backup, 5)
    assert 3 in steps(backup) and 4 in steps(backup)


def test_a_quota_takes_emergencies_one_by_one_too(tmp_path: Path) -> None:
    root = tmp_path / "store"
    for step in (1, 2, 3):
        save(quick(root), step, "emergency")

    def quota(operation: str, path: Path) -> None:
        if operation == "write" and len(list((root / "manifests").glob("*.json"))) > 2:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))

    backup = create_backup_system(root, files=WatchedFiles(quota))
    save(backup, 4)
    assert steps(backup) == [2, 3, 4] and same(small_state(4), backup.load().state)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_disk_that_fills_up_during_the_write_is_pruned_and_written_again(tmp_path: Path, code: int) -> None:
    """A quota is seen in no free-space figure."""
    root = tmp_path / "store"
    for step in range(1, 5):
        save(quick(root), step)

    def quota(operation: str, path: Path) -> None:
        if operation == "write" and len(list((root / "manifests").glob("*.json"))) > 2:
            raise OSError(code, os.strerror(code), str(path))

    backup = create_backup_system(root, keep_last=2, files=WatchedFiles(quota))
    save(backup, 5)
    assert steps(backup) == [3, 4, 5] and same(small_state(5), backup.load().state)
    assert all(result.problem is None for result in backup.verify())


def test_other_disk_errors_prune_nothing(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(quick(tmp_path), step)

    def broken(operation: str, path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    backup = create_backup_system(tmp_path, keep_last=1, files=WatchedFiles(broken))
    with pytest.raises(OSError, match="Input/output"):
        save(backup, 5)
    assert steps(backup) == [1, 2, 3, 4]


def test_retention_and_remote_run_without_torch() -> None:
    """The writer process uses them, and must stay small."""
    code = (
        "import sys, obsinfra.backup.retention, obsinfra.backup.mirror, obsinfra.backup.usage;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
