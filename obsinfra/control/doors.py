"""The two doors of the control channel: a Unix socket and the folder `inbox/`.

Both are passive: the channel's thread polls them and takes in what they bring. They know bytes and acks,
not what a command means.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from obsinfra.control.command import MAX_COMMAND_BYTES, Ack
from obsinfra.control.unix_address import short_address

MAX_CLIENTS = 32
MAX_UNSENT_BYTES = 1 << 20
MAX_FILES_A_POLL = 200
SETTLE_SECONDS = 1.0
"""An inbox file that cannot be read as a command yet may still be being written for this long."""

CHUNK = 64 * 1024

NO_DESCRIPTOR_SECONDS = 0.05
"""Pause before the next attempt to let a client in when this process has no descriptor left."""

Receive = Callable[[bytes, str], Ack | None]
"""Takes one message and the door's name; returns the ack to answer with, None for garbage."""


@dataclass(slots=True, eq=False)
class _Client:
    connection: socket.socket
    unread: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    ids: set[str] = field(default_factory=set)
    ending: bool = False


class SocketDoor:
    """A listening Unix stream socket, 0600: one command a line in, acks a line each out.

    Whoever sent a command hears every ack of it until the connection, or the client's half of it, is closed.
    All methods but `publish` and `wake` are for the one thread that polls.

    Args:
        path: where to listen; what lies there is removed first.
        receive: called with each line.

    Raises:
        OSError: the file system has no sockets, or no more descriptors.
    """

    def __init__(self, path: Path, receive: Receive) -> None:
        self._path = path
        self._receive = receive
        self._clients: list[_Client] = []
        self._published: deque[Ack] = deque(maxlen=10_000)
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.setblocking(False)
            path.unlink(missing_ok=True)
            with short_address(path) as address:
                self._listener.bind(address)
            path.chmod(0o600)
            self._listener.listen(128)
        except OSError:
            for end in (self._listener, self._wake_reader, self._wake_writer):
                end.close()
            self._selector.close()
            raise
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, None)
        _doors.append(self)

    def publish(self, ack: Ack) -> None:
        """Send `ack` to whoever asked for its command; any thread."""
        self._published.append(ack)
        self.wake()

    def wake(self) -> None:
        """Let a poll under way return soon; any thread."""
        with contextlib.suppress(OSError):  # full means it is awake already
            self._wake_writer.send(b"x")

    def poll(self, seconds: float) -> None:
        """Serve everybody, waiting at most `seconds` for something to happen."""
        for key, mask in self._selector.select(seconds):
            if key.fileobj is self._listener:
                self._welcome()
            elif key.fileobj is self._wake_reader:
                with contextlib.suppress(BlockingIOError):
                    self._wake_reader.recv(4096)
            else:
                client: _Client = key.data
                if mask & selectors.EVENT_READ:
                    self._read(client)
                if mask & selectors.EVENT_WRITE and client in self._clients:
                    self._send(client)
        while self._published:
            ack = self._published.popleft()
            for client in [client for client in self._clients if ack.id in client.ids]:
                if ack.final:
                    client.ids.discard(ack.id)
                self._say(client, ack.to_json())

    def close(self, linger_seconds: float = 1.0) -> None:
        """Deliver what is unsent for at most `linger_seconds`, then close and remove the socket."""
        self._selector.unregister(self._listener)
        _end(self._listener)
        with contextlib.suppress(OSError):
            self._path.unlink()
        deadline = time.monotonic() + linger_seconds
        self.poll(0)
        while any(client.unsent for client in self._clients) and time.monotonic() < deadline:
            self.poll(0.05)
        for client in list(self._clients):
            self._drop(client)
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()
        if self in _doors:
            _doors.remove(self)

    def _welcome(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # it stays at the door; look again a bit later
                time.sleep(NO_DESCRIPTOR_SECONDS)
            return
        connection.setblocking(False)
        if len(self._clients) >= MAX_CLIENTS:
            self._drop(self._clients[0])
        client = _Client(connection)
        self._clients.append(client)
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _read(self, client: _Client) -> None:
        try:
            found = client.connection.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        if not found:
            if client.unread.strip():
                self._take(client, bytes(client.unread))
            self._drop(client)
            return
        client.unread += found
        while (end := client.unread.find(b"\n")) >= 0 and client in self._clients:
            line = bytes(client.unread[:end])
            del client.unread[: end + 1]
            if line.strip():
                self._take(client, line)
        if len(client.unread) > MAX_COMMAND_BYTES:
            self._take(client, bytes(client.unread[: MAX_COMMAND_BYTES + 1]))
            client.unread.clear()
            client.ending = True
            self._send(client)

    def _take(self, client: _Client, line: bytes) -> None:
        ack = self._receive(line, "socket")
        if ack is None:
            self._say(client, json.dumps({"error": "not a command; see obsinfra command --help"}))
            return
        if not ack.final:
            client.ids.add(ack.id)
        self._say(client, ack.to_json())

    def _say(self, client: _Client, line: str) -> None:
        client.unsent += line.encode() + b"\n"
        self._send(client)

    def _send(self, client: _Client) -> None:
        try:
            while client.unsent:
                sent = client.connection.send(client.unsent)
                del client.unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if len(client.unsent) > MAX_UNSENT_BYTES or (client.ending and not client.unsent):
            self._drop(client)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.unsent else 0)
        self._selector.modify(client.connection, wanted, client)

    def _drop(self, client: _Client) -> None:
        if client in self._clients:
            self._clients.remove(client)
            self._selector.unregister(client.connection)
            _end(client.connection)

    def _close_in_child(self) -> None:
        self._selector.close()
        for end in (self._listener, self._wake_reader, self._wake_writer):
            end.close()
        for client in self._clients:
            client.connection.close()


