"""`obsinfra up | down | stack | sidecar`: the stack beside the trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from obsinfra.cli.options import program
from obsinfra.cli.runs import OutputDir
from obsinfra.config.resolve import resolve

if TYPE_CHECKING:
    from obsinfra.deployment.compose_stack import ComposeInfo
    from obsinfra.deployment.native_stack import StackInfo

console = Console()


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    app.command(rich_help_panel="The stack")(up)
    app.command(rich_help_panel="The stack")(down)
    app.command(rich_help_panel="The stack")(stack)
    app.command(rich_help_panel="The stack")(sidecar)


def up(
    output_dir: OutputDir = Path("runs"),
    scrape_interval: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it at run time
        typer.Option(
            help="Scrape interval, e.g. 1s; rules are evaluated twice as often. "
            "Default: prometheus/prometheus.yml's."
        ),
    ] = None,
    compose: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--compose/--native",
            help="In containers, or as processes; default: containers where a Docker engine answers.",
        ),
    ] = None,
    profile: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Of docker-compose.yml: dev, logs, gpu, train or train-gpu; repeatable."),
    ] = None,
    service: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Only this service and what it needs, in containers; repeatable."),
    ] = None,
) -> None:
    """Start Prometheus, Alertmanager and the sidecar in the background: in containers with Grafana and Jaeger
    where a Docker engine answers, as supervised processes otherwise."""
    from obsinfra.deployment.which_stack import WhichStack

    # [thresholds] and [alerts] hold for Prometheus's rules as for the trainers.
    settings = resolve({}).settings
    stack = WhichStack(output_dir)
    way, why = stack.choose(None if compose is None else "compose" if compose else "native")
    console.print(f"{'containers' if way == 'compose' else 'processes':<13} {why}", soft_wrap=True)
    info = stack.up(
        way,
        scrape_interval=scrape_interval,
        alerts=settings.alert_table(),
        notify=settings.notify,
        policy=settings.policy,
        profiles=profile or (),
        services=service or (),
    )
    _show(info)
    if info.already_up:
        console.print(
            "settings      those it was started with: changed ones hold after 'down' and 'up'", soft_wrap=True
        )
    console.print(f"stop          {program()} down --output-dir {output_dir}", soft_wrap=True)


def down(
    output_dir: OutputDir = Path("runs"),
    volumes: Annotated[
        bool, typer.Option("--volumes", "-v", help="Remove what the containers have stored too.")
    ] = False,
) -> None:
    """Stop exactly what 'up' started."""
    from obsinfra.deployment.which_stack import WhichStack

    stopped = WhichStack(output_dir).down(volumes=volumes)
    console.print("stopped " + ", ".join(stopped) if stopped else "nothing was up")


def stack(output_dir: OutputDir = Path("runs")) -> None:
    """What of the stack is up, how, and where."""
    from obsinfra.deployment.which_stack import WhichStack

    info = WhichStack(output_dir).status()
    if info is None:
        console.print(f"nothing is up for {output_dir}: start it with '{program()} up'", soft_wrap=True)
        raise typer.Exit(1)
    _show(info)


def _show(info: StackInfo | ComposeInfo) -> None:
    from obsinfra.deployment.compose_stack import ComposeInfo

    console.print(f"Prometheus    {info.prometheus_url}")
    console.print(f"Alertmanager  {info.alertmanager_url}")
    console.print(f"sidecar       {info.sidecar_url}")
    console.print(
        f"all runs      {info.sidecar_url}/  (the page; it asks for the token in {info.token_file})",
        soft_wrap=True,
    )
    if isinstance(info, ComposeInfo):
        for name, port in (("grafana", info.ports.grafana), ("jaeger", info.ports.jaeger)):
            if name in info.services:
                console.print(f"{name.capitalize():<13} http://127.0.0.1:{port}")
        if "otel-collector" in info.services:
            console.print(f"spans to      http://127.0.0.1:{info.ports.otlp}  (--otlp-endpoint)")
        if "grafana" in info.services:
            password = info.environment_file.parent / "secrets/grafana_admin_password"
            console.print(f"              user admin, password in {password}", soft_wrap=True)
        for name, state in sorted(info.services.items()):
            console.print(f"{'':<13} {name}: {state}")
        if info.trainer_host is not None:
            console.print(
                f"trainers      of this machine listen on {info.trainer_host}, where containers reach them",
                soft_wrap=True,
            )
        console.print(f"by hand       docker compose --env-file {info.environment_file} ps", soft_wrap=True)
    else:
        for name, child in info.children.items():
            ups = f"{child.restarts} restarts"
            state = f"process {child.process.pid}" if child.process else "down, being restarted"
            console.print(f"{'':<13} {name}: {state}, {ups}")
        console.print(
            "Grafana       not started; one that runs elsewhere imports grafana/dashboards/*.json, with "
            f"{info.prometheus_url} as its Prometheus",
            soft_wrap=True,
        )
    console.print(f"state         {info.state_dir}", soft_wrap=True)


def sidecar(
    output_dir: OutputDir = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 9465,
    token_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Bearer token, 0600; default: <output-dir>/.stack/token, made if missing."),
    ] = None,
    tls_cert: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Certificate, PEM; needed for any address but this machine's own."),
    ] = None,
    tls_key: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The certificate's key, PEM, 0600."),
    ] = None,
    alertmanager_url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Asked whether an alert still fires before a further step about it is taken."),
    ] = None,
    trusted_network: Annotated[
        bool,
        typer.Option(
            "--trusted-network",
            help="Any address without TLS: within a network of containers that nobody else is on.",
        ),
    ] = False,
    page_url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Where people open its page, which the trainers' pages lead to; default: itself."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Journal what would be done, do nothing.")] = False,
) -> None:
    """Run the sidecar in the foreground: Alertmanager's webhook in, commands to the runs out.

    What it does about alerts is in the settings under [policy]; see docs/sidecar.md.
    """
    from obsinfra.catalog.policy import policy_with
    from obsinfra.control.sidecar import SidecarSettings, load_plugin_actions, run_sidecar

    load_plugin_actions()
    state = output_dir / ".stack"
    policy = policy_with(resolve({}).settings.policy)
    run_sidecar(
        SidecarSettings(
            output_dir=output_dir,
            host=host,
            port=port,
            token_file=token_file or state / "token",
            state_dir=state / "sidecar",
            policy=replace(policy, dry_run=policy.dry_run or dry_run),
            tls_cert=tls_cert,
            tls_key=tls_key,
            alertmanager_url=alertmanager_url,
            trusted_network=trusted_network,
            page_url=page_url,
        )
    )
