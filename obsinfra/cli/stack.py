"""`obsinfra up | down | sidecar`: the stack beside the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from obsinfra.cli.options import program
from obsinfra.cli.runs import OutputDir
from obsinfra.config.resolve import resolve

console = Console()


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    app.command(rich_help_panel="The stack")(up)
    app.command(rich_help_panel="The stack")(down)
    app.command(rich_help_panel="The stack")(sidecar)


def up(
    output_dir: OutputDir = Path("runs"),
    scrape_interval: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it at run time
        typer.Option(help="Scrape and evaluation interval, e.g. 1s; default: prometheus/prometheus.yml's."),
    ] = None,
) -> None:
    """Start Prometheus, Alertmanager and the sidecar on this machine, supervised in the background."""
    from obsinfra.deployment.native_stack import NativeStack

    # [thresholds] of obsinfra.toml or the environment hold for Prometheus's rules as for the trainers.
    info = NativeStack(output_dir / ".stack").up(
        output_dir, scrape_interval=scrape_interval, thresholds=resolve({}).settings.thresholds
    )
    console.print(f"Prometheus    {info.prometheus_url}")
    console.print(f"Alertmanager  {info.alertmanager_url}")
    console.print(f"sidecar       {info.sidecar_url}")
    console.print(
        f"state         {output_dir / '.stack'}   (stop with: {program()} down --output-dir {output_dir})"
    )


def down(output_dir: OutputDir = Path("runs")) -> None:
    """Stop exactly what 'up' started."""
    from obsinfra.deployment.native_stack import NativeStack

    stopped = NativeStack(output_dir / ".stack").down()
    console.print("stopped " + ", ".join(stopped) if stopped else "nothing was up")


def sidecar(
    output_dir: OutputDir = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 9465,
    token_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Bearer token, 0600; default: <output-dir>/.stack/token, made if missing."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Journal what would be done, do nothing.")] = False,
) -> None:
    """Run the sidecar in the foreground: Alertmanager's webhook in, commands to the runs out."""
    from obsinfra.control.sidecar import SidecarSettings, run_sidecar

    state = output_dir / ".stack"
    run_sidecar(
        SidecarSettings(
            output_dir=output_dir,
            host=host,
            port=port,
            token_file=token_file or state / "token",
            state_dir=state / "sidecar",
            dry_run=dry_run,
        )
    )
