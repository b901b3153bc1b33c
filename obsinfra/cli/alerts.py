"""`obsinfra alerts`: what fires, who hears of it, and whether that works."""

from __future__ import annotations

import difflib
import getpass
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from obsinfra.alerting.messages import render_templates
from obsinfra.alerting.routes import check_secret_files, open_secret_files, render_alertmanager
from obsinfra.catalog.alerts import ALERTS
from obsinfra.catalog.policy import policy_with
from obsinfra.cli.generated import check_generated, write_generated
from obsinfra.cli.options import duration_seconds, program
from obsinfra.cli.runs import OutputDir
from obsinfra.cli.tables import print_table
from obsinfra.config.notify import CHANNELS
from obsinfra.config.resolve import resolve
from obsinfra.config.settings import Settings
from obsinfra.errors import ConfigError

console = Console()

SEVERITY_COLOURS = {"critical": "red", "warning": "yellow", "info": "blue"}
LONGEST_SECONDS = 366 * 86_400.0
OWN_COLUMN = frozenset(
    ["alertname", "severity", "run", "model", "scope", "action", "job", "instance", "alertstate"]
)
"""Labels that a table of alerts shows elsewhere, or that say nothing to a person."""

Folder = Annotated[Path, typer.Option("--folder", help="Where alertmanager.yml and templates/ go.")]
AlertmanagerUrl = Annotated[
    Optional[str],  # noqa: UP045 - typer reads it at run time
    typer.Option("--alertmanager", metavar="URL", help="Default: that of the stack 'obsinfra up' started."),
]
RunFilter = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--run", metavar="RUN", help="Only this run."),
]
AsJson = Annotated[bool, typer.Option("--json", help="As one JSON document.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    group = typer.Typer(help="What fires, who hears of it, and whether that works.", no_args_is_help=True)
    group.command("list")(list_)
    group.command("history")(history)
    group.command("silence")(silence)
    group.command("unsilence")(unsilence)
    group.command("test")(test)
    group.command("write")(write)
    group.command("check")(check)
    app.add_typer(group, name="alerts", rich_help_panel="Look")


def write(folder: Folder = Path("alertmanager")) -> None:
    """Write Alertmanager's routes and templates, as the notify table of the settings wants them."""
    write_generated(_files(folder, resolve({}).settings), console)


def check(
    folder: Folder = Path("alertmanager"),
    skip_secrets: Annotated[
        bool, typer.Option("--skip-secrets", help="Do not look at the files that hold secrets.")
    ] = False,
) -> None:
    """Exit code 1 when a file is not what 'alerts write' would write; 2 when a secret's file is unusable."""
    settings = resolve({}).settings
    notify = settings.notify
    if not skip_secrets:
        check_secret_files(notify)
        for setting, path in open_secret_files(notify).items():
            text = f"{setting} = {str(path)!r}: others on this machine may read it; chmod 600 {path}"
            console.print(f"[yellow]{escape(text)}[/]", soft_wrap=True)
    console.print(f"the settings are sound; people told: {escape(str(notify))}", soft_wrap=True)
    check_generated(
        _files(folder, settings),
        console,
        fix="'obsinfra alerts write' (for an Alertmanager of your own: 'obsinfra up' makes its own files)",
        fine=f"{escape(str(folder))} is up to date",
    )


def list_(
    output_dir: OutputDir = Path("runs"),
    run: RunFilter = None,
    alertmanager: AlertmanagerUrl = None,
    as_json: AsJson = False,
) -> None:
    """What fires now, since when, and what keeps it from people; then the silences that hold."""
    from obsinfra.control.alertmanager import Alertmanager

    asked = Alertmanager(_alertmanager_url(output_dir, alertmanager))
    alerts = [alert for alert in asked.alerts() if run is None or alert.labels.get("run") == run]
    silences = asked.silences()
    if as_json:
        document = {"alerts": [asdict(one) for one in alerts], "silences": [asdict(one) for one in silences]}
        print(json.dumps(document, indent=2, default=_iso))
        return
    if not alerts:
        console.print("nothing fires")
    else:
        table = Table(box=None, pad_edge=False)
        for column in ("alert", "severity", "run", "where", "value", "for", "state"):
            table.add_column(column, overflow="fold")
        now = datetime.now(UTC)
        for alert in alerts:
            labels = alert.labels
            severity = labels.get("severity", "")
            cells = (
                labels.get("alertname", ""),
                severity,
                labels.get("run", ""),
                _where(labels),
                alert.annotations.get("value", ""),
                _span((now - alert.started).total_seconds()),
                _state(alert.silenced_by, alert.inhibited_by),
            )
            shown = [escape(cell) for cell in cells]
            if severity in SEVERITY_COLOURS:
                shown[1] = f"[{SEVERITY_COLOURS[severity]}]{severity}[/]"
            table.add_row(*shown)
        print_table(console, table)
    for one in silences:
        text = (
            f"silence {one.id}  {', '.join(one.matchers)}  until {_clock(one.ends)}  {one.by}: {one.comment}"
        )
        console.print(escape(text), soft_wrap=True)


def history(
    output_dir: OutputDir = Path("runs"),
    run: RunFilter = None,
    alert: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--alert", metavar="NAME", help="Only this alert."),
    ] = None,
    since: Annotated[str, typer.Option(help="How far back, as 30m, 24h or 7d.")] = "24h",
    prometheus: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--prometheus", metavar="URL", help="Default: that of the stack 'obsinfra up' started."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What fired when and for how long, from Prometheus."""
    from obsinfra.deployment.alert_history import read_history

    seconds = _seconds(since, "--since")
    url = prometheus or _stack(output_dir, "--prometheus").prometheus_url
    firings = read_history(url, seconds, run=run, alert=alert)
    if as_json:
        print(json.dumps([asdict(firing) for firing in firings], indent=2, default=_iso))
        return
    if not firings:
        console.print(f"nothing fired in the last {since}")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("began", "lasted", "alert", "severity", "run", "where", "action"):
        table.add_column(column, overflow="fold")
    now = datetime.now(UTC)
    for firing in firings:
        labels = firing.labels
        lasted = _span(((firing.ended or now) - firing.began).total_seconds())
        cells = (
            _clock(firing.began),
            lasted if firing.ended is not None else f"{lasted}, still firing",
            labels.get("alertname", ""),
            labels.get("severity", ""),
            labels.get("run", ""),
            _where(labels),
            labels.get("action", ""),
        )
        table.add_row(*map(escape, cells))
    print_table(console, table)
    console.print(f"to {firings[0].step_seconds:g} s; what was shorter may be missing")


def silence(
    alert: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="ALERT", help="Name of the alert; without it all of --run."),
    ] = None,
    how_long: Annotated[str, typer.Option("--for", help="How long, as 30m, 2h or 1d.")] = "2h",
    run: RunFilter = None,
    comment: Annotated[str, typer.Option(help="Why; others read it.")] = "silenced by hand",
    output_dir: OutputDir = Path("runs"),
    alertmanager: AlertmanagerUrl = None,
) -> None:
    """Keep an alert from people, and from the sidecar, for a while.

    A silence holds for every receiver: while it does, the sidecar does not act on the alert either.
    """
    from obsinfra.control.alertmanager import Alertmanager

    if alert is None and run is None:
        raise ConfigError("neither an alert nor a run", "what to silence", "name ALERT, --run RUN, or both")
    seconds = _seconds(how_long, "--for")
    asked = Alertmanager(_alertmanager_url(output_dir, alertmanager))
    if alert is not None:
        known = {row.name for row in ALERTS} | {one.labels.get("alertname", "") for one in asked.alerts()}
        if alert not in known:
            near = ", ".join(difflib.get_close_matches(alert, known, n=3))
            raise ConfigError(
                f"no alert {alert!r}",
                f"one of the table{f' ({near}?)' if near else ''}, or one of your own that fires now",
                "see 'obsinfra alerts list' and docs/alerts.md; amtool silences what does not fire yet",
            )
    labels = {name: value for name, value in (("alertname", alert), ("run", run)) if value is not None}
    made = asked.silence(labels, seconds, comment=comment, by=_user())
    what = f"silenced {', '.join(made.matchers)} until {_clock(made.ends)}; the sidecar does not act either"
    console.print(escape(what), soft_wrap=True)
    console.print(f"end it with: {program()} alerts unsilence {made.id}", soft_wrap=True)


