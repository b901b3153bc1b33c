"""`obsinfra demo`: the drill with the stack around it, told to a person."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from obsinfra.deployment.drill import Drill, DrillResult
from obsinfra.deployment.native_stack import NativeStack, StackInfo
from obsinfra.deployment.stack_state import StackUnavailable
from obsinfra.errors import ConfigError
from obsinfra.run.files import write_json_atomic

SCRAPE_INTERVAL = "1s"


def run_demo(output_dir: Path, stack_mode: str, console: Console) -> int:
    """Run the drill and print its timeline; 0 when the continuation was identical, else 1.

    Args:
        output_dir: folder of the demo's runs and stack.
        stack_mode: `auto` uses the real Prometheus and Alertmanager where installed, `on` insists, `off` lets
            the trainer evaluate the same alert table itself.

    Raises:
        ConfigError: unknown `stack_mode`.
        StackUnavailable: `on`, and the stack cannot run here.
        DrillFailed: a stage did not come about.
    """
    if stack_mode not in ("auto", "on", "off"):
        raise ConfigError(f"stack {stack_mode!r}", "auto, on or off", "correct --stack")
    started = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:5.1f} s[/]  {escape(text)}", soft_wrap=True)

    with _stack(output_dir, stack_mode, say) as stack:
        result = Drill(output_dir, stack, say).run()
    document = asdict(result) | {"stack": "native" if stack else "in-process"}
    write_json_atomic(output_dir / f"{result.run}.json", document, mode=0o644)
    _show(result, console)
    console.print(f"took {time.monotonic() - started:.0f} s; everything lies in {escape(str(output_dir))}")
    return 1 if result.differing else 0


@contextlib.contextmanager
def _stack(output_dir: Path, mode: str, say: Callable[[str], None]) -> Iterator[StackInfo | None]:
    """The stack of the demo's own folder, down again at the end; None where there is none."""
    stack = NativeStack(output_dir / ".stack")
    info: StackInfo | None = None
    if mode != "off":
        try:
            info = stack.up(output_dir, scrape_interval=SCRAPE_INTERVAL)
            say(f"Prometheus {info.prometheus_url}  Alertmanager {info.alertmanager_url}")
        except StackUnavailable as error:
            if mode == "on":
                raise
            say(f"{error}; going on with in-process alerting")
    try:
        yield info
    finally:
        if info is not None and not info.already_up:
            stack.down()


def _show(result: DrillResult, console: Console) -> None:
    table = Table(title="What happened", box=None, pad_edge=False, title_justify="left")
    table.add_column("seconds", justify="right")
    table.add_column("since the last", justify="right", style="dim")
    table.add_column("")
    origin = before = result.timeline[0].at
    for moment in result.timeline:
        table.add_row(f"{moment.at - origin:.3f}", f"+{moment.at - before:.3f}", escape(moment.what))
        before = moment.at
    console.print()
    console.print(table)
    console.print(f"crossing → committed checkpoint: [bold]{result.crossing_to_committed_seconds:.3f} s[/]")
    if result.differing:
        console.print(
            f"[red]NOT identical[/] at step {result.final_step}: {len(result.differing)} differences, first: "
            f"{escape(result.differing[0])}"
        )
    else:
        console.print(
            f"[green]identical[/] at step {result.final_step}: all {result.tensors} tensors of the resumed "
            "run (parameters, optimizer, random states) equal those of a run that was never interrupted, "
            "bit for bit"
        )
