"""Whatever is pushed through the socket or laid into the inbox: it is counted, and others are still heard."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trainer_double import Caller, Heard, channel_of, command, line, run_folder, trainer
from waiting import wait_for

from obsinfra.control import doors
from obsinfra.control.channel import ControlChannel
from obsinfra.control.client import send_command
from obsinfra.control.command import MAX_COMMAND_BYTES
from obsinfra.control.doors import MAX_CLIENTS
from obsinfra.run.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return run_folder(tmp_path)


def still_works(folder: RunFolder, channel: ControlChannel) -> None:
    """Both doors still bring commands."""
    sent = command()
    with Caller(folder) as caller:
        caller.say(line(sent))
        assert caller.hear()["state"] == "accepted"
    other = command()
    (folder.inbox / f"zz-{other.id}.json").write_bytes(line(other))
    found = [one.id for one in wait_for(channel.take, "a command")]
    while len(found) < 2:
        found += [one.id for one in wait_for(channel.take, "the other command")]
    assert sorted(found) == sorted([sent.id, other.id])


# ---- inbox -------------------------------------------------------------------------------------------


def symlink(place: Path) -> None:
    secret = place.parent.parent / "elsewhere"
    secret.write_bytes(line(command("stop")))
    place.symlink_to(secret)


def dangling_link(place: Path) -> None:
    place.symlink_to(place.parent / "nothing")


def unix_socket(place: Path) -> None:
    with contextlib.chdir(place.parent), socket.socket(socket.AF_UNIX) as made:
        made.bind(place.name)


def huge(place: Path) -> None:
    place.write_bytes(b'{"id": "' + b"x" * (10 << 20))


@pytest.mark.parametrize(
    ("lay", "stays"),
    [
        (symlink, True),
        (dangling_link, True),
        (Path.mkdir, True),
        (os.mkfifo, True),
        (unix_socket, True),
        (huge, False),
        (lambda place: place.write_bytes(b""), False),
        (lambda place: place.write_bytes(b"\x00\xff" * 1000), False),
        (lambda place: place.write_bytes(b'{"id": "../../x"}'), False),
        (lambda place: place.write_bytes(b"[" * 50_000), False),
    ],
    ids=[
        "symlink",
        "dangling_link",
        "directory",
        "fifo",
        "socket",
        "10_MB",
        "empty",
        "binary",
        "bad_id",
        "nested",
    ],
)
def test_what_is_no_command_in_the_inbox_is_counted_once_and_holds_nobody_up(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, lay: Callable[[Path], None], stays: bool
) -> None:
    monkeypatch.setattr(doors, "SETTLE_SECONDS", 0.0)
    place = folder.inbox / "0.json"
    descriptors = psutil.Process().num_fds()
    with channel_of(folder) as (channel, heard):
        lay(place)
        wait_for(lambda: heard.garbage, "counted")
        still_works(folder, channel)
        still_works(folder, channel)
        assert [door for door, _ in heard.garbage] == ["inbox"]
        assert os.path.lexists(place) == stays
        assert (folder.root / "control" / "elsewhere").exists() == (lay is symlink)
    assert psutil.Process().num_fds() <= descriptors


def failing_to_open(place: Path, errors: Iterator[int]) -> Callable[..., int]:
    """`os.open` that fails with these errors when `place` is read."""
    real = os.open

    def flaky(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if path == place and not flags & os.O_CREAT and (error := next(errors, None)):
            raise OSError(error, os.strerror(error))
        return real(path, flags, *more, **named)

    return flaky


def test_an_unreadable_file_is_counted_once(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder.inbox / "0.json"
    monkeypatch.setattr(os, "open", failing_to_open(place, itertools.repeat(errno.EACCES)))
    place.write_bytes(line(command()))
    with channel_of(folder) as (channel, heard):
        wait_for(lambda: heard.garbage, "counted")
        still_works(folder, channel)
        still_works(folder, channel)
        assert len(heard.garbage) == 1 and place.exists()


def test_a_file_written_in_place_slowly_is_taken_once_it_is_complete(folder: RunFolder) -> None:
    sent = command()
    raw, place = line(sent), folder.inbox / "slow.json"
    with channel_of(folder) as (channel, heard), place.open("wb", buffering=0) as file:
        for part in (raw[:10], raw[10:60]):
            file.write(part)
            still_works(folder, channel)  # the inbox was looked at meanwhile
        file.write(raw[60:])
        assert wait_for(channel.take, "taken") == [sent]
        assert heard.garbage == []


def test_half_a_file_from_a_clock_that_is_ahead_does_not_lie_there_for_ever(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "SETTLE_SECONDS", 0.2)
    place = folder.inbox / "half.json"
    with channel_of(folder) as (_, heard):
        place.write_bytes(b'{"id": ')
        os.utime(place, (4e9, 4e9))
        wait_for(lambda: not place.exists(), "removed")
        assert len(heard.garbage) == 1


def test_what_takes_the_place_of_something_ignored_is_looked_at(folder: RunFolder) -> None:
    place, sent = folder.inbox / "0.json", command()
    place.mkdir()
    with channel_of(folder) as (channel, heard):
        wait_for(lambda: heard.garbage, "ignored")
        place.rmdir()
        still_works(folder, channel)
        place.write_bytes(line(sent))
        assert wait_for(channel.take, "taken") == [sent]


def test_a_disk_that_cannot_be_read_for_a_moment_only_delays_a_command(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, place, failures = command(), folder.inbox / "0.json", iter([errno.EIO, errno.EMFILE])
    monkeypatch.setattr(os, "open", failing_to_open(place, failures))
    with channel_of(folder) as (channel, heard):
        place.write_bytes(line(sent))
        assert wait_for(channel.take, "taken") == [sent]
        assert next(failures, None) is None and heard.garbage == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=300), name=st.from_regex(r"[^./\x00][^/\x00]{0,40}", fullmatch=True))
def test_any_content_under_any_name_is_removed(folder: RunFolder, raw: bytes, name: str) -> None:
    seen = Heard()
    place = folder.inbox / f"{name}.json"
    try:
        place.write_bytes(raw)
    except (OSError, UnicodeEncodeError):
        return
    inbox = doors.InboxDoor(folder.inbox, lambda raw, door: seen.garbage.append((door, "")))
    try:
        doors.SETTLE_SECONDS, before = 0.0, doors.SETTLE_SECONDS
        inbox.poll()
        inbox.poll()
    finally:
        doors.SETTLE_SECONDS = before
    assert not place.exists() and len(seen.garbage) == 1


# ---- socket ------------------------------------------------------------------------------------------


def test_garbage_on_the_socket_is_answered_and_the_connection_goes_on(folder: RunFolder) -> None:
    with channel_of(folder) as (channel, heard), Caller(folder) as caller:
        caller.say(b"\x00\xff\n" + b"\n \n" + b"[]\n" + line(command()))
        assert [list(caller.hear()) for _ in range(2)] == [["error"], ["error"]]
        assert caller.hear()["state"] == "accepted"
        assert [door for door, _ in heard.garbage] == ["socket"] * 2
        assert len(channel.take()) == 1


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_of_10_mb_ends_its_connection_and_no_other(folder: RunFolder, end: bytes) -> None:
    with channel_of(folder) as (channel, heard), Caller(folder) as caller:
        with contextlib.suppress(OSError):  # it hangs up before it has read all of it
            caller.say(b'{"id": "' + b"x" * (10 << 20) + end)
        assert caller.hung_up()
        assert len(heard.garbage) >= 1 and all(len(why) < 300 for _, why in heard.garbage)
        still_works(folder, channel)


def test_a_command_in_small_pieces_is_heard_and_its_connection_blocks_nobody(folder: RunFolder) -> None:
    sent = command()
    raw = line(sent)
    with channel_of(folder) as (channel, _), Caller(folder) as slow:
        slow.say(raw[:20])
        still_works(folder, channel)
        slow.say(raw[20:-1])
        still_works(folder, channel)
        slow.say(b"\n")
        assert slow.hear()["state"] == "accepted"
        assert channel.take() == [sent]


def test_a_last_line_without_its_newline_counts_when_the_sender_is_done(folder: RunFolder) -> None:
    sent = command()
    with channel_of(folder) as (channel, _), Caller(folder) as caller:
        caller.say(line(sent).rstrip())
        caller.socket.shutdown(socket.SHUT_WR)
        assert caller.hear()["state"] == "accepted"
        assert channel.take() == [sent]
        still_works(folder, channel)


def test_more_clients_than_there_is_room_for_push_out_the_oldest(folder: RunFolder) -> None:
    with channel_of(folder) as (channel, _), contextlib.ExitStack() as open_ones:
        callers = [open_ones.enter_context(Caller(folder)) for _ in range(MAX_CLIENTS + 1)]
        callers[-1].say(line(command()))
        assert callers[-1].hear()["state"] == "accepted"
        assert callers[0].hung_up()
        callers[1].say(line(command()))
        assert callers[1].hear()["state"] == "accepted"
        assert len(channel.take()) == 2
        still_works(folder, channel)


def test_who_does_not_read_is_dropped_and_blocks_nobody(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "MAX_UNSENT_BYTES", 10_000)
    with channel_of(folder) as (channel, _), Caller(folder) as deaf:
        deaf.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.socket.settimeout(0.2)
        with contextlib.suppress(OSError):
            for _ in range(2_000):
                deaf.say(b"x\n" * 20_000)
        deaf.socket.settimeout(10)
        still_works(folder, channel)
        with pytest.raises(OSError):
            while True:
                deaf.say(b"x\n" * 20_000)


def test_who_leaves_at_once_leaves_nothing_behind(folder: RunFolder) -> None:
    with channel_of(folder) as (channel, _):
        still_works(folder, channel)
        before = psutil.Process().num_fds()
        for _ in range(100):
            with Caller(folder) as caller:
                caller.say(line(command("explode"))[:30])
        still_works(folder, channel)
        wait_for(lambda: psutil.Process().num_fds() <= before, "descriptors are given back")


def test_a_left_over_socket_file_is_replaced(folder: RunFolder) -> None:
    with socket.socket(socket.AF_UNIX) as killed, contextlib.chdir(folder.control):
        killed.bind("control.sock")
    with channel_of(folder) as (channel, _):
        still_works(folder, channel)


# ---- forks -------------------------------------------------------------------------------------------


@pytest.fixture
def fork() -> Iterator[Callable[[], int]]:
    """Forks children that do nothing until the test ends, as a data-loader worker waits for work."""
    children: list[int] = []
    reader, writer = os.pipe()

    def make() -> int:
        pid = os.fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        children.append(pid)
        return pid

    yield make
    os.close(writer)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    os.close(reader)


def unix_sockets_of(pid: int) -> list[str]:
    return [one.laddr for one in psutil.Process(pid).net_connections("unix")]


def test_a_forked_child_holds_neither_the_listening_socket_nor_connections(
    folder: RunFolder, fork: Callable[[], int]
) -> None:
    with channel_of(folder) as (channel, _), Caller(folder) as caller:
        caller.say(line(command()))
        assert caller.hear()["state"] == "accepted"
        assert str(folder.socket) in unix_sockets_of(os.getpid())
        assert len(channel.take()) == 1
        child = fork()
        wait_for(lambda: str(folder.socket) not in unix_sockets_of(child), "the child has closed its copies")
        still_works(folder, channel)  # closing them did not hurt the parent
        channel.stop()
        assert psutil.pid_exists(child)
        assert caller.hung_up()
        with pytest.raises(OSError):
            Caller(folder)


def test_connections_end_for_a_child_forked_behind_our_back_too(
    folder: RunFolder, fork: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy nobody could close in the child must not keep a client waiting: shutdown reaches it."""
    with channel_of(folder) as (channel, _), Caller(folder) as caller:
        caller.say(line(command()))
        assert caller.hear()["state"] == "accepted"
        monkeypatch.setattr(doors, "_doors", [])
        fork()
        channel.stop()
        assert caller.hear()["state"] == "rejected" and caller.hung_up()


def test_a_client_at_the_far_end_of_a_flood_gets_its_turn(folder: RunFolder) -> None:
    with trainer(folder), contextlib.ExitStack() as open_ones:
        for _ in range(8):
            flooder = open_ones.enter_context(Caller(folder))
            flooder.say(line(command("explode")) * 100)
        assert send_command(folder, command(), door="socket", timeout_seconds=30).state == "done"
        assert len(line(command())) * 100 < MAX_COMMAND_BYTES
