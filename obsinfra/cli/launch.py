"""`obsinfra train` on several ranks: hands the command line to torchrun's own launcher, no more."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obsinfra.config.settings import Settings
from obsinfra.errors import ConfigError, ObsinfraError

BACKEND = "obsinfra-c10d"
"""The rendezvous of `rendezvous.py`, which takes a second to import."""


@dataclass(frozen=True, slots=True)
class Launcher:
    """Options of torchrun that `obsinfra train` passes on, as they were typed; None: not given.

    Attributes:
        nproc_per_node: ranks on this host: a number, `gpu`, `cpu` or `auto`.
        nnodes: hosts: `N`, or `MIN:MAX` for an elastic run.
        rdzv_endpoint: `host:port` where the hosts meet; one of them, on a port of your choice.
        rdzv_id: name of the job that all hosts give.
        rdzv_conf: further options of the rendezvous, as `timeout=60,last_call_timeout=5`.
        local_addr: this host's address as the others reach it.
        max_restarts: how often the ranks are started again after a failure.
    """

    nproc_per_node: str | None = None
    nnodes: str | None = None
    rdzv_endpoint: str | None = None
    rdzv_id: str | None = None
    rdzv_conf: str | None = None
    local_addr: str | None = None
    max_restarts: int | None = None

    @property
    def wanted(self) -> bool:
        """Whether any was given."""
        return any(getattr(self, name) is not None for name in self.__dataclass_fields__)

    def arguments(self) -> list[str]:
        """For torchrun.

        Raises:
            ConfigError: numbers of ranks or hosts that are none, or hosts without a place to meet.
        """
        if not re.fullmatch(r"[1-9]\d*|gpu|cpu|xpu|auto", self.nproc_per_node or "1"):
            raise ConfigError(
                f"--nproc-per-node {self.nproc_per_node}", "a whole number of at least 1, gpu, cpu or auto"
            )
        hosts = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", self.nnodes or "1")
        if hosts is None or int(hosts[1]) > int(hosts[2] or hosts[1]):
            raise ConfigError(f"--nnodes {self.nnodes}", "a number of hosts, or MIN:MAX of them, at least 1")
        given = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if self.rdzv_endpoint is not None:
            given["rdzv_backend"] = BACKEND
        out = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
        if self.rdzv_endpoint is None:
            if self.nnodes not in (None, "1", "1:1"):
                raise ConfigError(
                    f"--nnodes {self.nnodes} without --rdzv-endpoint",
                    "the address at which the hosts meet",
                    "add --rdzv-endpoint HOST:PORT, the same on every host",
                )
            out.append("--standalone")
        return out


def launch(launcher: Launcher, flags: Mapping[str, Any], config: Path | None) -> int:
    """Train under torchrun; returns the exit code of the first rank that failed, or 0.

    Raises:
        ConfigError: torchrun does not take the options.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import get_args_parser, run

    from obsinfra.cli import rendezvous

    rendezvous.register()
    command = ["train", *_typed(flags)]
    if config is not None:
        command += ["--config", str(config)]
    try:
        arguments = get_args_parser().parse_args([*launcher.arguments(), "-m", "obsinfra.cli"])
        arguments.training_script_args = command  # its parser would take --run for one of its own
        run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        failure = min(error.failures.values(), key=lambda failed: failed.timestamp)
        # The rank has told in its own words what it was; a signal's number is negative here.
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval or signal.SIGTERM)
    except (ValueError, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        raise ConfigError(f"torchrun does not take this: {error}", "options as torchrun's") from error
    except RendezvousError as error:
        raise ObsinfraError(
            f"the hosts did not meet at {launcher.rdzv_endpoint}, or lost each other: {error}"
        ) from error
    return 0


def _typed(flags: Mapping[str, Any]) -> list[str]:
    """The settings that were given, as options again."""
    out: list[str] = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if Settings.model_fields[name].annotation is bool:
            out.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            out.append(f"--{flag}={value}")
    return out
