"""torchrun's c10d rendezvous, with one store for all groups of a launch, whoever joins or leaves.

torchrun (torch 2.13) lets the host of rank 0 serve a store, and has it tell the address only in the first
round it takes part in. A host that comes later waits for that in vain, and where it becomes rank 0, the
others go on with the store they had. Here the address is the rendezvous endpoint's from the start: a store
that is there already, reachable for all hosts, and bound to survive. It is registered by torch's interface
for rendezvous handlers; everything else is torch's own.
"""

from __future__ import annotations

import os
import socket

import psutil
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import (
    DEFAULT_PORT,
    C10dRendezvousBackend,
    create_backend,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from obsinfra.cli.launch import BACKEND


def register() -> None:
    """Make `BACKEND` known to torchrun in this process. May be called again."""
    rendezvous_handler_registry.register(BACKEND, _create)


READ_TIMEOUT_SECONDS = 60
"""Torch's default for `read_timeout` of `--rdzv-conf`."""


def _give_up_on_a_dead_link(port: int, seconds: float) -> None:
    """Have the kernel end connections to a store when nothing is acknowledged for so long.

    The store's client waits in `recv` without a time limit. After a cable is cut that lasts until TCP itself
    gives up, a quarter of an hour by Linux's defaults; this host's launcher would neither go on nor end.
    """
    if not hasattr(socket, "TCP_USER_TIMEOUT"):  # not Linux
        return
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and connection.raddr.port == port:
            with socket.socket(fileno=os.dup(connection.fd)) as same:
                same.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))


class _Backend(C10dRendezvousBackend):
    """Under the name it is registered by."""

    @property
    def name(self) -> str:
        return BACKEND


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    host, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=DEFAULT_PORT)
    if parameters.local_addr == host:
        # torchrun compares the endpoint with what this host's name resolves to, which may be another of its
        # addresses, or none; then every host would wait for another one to serve the store.
        parameters.config.setdefault("is_host", "true")
    _, store = create_backend(parameters)
    _give_up_on_a_dead_link(port, seconds=float(parameters.get("read_timeout", READ_TIMEOUT_SECONDS)))
    handler = create_handler(store, _Backend(store, parameters.run_id), parameters)
    handler._bootstrap_store_info = RendezvousStoreInfo(host, port)
    handler._shared_tcp_store_server = store
    return handler
