"""Which checkpoints a command of `obsinfra checkpoints` is about, and the console it answers on.

RUN is a run's name, `latest`, or a folder of checkpoints (a path with a `/`); CHECKPOINT is an id, a full
name, a tag or `latest`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from obsinfra.cli.runs import find
from obsinfra.errors import CheckpointError
from obsinfra.run.folder import RunFolder

if TYPE_CHECKING:
    from obsinfra.backup.store import CheckpointStore

console = Console()
RunPlace = Annotated[
    str, typer.Argument(metavar="RUN", help="Run name, 'latest', or a folder of checkpoints.")
]
OfRun = Annotated[
    str, typer.Option("--run", metavar="RUN", help="Run name, 'latest', or a folder of checkpoints.")
]
Name = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Id, full name, tag or 'latest'.")]


def store_of(output_dir: Path, run: str, *, new: bool = False) -> CheckpointStore:
    """The store of a run, or at a path.

    Args:
        new: it need not be there yet.
    """
    from obsinfra.backup.store import CheckpointStore

    folder = folder_of(output_dir, run)
    root = Path(run).expanduser() if folder is None else folder.checkpoints
    store = CheckpointStore(root)
    if new or folder is not None or store.manifests.is_dir():
        return store
    if (inside := CheckpointStore(root / "checkpoints")).manifests.is_dir():
        return inside
    raise CheckpointError(
        f"no checkpoints in {root}",
        "a folder with manifests/ and objects/ in it, or with checkpoints/, which has them",
        "see 'obsinfra runs' for the names of runs",
    )


def folder_of(output_dir: Path, run: str) -> RunFolder | None:
    """The run's folder; None when `run` is a folder of checkpoints."""
    if "/" not in run:
        return find(output_dir, run)
    path = Path(run).expanduser()
    return RunFolder(path) if (path / "run.json").exists() else None


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over bytes; nothing off a terminal."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