def unsilence(
    id: Annotated[str, typer.Argument(metavar="ID", help="As 'obsinfra alerts list' shows it.")],
    output_dir: OutputDir = Path("runs"),
    alertmanager: AlertmanagerUrl = None,
) -> None:
    """End a silence now."""
    from obsinfra.control.alertmanager import Alertmanager

    Alertmanager(_alertmanager_url(output_dir, alertmanager)).end_silence(id)
    console.print(f"ended silence {escape(id)}", soft_wrap=True)


def test(
    to: Annotated[str, typer.Option("--to", help=f"all, or of {', '.join(CHANNELS)}, by comma.")] = "all",
    output_dir: OutputDir = Path("runs"),
    alertmanager: AlertmanagerUrl = None,
) -> None:
    """Send a marked test alert through the path that real ones take, and say what became of it.

    Exit code 0 when each was delivered, 1 when one was not, 2 when a channel is not set up.
    """
    from obsinfra.control.alertmanager import Alertmanager
    from obsinfra.deployment.notification_check import send_test

    wanted = _channels(to)
    if alertmanager is None:
        info = _stack(output_dir, "--alertmanager")
        asked, log = Alertmanager(info.alertmanager_url), info.state_dir / "logs" / "alertmanager.log"
    else:
        asked, log = Alertmanager(alertmanager), None
    receivers = asked.receivers()
    if to == "all":
        wanted = [channel for channel in CHANNELS if channel in receivers]
    missing = [channel for channel in wanted if channel not in receivers]
    if missing or not wanted:
        raise _not_set_up(missing, asked.url)
    outcomes = []
    for channel in wanted:
        outcome = send_test(asked, channel, log=log)
        outcomes.append(outcome)
        colour = {"delivered": "green", "failed": "red"}.get(outcome.state, "yellow")
        console.print(
            f"[{colour}]{outcome.state:<10}[/]{channel:<10}{escape(outcome.evidence)}", soft_wrap=True
        )
    if any(outcome.state != "delivered" for outcome in outcomes):
        raise typer.Exit(1)


