"""`obsinfra runs | status | logs | signal | trace`: looking at runs and telling them what to do."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from obsinfra.catalog.actions import ACTIONS
from obsinfra.control.client import send_command
from obsinfra.control.command import new_command
from obsinfra.errors import CommandError, ConfigError
from obsinfra.run.folder import RunFolder, find_run, scan_runs

console = Console()
OutputDir = Annotated[Path, typer.Option("--output-dir", envvar="OUTPUT_DIR", help="Folder of all runs.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Run name, or 'latest'.")]

STATE_COLOURS = {"running": "green", "finished": "blue", "failed": "red", "dead": "red", "stopped": "yellow"}
CHANNELS = ("training", "performance", "errors", "system")


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    app.command(rich_help_panel="Look")(runs)
    app.command(rich_help_panel="Look")(status)
    app.command(rich_help_panel="Look")(logs)
    app.command(rich_help_panel="Act")(signal)
    trace_app = typer.Typer(help="Traces of a run.", no_args_is_help=True)
    trace_app.callback()(_trace)
    trace_app.command("export")(trace_export)
    app.add_typer(trace_app, name="trace", rich_help_panel="Look")


def find(output_dir: Path, name: str) -> RunFolder:
    """The run called `name`, or the one started last for `latest`."""
    if name != "latest":
        return find_run(output_dir, name)
    started = [(folder.read_info().started, folder) for folder in scan_runs(output_dir)]
    if not started:
        raise ConfigError(f"no run in {output_dir}", "at least one", "start one with 'obsinfra train'")
    return max(started, key=lambda found: found[0])[1]


def runs(output_dir: OutputDir = Path("runs")) -> None:
    """All runs: state, step, last checkpoint, page."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state", "step", "checkpoint", "page"):
        table.add_column(column, overflow="fold")
    count = 0
    for folder in scan_runs(output_dir):
        count += 1
        try:
            info = folder.read_info()
        except ConfigError as error:
            table.add_row(folder.id, "[red]unreadable[/]", "", escape(str(error)), "")
            continue
        state = info.present_state()
        url = info.metrics_urls.get("0", "").removesuffix("/metrics") if state == "running" else ""
        table.add_row(
            folder.id,
            f"[{STATE_COLOURS.get(state, 'white')}]{state}[/]",
            str(_progress(folder)),
            _last_checkpoint(folder),
            url,
        )
    console.print(table if count else f"no run in {output_dir} yet: start one with 'obsinfra train'")


def status(
    run: RunName = "latest",
    output_dir: OutputDir = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON document.")] = False,
) -> None:
    """One run: what it is doing now, from its own live page, or what its folder remembers."""
    folder = find(output_dir, run)
    info = folder.read_info()
    live: dict[str, Any] | None = None
    if info.metrics_urls and info.alive():
        try:
            address = info.metrics_urls["0"].removesuffix("/metrics")
            live = httpx.get(f"{address}/api/live?since=999999999999", timeout=3).json()
        except (httpx.HTTPError, ValueError):
            live = None
    if as_json:
        document = {"run": info.id, "state": info.present_state(), "reason": info.reason, "live": live}
        print(json.dumps(document, indent=2))
        return
    rows = [
        ("run", info.id),
        ("state", info.present_state() + (f" ({info.reason})" if info.reason else "")),
        ("model", info.model),
        ("started", f"{info.started}, {info.restarts} restarts"),
        ("step", str(_progress(folder))),
        ("checkpoint", _last_checkpoint(folder)),
        ("alerts act", "through the sidecar" if folder.sidecar_alive(time.time()) else "in-process"),
    ]
    if live is not None:
        latest = live["latest"]
        rows += [
            ("page", info.metrics_urls["0"].removesuffix("/metrics")),
            ("loss", _number(latest["loss"])),
            ("grad norm", _number(latest["grad_norm"])),
            ("samples/s", _number(latest["samples_per_second"])),
            ("goodput", _number(live["goodput"]["ratio"])),
            (
                "firing",
                ", ".join(alert["name"] for alert in live["alerts"] if alert["state"] == "firing") or "–",
            ),
        ]
    for name, value in rows:
        console.print(f"[bold]{name:<12}[/]{escape(value)}", soft_wrap=True)


