"""`obsinfra runs | status | logs | command | actions | trace`: looking at runs, telling them what to do."""

from __future__ import annotations

import json
import time
import tomllib
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from obsinfra.catalog.actions import ACTIONS, Action
from obsinfra.cli.tables import print_table
from obsinfra.control.action_plugins import load_action_plugins
from obsinfra.control.client import send_command
from obsinfra.control.command import new_command
from obsinfra.errors import CommandError, ConfigError, UserError
from obsinfra.run.files import of_rank
from obsinfra.run.folder import ENDED_STATES, RunFolder, find_run, scan_runs

console = Console()

FOLLOW_SECONDS = 0.3
"""Between two looks at logs that are followed: other processes write them, on other hosts perhaps."""
OutputDir = Annotated[Path, typer.Option("--output-dir", envvar="OUTPUT_DIR", help="Folder of all runs.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Run name, or 'latest'.")]

STATE_COLOURS = {
    "running": "green",
    "paused": "yellow",
    "finished": "blue",
    "failed": "red",
    "dead": "red",
    "stopped": "yellow",
}
LIVE = ("running", "paused")
CHANNELS = ("training", "performance", "errors", "system")


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    app.command(rich_help_panel="Look")(runs)
    app.command(rich_help_panel="Look")(status)
    app.command(rich_help_panel="Look")(logs)
    app.command(rich_help_panel="Act")(command)
    app.command("signal", hidden=True)(command)  # its name until there were arguments
    app.command(rich_help_panel="Act")(actions)
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
        state = folder.present_state(info)
        url = info.metrics_urls.get("0", "").removesuffix("/metrics") if state in LIVE else ""
        table.add_row(
            folder.id,
            f"[{STATE_COLOURS.get(state, 'white')}]{state}[/]",
            str(_progress(folder)),
            _last_checkpoint(folder),
            url,
        )
    if count:
        print_table(console, table)
    else:
        console.print(f"no run in {output_dir} yet: start one with 'obsinfra train'")


