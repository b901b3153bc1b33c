"""Giving a run a command, by `send_command` and by `obsinfra signal`: by either door, with a clear end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trainer_double import Caller, channel_of, command, done, run_folder, trainer
from typer.testing import CliRunner
from waiting import wait_for

from obsinfra.cli.main import app
from obsinfra.control.channel import ControlChannel
from obsinfra.control.client import NoAnswerError, send_command
from obsinfra.control.command import Ack, Command
from obsinfra.errors import CommandError, ObsinfraError
from obsinfra.run.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return run_folder(tmp_path)


def inbox_of(folder: RunFolder) -> list[str]:
    return sorted(file.name for file in folder.inbox.iterdir())


@pytest.fixture
def hang_up(folder: RunFolder) -> Iterator[Callable[[], int]]:
    """Something listens at the socket, reads a command and dies; returns how many it has read."""
    read: list[bytes] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder.socket))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            read.append(connection.recv(65_536))
            connection.sendall(b'{"id": "half')

    thread = threading.Thread(target=serve)
    thread.start()
    yield lambda: len(read)
    thread.join()
    listener.close()


def test_a_socket_that_breaks_in_between_gives_way_to_the_inbox(
    folder: RunFolder, hang_up: Callable[[], int]
) -> None:
    sent = command()
    answers: list[Ack] = []
    asking = threading.Thread(target=lambda: answers.append(send_command(folder, sent, timeout_seconds=20)))
    asking.start()
    wait_for(lambda: inbox_of(folder) == [f"{sent.id}.json"], "it went on through the inbox")
    assert hang_up() == 1
    with trainer(folder) as executed:
        asking.join()
    assert [ack.state for ack in answers] == ["done"] and executed == [sent]


def test_a_socket_that_breaks_is_an_error_when_only_the_socket_was_wanted(
    folder: RunFolder, hang_up: Callable[[], int]
) -> None:
    with pytest.raises(CommandError, match=r"the trainer hung up.*--door inbox"):
        send_command(folder, command(), door="socket", timeout_seconds=20)
    assert inbox_of(folder) == []


def test_a_closed_socket_is_an_error_when_only_the_socket_was_wanted(folder: RunFolder) -> None:
    with pytest.raises(CommandError, match="socket of run r1 is closed"):
        send_command(folder, command(), door="socket")


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_an_ended_run_is_refused_at_once_and_nothing_is_left_in_its_folder(
    folder: RunFolder, state: str
) -> None:
    folder.update_info(state=state)
    with pytest.raises(CommandError, match=rf"has ended \({state}\)"):
        send_command(folder, command())
    assert inbox_of(folder) == []


def test_a_run_that_ends_while_its_inbox_is_waited_at_is_not_waited_for(folder: RunFolder) -> None:
    """And the command is taken back: a run resumed later must not obey it."""
    errors: list[CommandError] = []

    def ask() -> None:
        try:
            send_command(folder, command("stop"), door="inbox", timeout_seconds=60)
        except CommandError as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: inbox_of(folder), "it waits")
    folder.update_info(state="failed")
    asking.join(timeout=20)
    assert len(errors) == 1 and "has ended (failed)" in str(errors[0])
    assert not isinstance(errors[0], NoAnswerError) and inbox_of(folder) == []


@pytest.mark.parametrize("door", ["socket", "inbox"])
def test_no_final_ack_in_time_is_said_and_the_command_stays_valid(folder: RunFolder, door: str) -> None:
    sent = command()
    with channel_of(folder) as (channel, _):
        with pytest.raises(NoAnswerError, match="did not answer checkpoint in time"):
            send_command(folder, sent, door=door, timeout_seconds=0.3)  # type: ignore[arg-type]
        assert wait_for(channel.take, "it was heard all the same") == [sent]


@pytest.mark.parametrize("door", ["socket", "inbox"])
def test_accepted_is_enough_where_nobody_waits_for_the_end(folder: RunFolder, door: str) -> None:
    sent = command()
    with channel_of(folder) as (channel, _):
        ack = send_command(folder, sent, door=door, timeout_seconds=20, wait_for="accepted")  # type: ignore[arg-type]
        assert (ack.id, ack.state) == (sent.id, "accepted")
        assert wait_for(channel.take, "it waits for the loop") == [sent]


def test_a_missing_inbox_is_named(folder: RunFolder) -> None:
    folder.inbox.rmdir()
    with pytest.raises(CommandError, match="cannot write"):
        send_command(folder, command(), timeout_seconds=1)


def test_a_folder_that_is_no_run_is_an_error_for_people(tmp_path: Path) -> None:
    with pytest.raises(ObsinfraError, match="no run at"):
        send_command(RunFolder(tmp_path / "nothing"), command())


def test_a_message_the_trainer_cannot_read_is_said_to_its_sender(folder: RunFolder) -> None:
    with trainer(folder), pytest.raises(CommandError, match="the trainer refused the message: not a command"):
        send_command(folder, command(reason="\\ud800", id="a b"), door="socket", timeout_seconds=20)


# ---- obsinfra signal -------------------------------------------------------------------------------


def signal(folder: RunFolder, *arguments: str) -> tuple[int, str]:
    """Exit code and output; an `ObsinfraError` counts as `main` makes it count."""
    found = CliRunner().invoke(app, ["signal", *arguments, "--output-dir", str(folder.root.parent)])
    if isinstance(found.exception, ObsinfraError):
        return found.exception.exit_code, str(found.exception)
    return found.exit_code, found.output


@pytest.mark.parametrize("door", ["auto", "socket", "inbox"])
@pytest.mark.parametrize("run", ["r1", "latest"])
def test_signal_tells_what_came_of_it(folder: RunFolder, door: str, run: str) -> None:
    with trainer(folder) as executed:
        code, output = signal(folder, run, "stop", "--door", door, "--reason", "enough")
    assert code == 0 and "stop done at step 7\n  path  m.json" in output
    assert [(one.action, one.reason, one.source) for one in executed] == [("stop", "enough", "cli")]


@pytest.mark.parametrize("door", ["socket", "inbox"])
def test_signal_ends_with_1_when_the_trainer_could_not_do_it(folder: RunFolder, door: str) -> None:
    def fail(channel: ControlChannel, sent: Command) -> None:
        channel.ack(sent.id, "failed", error="disk full")

    with trainer(folder, fail):
        assert signal(folder, "r1", "checkpoint", "--door", door) == (1, "checkpoint failed: disk full")


def test_signal_does_not_wait_when_told_so(folder: RunFolder) -> None:
    with channel_of(folder) as (channel, _):
        code, output = signal(folder, "r1", "checkpoint", "--no-wait")
        assert code == 0 and "checkpoint accepted" in output
        done(channel, channel.take()[0])


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("r1", "explode"), 2, "emergency_checkpoint"),
        (("r1", "stop", "--door", "window"), 2, "auto, socket or inbox"),
        (("r2", "stop"), 2, "no run 'r2'"),
        (("../r1", "stop"), 2, "run name '../r1'"),
        (("r1", "stop", "--door", "socket"), 1, "is closed"),
        (("r1", "stop", "--door", "inbox", "--timeout", "0.1"), 1, "did not answer"),
    ],
)
def test_signal_says_what_was_wrong(
    folder: RunFolder, arguments: tuple[str, ...], code: int, says: str
) -> None:
    found = signal(folder, *arguments)
    assert found[0] == code and says in found[1]


def test_the_command_line_prints_one_line_and_no_traceback(folder: RunFolder) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "obsinfra.cli.main", "signal", "r1", "explode"],
        env=os.environ | {"OUTPUT_DIR": str(folder.root.parent)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("error: action 'explode'") and found.stderr.count("\n") == 1


def test_a_caller_that_hears_of_somebody_elses_command_waits_for_its_own(folder: RunFolder) -> None:
    with trainer(folder), Caller(folder) as other:
        other.say(b"garbage\n")
        assert "error" in other.hear()
        assert send_command(folder, command(), door="socket", timeout_seconds=20).state == "done"