def _files(folder: Path, settings: Settings) -> dict[Path, str]:
    policy = policy_with(settings.policy, known_actions_only=False)
    templates = render_templates(settings.notify, policy=policy)
    return {folder / "alertmanager.yml": render_alertmanager(settings.notify)} | {
        folder / "templates" / name: text for name, text in templates.items()
    }


def _channels(to: str) -> list[str]:
    words = [word for word in re.split(r"[\s,]+", to) if word]
    unknown = [word for word in words if word not in (*CHANNELS, "all")]
    if unknown or not words or ("all" in words and len(words) > 1):
        wrong = unknown[0] if unknown else to
        raise ConfigError(f"channel {wrong!r}", f"all, or of {', '.join(CHANNELS)}", "correct --to")
    return [] if words == ["all"] else words


def _not_set_up(missing: list[str], url: str) -> ConfigError:
    configured = resolve({}).settings.notify.channels
    late = [channel for channel in (missing or CHANNELS) if channel in configured]
    if late:
        return ConfigError(
            f"{', '.join(late)} is set up in [notify], but not in Alertmanager at {url}",
            "an Alertmanager started with these settings",
            "'obsinfra down', then 'obsinfra up'",
        )
    name = missing[0] if missing else "slack"
    wrong = f"{', '.join(missing)} is not set up" if missing else "no channel is set up"
    return ConfigError(
        f"{wrong} in Alertmanager at {url}",
        f"[notify.{name}] in obsinfra.toml",
        "see docs/notifications.md, then 'obsinfra down' and 'obsinfra up'",
    )


def _stack(output_dir: Path, option: str) -> Any:
    from obsinfra.deployment.which_stack import WhichStack

    info = WhichStack(output_dir).status()
    if info is None:
        raise ConfigError(
            f"no stack is up in {output_dir / '.stack'}", "a running one", f"'obsinfra up', or {option} URL"
        )
    return info


def _alertmanager_url(output_dir: Path, given: str | None) -> str:
    if given is not None:
        return given
    return str(_stack(output_dir, "--alertmanager").alertmanager_url)


def _seconds(text: str, option: str) -> float:
    """As `duration_seconds`, between a second and a year."""
    seconds = duration_seconds(text, option)
    if not 1 <= seconds <= LONGEST_SECONDS:
        raise ConfigError(f"{option} {text!r}", "between 1s and 366d")
    return seconds


def _where(labels: Mapping[str, str]) -> str:
    """What tells alerts of one name and run apart: rank, device and host first, then what else there is."""
    first = [key for key in ("rank", "device", "host") if key in labels]
    rest = sorted(set(labels) - {*first, *OWN_COLUMN})
    return " ".join(f"{key} {labels[key]}" for key in (*first, *rest) if labels[key])


def _state(silenced_by: tuple[str, ...], inhibited_by: tuple[str, ...]) -> str:
    if silenced_by:
        return "silenced"
    return "inhibited" if inhibited_by else "active"


def _span(seconds: float) -> str:
    for size, unit, smaller, name in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}{int(seconds % size // smaller)}{name}"
    return f"{max(0, int(seconds))}s"


def _clock(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _iso(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"no JSON for {type(value).__name__}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "obsinfra"