def status(
    run: RunName = "latest",
    output_dir: OutputDir = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON document.")] = False,
) -> None:
    """One run: what it is doing now, from its own live page, or what its folder remembers."""
    folder = find(output_dir, run)
    info = folder.read_info()
    live: dict[str, Any] | None = None
    if info.metrics_urls and folder.lives(info):
        try:
            address = info.metrics_urls["0"].removesuffix("/metrics")
            live = httpx.get(f"{address}/api/live?since=999999999999", timeout=3).json()
        except (httpx.HTTPError, ValueError):
            live = None
    if as_json:
        document = {
            "run": info.id,
            "state": folder.present_state(info),
            "reason": info.reason,
            "ranks": info.world_size,
            "metrics": info.metrics_urls,
            "live": live,
        }
        print(json.dumps(document, indent=2))
        return
    rows = [
        ("run", info.id),
        ("state", folder.present_state(info) + (f" ({info.reason})" if info.reason else "")),
        ("model", info.model),
        ("started", f"{info.started}, {info.restarts} restarts"),
        ("step", str(_progress(folder) if live is None else live["progress"]["step"])),
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
    if info.world_size > 1:
        rows.insert(3, ("ranks", str(info.world_size)))
    if live is not None and len(info.metrics_urls) > 1:
        rows += [(f"rank {rank}", url) for rank, url in sorted(info.metrics_urls.items(), key=_by_rank)]
    for name, value in rows:
        console.print(f"[bold]{name:<12}[/]{escape(value)}", soft_wrap=True)


def logs(
    run: RunName = "latest",
    output_dir: OutputDir = Path("runs"),
    channel: Annotated[str, typer.Option(help=f"One of {', '.join(CHANNELS)}.")] = "training",
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines are written.")] = False,
    rank: Annotated[
        Optional[int],  # noqa: UP045 - typer reads it at run time
        typer.Option(min=0, help="Of this rank alone; else of all, by time."),
    ] = None,
) -> None:
    """The run's structured log, one JSON document a line."""
    if channel not in CHANNELS:
        raise ConfigError(f"channel {channel!r}", f"one of {', '.join(CHANNELS)}", "correct --channel")
    folder = find(output_dir, run).logs
    files = {path: path.open() for path in _logs(folder, channel, rank)}
    if not files:
        of = "" if rank is None else f" of rank {rank}"
        raise ConfigError(
            f"no log of {channel}{of} in {folder}",
            "a run that has logged to this channel",
            "try --channel system" if rank is None else "leave out --rank",
        )
    found = [line for file in files.values() for line in deque(file, maxlen=lines)]
    for line in sorted(found, key=_logged_at)[-lines:]:
        print(line, end="")
    while follow:
        for path in _logs(folder, channel, rank):  # of ranks that came later, too
            if path not in files:
                files[path] = path.open()
            for line in files[path]:
                print(line, end="", flush=True)
        time.sleep(FOLLOW_SECONDS)


def _by_rank(item: tuple[str, str]) -> int:
    return int(item[0])


def _logs(folder: Path, channel: str, rank: int | None) -> list[Path]:
    first = folder / f"{channel}.jsonl"
    if rank is not None:
        return [path] if (path := of_rank(first, rank)).exists() else []
    return [path for path in (first, *sorted(folder.glob(f"{channel}-rank*.jsonl"))) if path.exists()]


def _logged_at(line: str) -> str:
    """The time of a log line; it is the first thing on it."""
    return line.partition('"timestamp": "')[2].partition('"')[0]


def command(
    run: RunName,
    action: Annotated[str, typer.Argument(help="What to do; 'obsinfra actions' lists all.")],
    arguments: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads it at run time
        typer.Argument(metavar="KEY=VALUE…", help="Arguments; 'obsinfra actions ACTION' explains them."),
    ] = None,
    output_dir: OutputDir = Path("runs"),
    reason: Annotated[str, typer.Option(help="Why, for the journal.")] = "by hand",
    door: Annotated[str, typer.Option(help="auto, socket or inbox.")] = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the outcome.")] = 60.0,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the final outcome.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="The outcome as one JSON document.")] = False,
) -> None:
    """Tell a run to do something, as the sidecar would: obsinfra command latest profile steps=10"""
    row = _row(action)
    if door not in ("auto", "socket", "inbox"):
        raise ConfigError(f"door {door!r}", "auto, socket or inbox", "correct --door")
    given = _parsed(row, arguments or [])
    folder = find(output_dir, run)
    if door != "inbox" and folder.present_state(folder.read_info()) == "dead":
        raise CommandError(
            f"the trainer of run {folder.id} is dead; expected a running one; fix: go on with it by --resume "
            f"{folder.id}, or leave the command for whoever does by --door inbox"
        )
    sent = new_command(folder.id, action, source="cli", reason=reason, args=given, lifetime_seconds=timeout)
    ack = send_command(
        folder,
        sent,
        door=door,  # type: ignore[arg-type]
        timeout_seconds=timeout,
        wait_for="final" if wait else "accepted",
    )
    if as_json:
        print(json.dumps(asdict(ack)))
    else:
        where = f" at step {ack.step}" if ack.step is not None else ""
        console.print(f"{action} {ack.state}{where}")
        for name, value in (ack.result or {}).items():
            text = value if isinstance(value, str) else json.dumps(value)
            console.print(f"  [bold]{escape(name)}[/]  {escape(text)}", soft_wrap=True, highlight=False)
    if ack.state not in ("done", "accepted", "running"):
        raise CommandError(f"{action} {ack.state}: {ack.error}")