def logs(
    run: RunName = "latest",
    output_dir: OutputDir = Path("runs"),
    channel: Annotated[str, typer.Option(help=f"One of {', '.join(CHANNELS)}.")] = "training",
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines are written.")] = False,
) -> None:
    """The run's structured log, one JSON document a line."""
    if channel not in CHANNELS:
        raise ConfigError(f"channel {channel!r}", f"one of {', '.join(CHANNELS)}", "correct --channel")
    path = find(output_dir, run).logs / f"{channel}.jsonl"
    if not path.exists():
        raise ConfigError(
            f"no log at {path}", "a run that has logged to this channel", "try --channel system"
        )
    with path.open() as file:
        for line in file.readlines()[-lines:]:
            print(line, end="")
        while follow:
            line = file.readline()
            if line:
                print(line, end="", flush=True)
            else:
                time.sleep(0.3)


def signal(
    run: RunName,
    action: Annotated[str, typer.Argument(help=f"One of {', '.join(ACTIONS)}.")],
    output_dir: OutputDir = Path("runs"),
    reason: Annotated[str, typer.Option(help="Why, for the journal.")] = "by hand",
    door: Annotated[str, typer.Option(help="auto, socket or inbox.")] = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the outcome.")] = 60.0,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the final outcome.")] = True,
) -> None:
    """Tell a run to do something, as the sidecar would."""
    if action not in ACTIONS:
        raise ConfigError(f"action {action!r}", f"one of {', '.join(ACTIONS)}", "correct the action")
    if door not in ("auto", "socket", "inbox"):
        raise ConfigError(f"door {door!r}", "auto, socket or inbox", "correct --door")
    folder = find(output_dir, run)
    command = new_command(folder.id, action, source="cli", reason=reason, lifetime_seconds=timeout)
    ack = send_command(
        folder,
        command,
        door=door,  # type: ignore[arg-type]
        timeout_seconds=timeout,
        wait_for="final" if wait else "accepted",
    )
    where = f" at step {ack.step}" if ack.step is not None else ""
    console.print(
        f"{action} {ack.state}{where}" + (f": {escape(json.dumps(ack.result))}" if ack.result else "")
    )
    if ack.state not in ("done", "accepted", "running"):
        raise CommandError(f"{action} {ack.state}: {ack.error}")


def _trace() -> None:
    """Traces of a run."""


def trace_export(
    run: RunName = "latest",
    output_dir: OutputDir = Path("runs"),
    out: Annotated[Path | None, typer.Option(help="Target; default: trace.json in the run folder.")] = None,
) -> None:
    """Write the run's spans as a Chrome trace, which https://ui.perfetto.dev and chrome://tracing open."""
    from obsinfra.monitoring.chrome_trace import export_chrome_trace, find_span_files

    folder = find(output_dir, run)
    files = find_span_files(folder.traces)
    if not files:
        raise ConfigError(
            f"no spans in {folder.traces}", "a run with monitoring on", "train without --disable-monitoring"
        )
    target = out or folder.root / "trace.json"
    # The sidecar's spans show where a command came from: alert → delivery → command → checkpoint.
    sidecar = find_span_files(output_dir / ".stack" / "sidecar" / "traces")
    count = export_chrome_trace(files, target, beside=sidecar)
    console.print(f"{count} spans → {target}")


def _progress(folder: RunFolder) -> int | str:
    try:
        return int(json.loads((folder.root / "progress.json").read_text())["step"])
    except (OSError, ValueError, KeyError):
        return "–"


def _last_checkpoint(folder: RunFolder) -> str:
    manifests = sorted((folder.checkpoints / "manifests").glob("*.json"))
    if not manifests:
        return "–"
    newest = max(manifests, key=lambda path: path.stat().st_mtime)
    age = int(time.time() - newest.stat().st_mtime)
    return f"{newest.stem} ({age} s ago)"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
