"""A run as the control channel sees it: a folder, a channel, somebody who takes commands and acks them."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from obsinfra.control.channel import ControlChannel
from obsinfra.control.command import Ack, Command, new_command
from obsinfra.control.unix_address import short_address
from obsinfra.run.folder import RunFolder, RunInfo
from obsinfra.run.process import ProcessId


def run_folder(output_dir: Path, run: str = "r1", **info: Any) -> RunFolder:
    """The folder of a run that this very process trains."""
    folder = RunFolder(output_dir / run)
    folder.create()
    folder.write_info(
        RunInfo(
            **{
                "id": run,
                "model": "digits",
                "state": "running",
                "processes": {"0": asdict(ProcessId.current())},
                "metrics_urls": {"0": "http://127.0.0.1:9464/metrics"},
                **info,
            }
        )
    )
    return folder


def command(action: str = "checkpoint", run: str = "r1", **more: Any) -> Command:
    return new_command(run, action, **{"source": "test", **more})


def line(command: Command, **changes: Any) -> bytes:
    """A command as it goes over the socket, with fields changed at will."""
    return json.dumps({**asdict(command), **changes}).encode() + b"\n"


class Heard:
    """What a channel reported by its callbacks."""

    def __init__(self) -> None:
        self.garbage: list[tuple[str, str]] = []
        self.outcomes: list[tuple[Command, Ack]] = []
        self.arrived = threading.Event()

    def on_garbage(self, door: str, why: str) -> None:
        self.garbage.append((door, why))

    def on_outcome(self, command: Command, ack: Ack) -> None:
        self.outcomes.append((command, ack))


@contextlib.contextmanager
def channel_of(folder: RunFolder) -> Iterator[tuple[ControlChannel, Heard]]:
    """A started channel that is stopped at the end, whatever happened."""
    heard = Heard()
    channel = ControlChannel(
        folder,
        on_garbage=heard.on_garbage,
        on_outcome=heard.on_outcome,
        on_arrival=heard.arrived.set,
    )
    channel.start()
    try:
        yield channel, heard
    finally:
        channel.stop()


def done(channel: ControlChannel, command: Command) -> None:
    channel.ack(command.id, "running", step=7)
    channel.ack(command.id, "done", step=7, result={"path": "m.json"})


@contextlib.contextmanager
def trainer(
    folder: RunFolder, obey: Callable[[ControlChannel, Command], None] = done
) -> Iterator[list[Command]]:
    """A channel with a thread that takes what comes; yields the list of what was executed."""
    executed: list[Command] = []
    ended = threading.Event()
    with channel_of(folder) as (channel, heard):

        def loop() -> None:
            while not ended.is_set():
                heard.arrived.wait(0.05)
                heard.arrived.clear()
                for taken in channel.take():
                    executed.append(taken)
                    obey(channel, taken)

        thread = threading.Thread(target=loop, name="trainer-double")
        thread.start()
        try:
            yield executed
        finally:
            ended.set()
            thread.join()


class Caller:
    """A raw client of the control socket."""

    def __init__(self, folder: RunFolder, seconds: float = 10.0) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(seconds)
        with short_address(folder.socket) as address:
            self.socket.connect(address)
        self._lines = self.socket.makefile("rb")

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self.socket.close()

    def say(self, raw: bytes) -> None:
        self.socket.sendall(raw)

    def hear(self) -> dict[str, Any]:
        """The next line; fails when the connection ends or is silent for long."""
        found = self._lines.readline()
        assert found, "the channel hung up"
        document: dict[str, Any] = json.loads(found)
        return document

    def states(self, count: int) -> list[str]:
        return [self.hear()["state"] for _ in range(count)]

    def until(self, state: str) -> list[str]:
        """States heard up to and with `state`; one may come twice when it was asked for at that moment."""
        heard = self.states(1)
        while heard[-1] != state:
            heard += self.states(1)
        return list(dict.fromkeys(heard))

    def hung_up(self) -> bool:
        """Whether the other end closes the connection, after whatever it still says."""
        try:
            while self._lines.readline():
                pass
        except ConnectionResetError:
            pass
        return True