def actions(
    action: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it at run time
        typer.Argument(help="One of them, with its arguments; default: all."),
    ] = None,
) -> None:
    """What a run can be told to do, and with which arguments."""
    if action is None:
        _, problems = load_action_plugins()
        table = Table(box=None, pad_edge=False)
        table.add_column("action", no_wrap=True)
        table.add_column("what it does", overflow="fold")
        for row in ACTIONS.values():
            when = " At once, even in a hang." if row.at == "any_time" else ""
            offered = "".join(f"\n[cyan]{escape(text)}[/]" for text in (_offered(row),) if text)
            table.add_row(row.name, escape(row.summary) + when + offered)
        print_table(console, table, prose=True)
        for problem in problems:
            console.print(
                f"[red]{escape(problem.name)}[/] cannot be used: {escape(problem.problem)} "
                f"({escape(problem.target)})"
            )
        return
    row = _row(action)
    console.print(f"[bold]{row.name}[/]  {escape(row.summary)}")
    table = Table(box=None, pad_edge=False)
    for column in ("argument", "expected", "default", "what"):
        table.add_column(column, overflow="fold")
    for argument in row.arguments:
        default = "required" if argument.required else "–"
        if argument.default is not None:
            default = json.dumps(argument.default)
        table.add_row(argument.name, argument.expected, default, argument.help)
    print_table(console, table, prose=True)
    if row.details:
        console.print("\n" + escape(row.details))
    if row.undo is not None:
        arguments = "".join(f" {name}={json.dumps(value)}" for name, value in row.undo_arguments.items())
        console.print(f"undone by [bold]{row.undo}{arguments}[/]")


def _row(name: str) -> Action:
    """The action's row; those of other packages are looked for only when it is none of ours."""
    if name not in ACTIONS:
        load_action_plugins()
    if name not in ACTIONS:
        raise ConfigError(f"action {name!r}", f"one of {', '.join(ACTIONS)}", "correct the action")
    return ACTIONS[name]


def _parsed(action: Action, texts: list[str]) -> dict[str, Any]:
    known = {argument.name: argument for argument in action.arguments}
    given: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(
                f"argument {text!r}", "key=value", f"see 'obsinfra actions {action.name}' for the keys"
            )
        given[name] = known[name].parse(value) if name in known else value
    if (problem := action.problem(given)) is not None:
        raise CommandArgumentError(f"{problem} (see 'obsinfra actions {action.name}')")
    return given


class CommandArgumentError(UserError):
    """An argument that the table of actions does not allow; found before anything is sent."""


def _offered(action: Action) -> str:
    """Its arguments as a list shows them, without the one that only alerts give."""
    return " ".join(f"{argument.name}=…" for argument in action.arguments if argument.name != "alert")


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
        raise _no_spans(folder)
    target = out or folder.root / "trace.json"
    # The sidecar's spans show where a command came from: alert → delivery → command → checkpoint.
    sidecar = find_span_files(output_dir / ".stack" / "sidecar" / "traces")
    count = export_chrome_trace(files, target, beside=sidecar)
    console.print(f"{count} spans → {target}")


def _no_spans(folder: RunFolder) -> ConfigError:
    """Why there is nothing to export."""
    try:
        unwatched = tomllib.loads(folder.config_toml.read_text()).get("disable_monitoring") is True
    except (OSError, ValueError):  # killed before it wrote its settings
        unwatched = False
    if unwatched:
        return ConfigError(
            f"no spans in {folder.traces}", "a run with monitoring on", "train without --disable-monitoring"
        )
    if folder.present_state(folder.read_info()) in (*ENDED_STATES, "dead"):
        wrong, fix = "ended before its first one", f"go on with it by 'obsinfra train --resume {folder.id}'"
    else:
        wrong, fix = "has not made one yet", "try again after its next steps"
    return ConfigError(
        f"no spans in {folder.traces}: run {folder.id} {wrong}",
        "one of each step that is traced (--trace-every) or slow, and of each checkpoint",
        fix,
    )


def _progress(folder: RunFolder) -> int | str:
    progress = folder.read_progress()
    return "–" if progress is None or progress.step is None else progress.step


def _last_checkpoint(folder: RunFolder) -> str:
    manifests = sorted((folder.checkpoints / "manifests").glob("*.json"))
    if not manifests:
        return "–"
    newest = max(manifests, key=lambda path: path.stat().st_mtime)
    age = int(time.time() - newest.stat().st_mtime)
    return f"{newest.stem} ({age} s ago)"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
