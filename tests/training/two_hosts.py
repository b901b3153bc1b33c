"""Two hosts on this machine: network namespaces joined by a cable that can be cut. By root, with iproute2."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

ADDRESSES = ("10.77.0.1", "10.77.0.2")

why_not = (
    "network namespaces need root"
    if os.geteuid() != 0
    else "no iproute2 is here"
    if shutil.which("ip") is None
    else None
)
"""Why there are no two hosts here; None where there are."""


@dataclass(frozen=True)
class Host:
    """One of them.

    Attributes:
        namespace: name of its network namespace.
        address: its end of the cable.
        interface: the same, as the kernel calls it.
    """

    namespace: str
    address: str
    interface: str

    @property
    def inside(self) -> tuple[str, ...]:
        """What a command line begins with to run there."""
        return ("ip", "netns", "exec", self.namespace)

    def processes(self) -> list[int]:
        """Of everything that runs there."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def lose_power(self) -> None:
        """Everything there is gone at once."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def pull_the_plug(self) -> None:
        """The cable is cut; nobody is told."""
        _ip("-n", self.namespace, "link", "set", self.interface, "down")

    def read(self, url: str) -> str:
        """What a server there answers."""
        code = f"import urllib.request as r; print(r.urlopen({url!r}, timeout=20).read().decode())"
        command = [*self.inside, sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Both, connected; removed afterwards with all that runs there."""
    unique = f"{os.getpid() % 100_000}"
    hosts = tuple(
        Host(f"obsinfra-{unique}-{side}", address, f"ob{unique}{side}")
        for side, address in zip("ab", ADDRESSES, strict=True)
    )
    first, second = hosts
    made: list[Host] = []
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            made.append(host)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        ends = (first.interface, "netns", first.namespace, "type", "veth")
        _ip("link", "add", *ends, "peer", "name", second.interface, "netns", second.namespace)
        for host in hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.namespace, "link", "set", host.interface, "up")
        yield first, second
    finally:
        for host in made:
            host.lose_power()
            _ip("netns", "del", host.namespace)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout
