"""One room behind two doors: each command takes effect once, and what became of it is never lost."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from trainer_double import Caller, Heard, channel_of, command, done, line, run_folder, trainer
from waiting import wait_for

from obsinfra.control import channel as channel_module
from obsinfra.control.channel import MAX_WAITING, ControlChannel
from obsinfra.control.client import send_command
from obsinfra.control.command import Ack, Command
from obsinfra.control.ledger import KEEP_SECONDS, AckLedger
from obsinfra.run.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return run_folder(tmp_path)


def put(folder: RunFolder, sent: Command, name: str | None = None) -> Path:
    """A command in the inbox, whole from the start, as a client writes it."""
    target = folder.inbox / (name or f"{sent.id}.json")
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_bytes(line(sent))
    return temporary.rename(target)


def ledger_of(folder: RunFolder, sent: Command) -> Ack:
    ack = AckLedger(folder.acks).last(sent.id)
    assert ack is not None
    return ack


def taken(channel: ControlChannel) -> Command:
    (found,) = wait_for(channel.take, "a command waits")
    return found


def control_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "obsinfra-control"]


# ---- two doors ---------------------------------------------------------------------------------------


def test_acks_stream_over_the_socket_from_accepted_to_done(folder: RunFolder) -> None:
    sent = command("emergency_checkpoint", args={"alert": "GradientExplosion"})
    with trainer(folder) as executed, Caller(folder) as caller:
        caller.say(line(sent))
        assert caller.states(2) == ["accepted", "running"]
        last = caller.hear()
    assert (last["id"], last["state"], last["step"]) == (sent.id, "done", 7)
    assert last["result"] == {"path": "m.json"}
    assert executed == [sent]


def test_the_inbox_works_without_the_socket(folder: RunFolder) -> None:
    with trainer(folder) as executed:
        folder.socket.unlink()
        sent = command()
        assert send_command(folder, sent, timeout_seconds=20).state == "done"
    assert executed == [sent]


def test_the_socket_works_without_the_inbox(folder: RunFolder) -> None:
    with trainer(folder) as executed:
        shutil.rmtree(folder.inbox)
        sent = command()
        assert send_command(folder, sent, timeout_seconds=20).state == "done"
    assert executed == [sent]


def test_the_inbox_works_where_no_socket_can_be_made(folder: RunFolder) -> None:
    folder.socket.mkdir()
    with trainer(folder) as executed:
        assert send_command(folder, command(), timeout_seconds=20).state == "done"
    assert len(executed) == 1


def test_a_deep_run_folder_has_a_socket_too(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["nested-output-folder"] * 8)
    folder = run_folder(deep)
    assert len(str(folder.socket)) > 108
    with trainer(folder):
        assert stat.S_ISSOCK(folder.socket.stat().st_mode)
        assert send_command(folder, command(), door="socket", timeout_seconds=20).state == "done"
    assert not folder.socket.exists()


def test_only_the_owner_may_speak_and_read(folder: RunFolder) -> None:
    sent = command()
    with trainer(folder):
        assert stat.S_IMODE(folder.socket.stat().st_mode) == 0o600
        send_command(folder, sent, timeout_seconds=20)
    (file,) = folder.acks.iterdir()
    assert file.name == f"{sent.id}.json" and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text())["state"] == "done"


# ---- once --------------------------------------------------------------------------------------------


def test_one_id_through_both_doors_again_and_again_takes_effect_once(folder: RunFolder) -> None:
    sent = command()
    with channel_of(folder) as (channel, _), Caller(folder) as first, Caller(folder) as second:
        first.say(line(sent) * 3)
        assert first.states(3) == ["accepted"] * 3
        put(folder, sent)
        put(folder, sent, "another-name.json")
        assert channel.take() == [sent]
        channel.ack(sent.id, "running", step=3)
        second.say(line(sent))
        assert second.hear()["state"] == "running"
        channel.ack(sent.id, "done", step=3)
        assert second.until("done")[-1] == "done"
        assert first.until("done") == ["running", "done"]
        wait_for(lambda: not list(folder.inbox.iterdir()), "both files are gone")
        put(folder, sent)
        second.say(line(sent))
        assert second.hear()["state"] == "done"
        wait_for(lambda: not list(folder.inbox.iterdir()), "the late file is gone")
        assert channel.take() == []


def test_one_id_from_many_threads_at_once_takes_effect_once(folder: RunFolder) -> None:
    commands = [command() for _ in range(10)]
    with trainer(folder) as executed, ThreadPoolExecutor(16) as pool:
        asked = [
            pool.submit(send_command, folder, sent, door=door, timeout_seconds=30)
            for sent in commands
            for door in ("socket", "inbox", "socket")
        ]
        assert {one.result().state for one in asked} == {"done"}
    assert sorted(one.id for one in executed) == sorted(one.id for one in commands)


def test_a_repetition_between_the_last_ack_and_its_file_takes_no_effect(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment of a command's end it is known, in memory or by its file."""
    sent = command()
    heard: list[str] = []
    record = AckLedger.record

    with channel_of(folder) as (channel, _):

        def asked_meanwhile(ledger: AckLedger, ack: Ack) -> None:
            if ack.final:
                heard.append(channel.submit(sent).state)
            record(ledger, ack)

        channel.submit(sent)
        assert channel.take() == [sent]
        channel.ack(sent.id, "running")
        monkeypatch.setattr(AckLedger, "record", asked_meanwhile)
        channel.ack(sent.id, "done")
        assert heard == ["done"]
        assert channel.submit(sent).state == "done" and channel.take() == []
    assert ledger_of(folder, sent).state == "done"


