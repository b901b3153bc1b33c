"""Which TCP ports the stack listens on, and finding free ones. For both ways to run it, and the doctor."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

from obsinfra.errors import ConfigError

PORTS_TRIED = 100


@dataclass(frozen=True, slots=True)
class StackPorts:
    """TCP ports to listen on; one that is taken gives way to the next free one, 0 is any free one."""

    prometheus: int = 9090
    alertmanager: int = 9093
    sidecar: int = 9465


@dataclass(frozen=True, slots=True)
class ComposePorts(StackPorts):
    """The same for the stack in containers, which is more: what it publishes on 127.0.0.1."""

    grafana: int = 3000
    jaeger: int = 16686
    otlp: int = 4318
    mailpit: int = 8025


DEFAULT_PORTS = StackPorts()
DEFAULT_COMPOSE_PORTS = ComposePorts()

Ports = TypeVar("Ports", bound=StackPorts)


def wanted_ports(default: Ports) -> Ports:
    """`default` with what the environment says: OBSINFRA_PORT_PROMETHEUS and the like.

    Raises:
        ConfigError: one of them is no port.
    """
    changes = {}
    for name in asdict(default):
        variable = f"OBSINFRA_PORT_{name.upper()}"
        text = os.environ.get(variable, "")
        if not text:
            continue
        if not (text.isascii() and text.isdigit() and int(text) < 65536):
            raise ConfigError(f"{variable}={text!r}", "a port, 0 to 65535", f"correct or unset {variable}")
        changes[name] = int(text)
    return replace(default, **changes)


def free_ports(host: str, wanted: Ports) -> Ports:
    """For each wanted port itself or the next free one; all different."""
    found: dict[str, int] = {}
    for name, port in asdict(wanted).items():
        found[name] = free_port(host, port, set(found.values()))
    return type(wanted)(**found)


def free_port(host: str, wanted: int, used: set[int]) -> int:
    """`wanted` or the next port that can be listened on and is not in `used`; 0 takes any.

    Raises:
        ConfigError: `host` is no address of this machine, or nothing is free.
    """
    candidates = [port for port in range(wanted, min(wanted + PORTS_TRIED, 65536)) if wanted] + [0] * 5
    for port in candidates:
        if port in used:
            continue
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As servers do, so that a port only in TIME_WAIT counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except PermissionError:
                continue
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
                    raise ConfigError(
                        f"cannot listen on {host}: {error.strerror}", "an address of this machine"
                    ) from error
                continue
            bound = int(probe.getsockname()[1])
            if bound not in used:
                return bound
    raise ConfigError(f"no free port from {wanted} on", "a free TCP port", "stop what uses them")


def in_url(host: str) -> str:
    """The host as a URL wants it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host
