"""The other end of the control channel: giving a command to a run and hearing what became of it.

Used by the sidecar and the CLI. Any process of the run's user may be a client.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable
from typing import Literal

from obsinfra.control.command import MAX_COMMAND_BYTES, Ack, Command, parse_ack
from obsinfra.control.ledger import AckLedger
from obsinfra.control.unix_address import short_address
from obsinfra.errors import CommandError
from obsinfra.run.files import write_atomic
from obsinfra.run.folder import ENDED_STATES, RunFolder

Door = Literal["auto", "socket", "inbox"]
ACK_POLL_SECONDS = 0.05
"""Between two looks for an ack's file: through a bind mount no event tells of it."""
RUN_POLL_SECONDS = 1.0
"""How often a client that waits at the inbox asks whether the run has ended meanwhile."""

CONNECT_SECONDS = 2.0


class NoAnswerError(CommandError):
    """The run did not answer in time; the command may still take effect until it expires."""


class NotUnderstoodError(CommandError):
    """The trainer cannot read the message; it will not do so the next time either."""


class _DoorClosed(Exception):
    """The socket cannot be used, or broke before the final ack."""


def send_command(
    folder: RunFolder,
    command: Command,
    *,
    door: Door = "auto",
    timeout_seconds: float = 60.0,
    wait_for: Literal["accepted", "final"] = "final",
    taken: Callable[[], None] = lambda: None,
) -> Ack:
    """Give `command` to the run and wait for its ack.

    Args:
        folder: the run's folder.
        door: `socket`, `inbox` (works across a bind mount and without a listening socket), or `auto`: the
            socket, and the inbox where it is closed or breaks. The id keeps it from taking effect twice.
        timeout_seconds: how long to wait.
        wait_for: `accepted` returns at the first ack.
        taken: called at each ack: the run has the command.

    Raises:
        NoAnswerError: no such ack in time.
        CommandError: the run has ended, the door is closed, or the command cannot be handed over.
    """
    _check_not_ended(folder)
    deadline = time.monotonic() + timeout_seconds
    if door != "inbox":
        try:
            return _by_socket(folder, command, deadline, wait_for, taken)
        except _DoorClosed as closed:
            if door == "socket":
                raise CommandError(
                    f"the control socket of run {folder.id} is closed ({closed}); "
                    "expected a running trainer; fix: try --door inbox"
                ) from None
    return _by_inbox(folder, command, deadline, wait_for, taken)


def _by_socket(
    folder: RunFolder, command: Command, deadline: float, wait_for: str, taken: Callable[[], None]
) -> Ack:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.closing(connection):
        try:
            connection.settimeout(CONNECT_SECONDS)
            with short_address(folder.socket) as address:
                connection.connect(address)
            connection.sendall(command.to_json().encode() + b"\n")
        except OSError as error:
            raise _DoorClosed(error.strerror or str(error)) from None
        unread = b""
        while True:
            line, newline, rest = unread.partition(b"\n")
            if newline:
                unread = rest
                ack = _answer(line)
                if ack.id == command.id:
                    taken()
                    if ack.final or wait_for == "accepted":
                        return ack
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                raise _no_answer(folder, command)
            connection.settimeout(left)
            try:
                found = connection.recv(MAX_COMMAND_BYTES)
            except TimeoutError:
                raise _no_answer(folder, command) from None
            except OSError as error:
                raise _DoorClosed(error.strerror or str(error)) from None
            if not found:
                raise _DoorClosed("the trainer hung up")
            unread += found


def _answer(line: bytes) -> Ack:
    """An ack; or raises what a trainer says of a message it cannot read."""
    try:
        return parse_ack(line)
    except CommandError:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            raise NotUnderstoodError(
                f"the trainer refused the message: {json.loads(line)['error']}"
            ) from None
        raise


def _by_inbox(
    folder: RunFolder, command: Command, deadline: float, wait_for: str, taken: Callable[[], None]
) -> Ack:
    ledger = AckLedger(folder.acks)
    if (known := ledger.last(command.id)) is not None and known.final:
        return known
    target = folder.inbox / f"{command.id}.json"
    try:
        write_atomic(target, command.to_json() + "\n")
    except OSError as error:
        raise CommandError(f"cannot write {target}: {error.strerror or error}") from error
    look_again = time.monotonic() + RUN_POLL_SECONDS
    while True:
        if (ack := ledger.last(command.id)) is not None:
            taken()
            if ack.final or wait_for == "accepted":
                return ack
        now = time.monotonic()
        if now > deadline:
            raise _no_answer(folder, command)
        if now > look_again:
            look_again = now + RUN_POLL_SECONDS
            try:
                _check_not_ended(folder)
            except CommandError:
                if (ack := ledger.last(command.id)) is not None and ack.final:
                    return ack
                target.unlink(missing_ok=True)  # a run resumed later must not obey it
                raise
        time.sleep(ACK_POLL_SECONDS)


def _check_not_ended(folder: RunFolder) -> None:
    state = folder.read_info().state
    if state in ENDED_STATES:
        raise CommandError(f"run {folder.id} has ended ({state}); expected a running one")


def _no_answer(folder: RunFolder, command: Command) -> NoAnswerError:
    return NoAnswerError(
        f"run {folder.id} did not answer {command.action} in time; expected an ack; fix: see "
        f"'obsinfra status {folder.id}'; the command stays valid until it expires"
    )
