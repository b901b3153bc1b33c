"""Which way the stack is run on this machine: in containers where an engine answers, natively otherwise.

Called by the CLI and by `deploy_training`. One folder of runs has one stack: two sidecars would both act.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from obsinfra.catalog.alerts import ALERTS, Alert
from obsinfra.config.notify import Notify
from obsinfra.config.settings import Settings
from obsinfra.deployment.compose_stack import ComposeInfo, ComposeStack, engine_problem
from obsinfra.deployment.native_stack import NativeStack, StackInfo
from obsinfra.deployment.ports import DEFAULT_COMPOSE_PORTS, DEFAULT_PORTS, wanted_ports
from obsinfra.errors import UserError

Way = Literal["compose", "native"]


class WhichStack:
    """Both ways to run the stack of one folder of runs.

    Args:
        output_dir: the folder of runs.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.native = NativeStack(output_dir / ".stack")
        self.compose = ComposeStack(output_dir / ".stack")

    def choose(self, forced: Way | None = None) -> tuple[Way, str]:
        """The way to take, and why in a few words.

        Raises:
            UserError: the stack runs already, the other way than `forced`.
        """
        running = self.running()
        if running is not None and forced not in (None, running):
            raise UserError(
                f"the stack of {self.output_dir} runs already, {_in_words(running)}",
                "one stack for a folder of runs",
                "stop it with 'obsinfra down' first",
            )
        if running is not None:
            return running, "it runs already"
        if forced is not None:
            return forced, "as asked"
        problem = engine_problem()
        return ("compose", "a Docker engine answers") if problem is None else ("native", problem)

    def up(
        self,
        forced: Way | None = None,
        *,
        scrape_interval: str | None = None,
        alerts: Sequence[Alert] = ALERTS,
        notify: Notify | None = None,
        policy: Mapping[str, Any] | None = None,
        profiles: Sequence[str] = (),
        services: Sequence[str] = (),
    ) -> StackInfo | ComposeInfo:
        """Start it, one way or the other; the arguments are those of `ComposeStack.up`.

        Ports begin where the environment says (OBSINFRA_PORT_PROMETHEUS, …), else at the usual ones.

        Raises:
            UserError: it runs already the other way; or profiles or services are asked for natively.
            StackUnavailable, ConfigError: as the stacks' own `up`.
        """
        way, _ = self.choose(forced)
        if way == "compose":
            return self.compose.up(
                self.output_dir,
                ports=wanted_ports(DEFAULT_COMPOSE_PORTS),
                scrape_interval=scrape_interval,
                alerts=alerts,
                notify=notify,
                policy=policy,
                profiles=profiles,
                services=services,
            )
        if profiles or services:
            raise UserError(
                f"{'profile' if profiles else 'service'} {[*profiles, *services][0]!r} without containers",
                "a stack in containers",
                "leave it out, or start Docker and use --compose",
            )
        return self.native.up(
            self.output_dir,
            ports=wanted_ports(DEFAULT_PORTS),
            scrape_interval=scrape_interval,
            alerts=alerts,
            notify=notify,
            policy=policy,
        )

    def running(self) -> Way | None:
        """How it runs now; None when it does not."""
        if self.native.status() is not None:
            return "native"
        return "compose" if self.compose.status() is not None else None

    def status(self) -> StackInfo | ComposeInfo | None:
        """What is up; None when nothing is."""
        return self.native.status() or self.compose.status()

    def down(self, *, volumes: bool = False) -> list[str]:
        """Stop what is up, whichever way it was started; returns the names of what was stopped."""
        stopped = self.native.down()
        return stopped + (self.compose.down(volumes=volumes) if self.compose.recorded() else [])


def reachable_settings(settings: Settings) -> Settings:
    """The settings of a trainer on this machine, listening where a stack in containers reaches it.

    Nothing changes where no such stack was started for this folder of runs, or the user said where to listen.
    """
    host = ComposeStack(settings.output_dir / ".stack").trainer_host()
    if host is None or settings.metrics_host != Settings().metrics_host:
        return settings
    return settings.model_copy(update={"metrics_host": host})


def _in_words(way: Way) -> str:
    return "in containers" if way == "compose" else "natively"