class InboxDoor:
    """The folder `inbox/`: one command a file `*.json`, written whole by a rename.

    A file stays until its command is settled, so that a killed trainer finds it again. Files that are no
    commands are removed.

    Args:
        folder: exists; 0700.
        receive: called with each file's content.
    """

    def __init__(self, folder: Path, receive: Receive) -> None:
        self._folder = folder
        self._receive = receive
        self._lock = threading.Lock()
        self._names: dict[str, str] = {}
        self._settled: set[str] = set()
        self._ignored: set[str] = set()
        self._unfinished: dict[str, tuple[tuple[int, int], float]] = {}

    def poll(self) -> None:
        """Take in what is new."""
        try:
            with os.scandir(self._folder) as entries:
                present = {
                    entry.name
                    for entry in entries
                    if entry.name.endswith(".json") and not entry.name.startswith(".")
                }
        except OSError:  # removed or unreadable: the socket still works
            return
        self._unfinished = {name: seen for name, seen in self._unfinished.items() if name in present}
        with self._lock:
            self._ignored &= present
            self._settled.clear()
            names = sorted(present - self._names.keys() - self._ignored)
        for name in names[:MAX_FILES_A_POLL]:
            self._take(name)

    def settled(self, id: str) -> None:
        """A command got its final ack: its file goes. Any thread."""
        with self._lock:
            self._settled.add(id)  # its file may be under way in `_take`
            names = [name for name, owner in self._names.items() if owner == id]
        for name in names:
            self._remove(name)

    def _take(self, name: str) -> None:
        try:
            status, raw = _read(self._folder / name)
        except OSError as error:  # a lack of descriptors passes; a link or forbidden file stays what it is
            if error.errno in (errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO):
                self._ignore(name)
            return
        if not stat.S_ISREG(status.st_mode):
            self._ignore(name)
            return
        if _may_be_unfinished(raw) and self._changed_lately(name, status):
            return  # somebody writes it in place; looked at again in the next poll
        ack = self._receive(raw, "inbox")
        with self._lock:
            done = ack is None or ack.final or ack.id in self._settled
            if ack is not None and not done:
                self._names[name] = ack.id
        if done:
            self._remove(name)

    def _changed_lately(self, name: str, status: os.stat_result) -> bool:
        """By what was seen here: the clock of who writes it may be another one."""
        state, now = (status.st_size, status.st_mtime_ns), time.monotonic()
        before = self._unfinished.get(name)
        if before is None or before[0] != state:
            self._unfinished[name] = (state, now)
            return True
        return now - before[1] < SETTLE_SECONDS

    def _ignore(self, name: str) -> None:
        """What is no file of ours to read or remove is reported once, and passed over while it is there."""
        with self._lock:
            self._ignored.add(name)
        self._receive(b"", "inbox")

    def _remove(self, name: str) -> None:
        try:
            (self._folder / name).unlink(missing_ok=True)
        except OSError:  # read-only by now: once is enough
            with self._lock:
                self._ignored.add(name)
        with self._lock:
            self._names.pop(name, None)


def _read(path: Path) -> tuple[os.stat_result, bytes]:
    """Status and content of a file; of what is no regular file, no content. Never waits for a writer."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status, raw = os.fstat(fd), bytearray()
        while stat.S_ISREG(status.st_mode) and len(raw) <= MAX_COMMAND_BYTES:
            if not (part := os.read(fd, MAX_COMMAND_BYTES + 1 - len(raw))):
                break
            raw += part
        return status, bytes(raw)
    finally:
        os.close(fd)


def _end(connection: socket.socket) -> None:
    """Close it for every process that may hold a copy, a child forked at a bad moment included."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def _may_be_unfinished(raw: bytes) -> bool:
    if len(raw) > MAX_COMMAND_BYTES:
        return False
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return True
    return False


_doors: list[SocketDoor] = []


def _in_forked_child() -> None:
    """A forked child (a data-loader worker) must hold neither the socket nor its connections."""
    for door in _doors:
        door._close_in_child()
    _doors.clear()


os.register_at_fork(after_in_child=_in_forked_child)