def test_the_end_is_told_over_the_socket_before_the_disk_has_it(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And `running` the other way round: it is on the disk before the command takes effect."""
    sent, on_disk = command(), threading.Event()
    record = AckLedger.record

    def slowly(ledger: AckLedger, ack: Ack) -> None:
        assert not ack.final or on_disk.wait(20)
        record(ledger, ack)

    monkeypatch.setattr(AckLedger, "record", slowly)
    with channel_of(folder) as (channel, _), Caller(folder) as caller:
        caller.say(line(sent))
        assert taken(channel) == sent
        channel.ack(sent.id, "running")
        assert ledger_of(folder, sent).state == "running"
        with ThreadPoolExecutor(1) as loop:
            ending = loop.submit(channel.ack, sent.id, "done")
            assert caller.states(3) == ["accepted", "running", "done"]
            assert not ending.done() and ledger_of(folder, sent).state == "running"
            caller.say(line(sent))
            assert caller.hear()["state"] == "done" and channel.take() == []
            on_disk.set()
    assert ledger_of(folder, sent).state == "done"


def test_who_waits_at_the_inbox_for_a_command_of_the_socket_finds_it_accepted(folder: RunFolder) -> None:
    sent = command()
    with channel_of(folder) as (channel, _):
        for door in ("socket", "inbox"):
            ack = send_command(folder, sent, door=door, timeout_seconds=20, wait_for="accepted")  # type: ignore[arg-type]
            assert ack.state == "accepted"
        assert channel.take() == [sent]


def test_a_malformed_repetition_does_not_change_what_became_of_the_first(folder: RunFolder) -> None:
    sent = command()
    with channel_of(folder) as (channel, heard), Caller(folder) as caller:
        caller.say(line(sent) + line(sent, action="explode"))
        assert caller.states(2) == ["accepted", "accepted"]
        done(channel, taken(channel))
        assert caller.states(2) == ["running", "done"]
        caller.say(line(sent, expires_at=1.0))
        assert caller.hear()["state"] == "done"
        assert heard.outcomes == []


# ---- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["socket", "inbox"])
def test_an_unknown_action_is_rejected_and_told_what_is_allowed(folder: RunFolder, door: str) -> None:
    sent = command("explode")
    with channel_of(folder) as (channel, heard):
        ack = send_command(folder, sent, door=door, timeout_seconds=20)  # type: ignore[arg-type]
        assert ack.state == "rejected" and "checkpoint, emergency_checkpoint, stop" in (ack.error or "")
        wait_for(lambda: heard.outcomes, "reported")
        assert [(one.id, ack.state) for one, ack in heard.outcomes] == [(sent.id, "rejected")]
        assert channel.take() == []
    assert list(folder.inbox.iterdir()) == []


def test_what_expires_while_it_waits_is_not_executed(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief, lasting = command(lifetime_seconds=100), command(lifetime_seconds=300)
    with channel_of(folder) as (channel, heard):
        channel.submit(brief)
        channel.submit(lasting)
        later = brief.expires_at + 1
        monkeypatch.setattr(channel_module.time, "time", lambda: later)
        assert channel.take() == [lasting]
        assert [(one, ack.state) for one, ack in heard.outcomes] == [(brief, "expired")]
    assert ledger_of(folder, brief).state == "expired"


def test_more_than_the_queue_holds_is_rejected(folder: RunFolder) -> None:
    with channel_of(folder) as (channel, _):
        states = [channel.submit(command()).state for _ in range(MAX_WAITING + 2)]
        assert states == ["accepted"] * MAX_WAITING + ["rejected"] * 2
        assert len(channel.take()) == MAX_WAITING
        assert channel.submit(command()).state == "accepted"


# ---- restarts ----------------------------------------------------------------------------------------


def abandoned(folder: RunFolder, sent: Command, *states: str) -> None:
    """Leave the folder as a trainer does that is killed after these acks: the inbox file is still there."""
    put(folder, sent)
    for state in states:
        AckLedger(folder.acks).record(Ack(sent.id, state))  # type: ignore[arg-type]


def test_what_a_killed_trainer_had_accepted_is_executed_after_its_restart(folder: RunFolder) -> None:
    sent = command()
    abandoned(folder, sent, "accepted")
    with trainer(folder) as executed:
        wait_for(lambda: ledger_of(folder, sent).state == "done", "executed")
        wait_for(lambda: not list(folder.inbox.iterdir()), "its file is gone")
    assert executed == [sent]


def test_what_a_killed_trainer_was_executing_is_reported_and_not_repeated(folder: RunFolder) -> None:
    sent = command("stop")
    abandoned(folder, sent, "accepted", "running")
    with trainer(folder) as executed:
        wait_for(lambda: ledger_of(folder, sent).state == "failed", "reported")
        assert send_command(folder, sent, timeout_seconds=20).state == "failed"
    assert executed == [] and "ended while it executed" in (ledger_of(folder, sent).error or "")


def test_what_an_older_version_was_executing_is_not_repeated_either(folder: RunFolder) -> None:
    """It wrote `running` into the ack's own file."""
    sent = command("stop")
    (folder.acks / f"{sent.id}.json").write_text(Ack(sent.id, "running").to_json())
    with channel_of(folder) as (channel, _):
        assert channel.submit(sent).state == "failed" and channel.take() == []
    assert [path.name for path in folder.acks.iterdir()] == [f"{sent.id}.json"]


def test_what_is_settled_is_not_executed_again_after_a_restart(folder: RunFolder) -> None:
    sent = command("stop")
    with trainer(folder) as executed:
        send_command(folder, sent, timeout_seconds=20)
    put(folder, sent)
    with trainer(folder) as again:
        wait_for(lambda: not list(folder.inbox.iterdir()), "looked at")
        for door in ("socket", "inbox"):
            ack = send_command(folder, sent, door=door, timeout_seconds=20)  # type: ignore[arg-type]
            assert ack.state == "done"
    assert (executed, again) == ([sent], [])


@pytest.mark.parametrize(("state", "outcome"), [("accepted", "expired"), ("running", "failed")])
def test_what_expired_before_the_restart_is_settled_too(folder: RunFolder, state: str, outcome: str) -> None:
    """Or its sender would wait for ever, and its file lie in the inbox for ever."""
    sent = command(lifetime_seconds=-10)
    abandoned(folder, sent, state)
    with channel_of(folder) as (channel, heard):
        wait_for(lambda: ledger_of(folder, sent).state == outcome, "settled")
        wait_for(lambda: not list(folder.inbox.iterdir()), "its file is gone")
        assert channel.take() == []
        assert [ack.state for _, ack in heard.outcomes] == [outcome]


def test_acks_are_forgotten_only_when_no_replay_can_be_valid(folder: RunFolder) -> None:
    ledger = AckLedger(folder.acks)
    ledger.record(Ack("a", "done"))
    written = (folder.acks / "a.json").stat().st_mtime
    ledger.prune(written + KEEP_SECONDS - 10)
    assert ledger.last("a") is not None
    ledger.prune(written + KEEP_SECONDS + 10)
    assert ledger.last("a") is None


# ---- the end -----------------------------------------------------------------------------------------


def test_stop_rejects_what_waits_removes_the_socket_and_ends_the_thread(folder: RunFolder) -> None:
    by_socket, by_inbox = command(), command()
    with channel_of(folder) as (channel, heard), Caller(folder) as caller:
        caller.say(line(by_socket))
        assert caller.hear()["state"] == "accepted"
        put(folder, by_inbox)
        wait_for(lambda: AckLedger(folder.acks).last(by_inbox.id), "accepted")
        assert control_threads() == ["obsinfra-control"]
        channel.stop()
        channel.stop()
        assert control_threads() == []
        last = caller.hear()
        assert last["state"] == "rejected" and "ended" in last["error"]
        assert caller.hung_up()
        assert {one.id: ack.state for one, ack in heard.outcomes} == {
            by_socket.id: "rejected",
            by_inbox.id: "rejected",
        }
        assert channel.submit(command()).state == "rejected" and channel.take() == []
    assert list(folder.inbox.iterdir()) == [] and not folder.socket.exists()


def test_what_reaches_the_inbox_last_is_rejected_and_not_left_to_a_resumed_run(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "POLL_SECONDS", 60.0)
    sent = command("stop")
    with channel_of(folder):
        wait_for(lambda: folder.socket.exists(), "listening")
        put(folder, sent)  # the thread sleeps in its poll, woken only by stop
    assert ledger_of(folder, sent).state == "rejected"
    assert list(folder.inbox.iterdir()) == []


def test_stop_from_many_threads_at_once_is_one_stop(folder: RunFolder) -> None:
    with channel_of(folder) as (channel, heard):
        channel.submit(command())
        with ThreadPoolExecutor(8) as pool:
            for stopped in [pool.submit(channel.stop) for _ in range(8)]:
                stopped.result()
        assert len(heard.outcomes) == 1 and control_threads() == []


def test_a_command_settled_while_its_file_is_being_taken_in_leaves_no_file(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that is quick settles it before the inbox has noted whose file it is."""
    sent = command()
    with channel_of(folder) as (channel, _):

        def at_once() -> None:
            for one in channel.take():
                done(channel, one)

        monkeypatch.setattr(channel, "_on_arrival", at_once)
        put(folder, sent)
        wait_for(lambda: not list(folder.inbox.iterdir()), "its file is gone")
    assert ledger_of(folder, sent).state == "done"


# ---- disks and callbacks that fail ------------------------------------------------------------------


def test_a_full_disk_for_acks_does_not_lose_the_command_nor_repeat_it(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(ledger: AckLedger, ack: Ack) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AckLedger, "record", full)
    sent = command()
    with trainer(folder) as executed, Caller(folder) as caller:
        caller.say(line(sent))
        assert caller.states(3) == ["accepted", "running", "done"]
        caller.say(line(sent))
        assert caller.hear()["state"] == "done"
        put(folder, sent)
        wait_for(lambda: not list(folder.inbox.iterdir()), "the repetition is settled")
    assert executed == [sent] and list(folder.acks.iterdir()) == []


def test_a_result_that_is_no_json_reaches_neither_the_loop_nor_the_sender_as_an_error(
    folder: RunFolder,
) -> None:
    def obey(channel: ControlChannel, sent: Command) -> None:
        channel.ack(sent.id, "failed", result={"x": float("nan"), "o": object()}, error="e" * 1_000_000)

    with trainer(folder, obey):
        for door in ("socket", "inbox"):
            ack = send_command(folder, command(), door=door, timeout_seconds=20)  # type: ignore[arg-type]
            assert ack.state == "failed" and ack.error is not None and len(ack.error) == 2_000


def test_a_callback_that_raises_keeps_nobody_else_out(folder: RunFolder) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug in a callback")

    heard = Heard()
    channel = ControlChannel(folder, on_garbage=fail, on_outcome=fail, on_arrival=heard.arrived.set)
    (folder.inbox / "0.json").write_text("[]")
    put(folder, command("explode"), "1.json")
    sent = command()
    put(folder, sent, "2.json")
    channel.start()
    try:
        assert taken(channel) == sent
        assert sorted(file.name for file in folder.inbox.iterdir()) == ["2.json"]
        with Caller(folder) as caller:
            caller.say(b"garbage\n" + line(command()))
            assert "error" in caller.hear() and caller.hear()["state"] == "accepted"
            assert len(channel.take()) == 1
    finally:
        channel.stop()


def test_channel_and_sidecar_never_import_torch() -> None:
    code = "import obsinfra.control.channel, obsinfra.control.sidecar, sys; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
