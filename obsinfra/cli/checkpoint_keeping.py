"""`obsinfra checkpoints prune | tag | untag | confirm`: what stays of a run's checkpoints, and its names."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, cast

import typer
from rich.markup import escape

from obsinfra.cli.checkpoint_place import Name, OfRun, RunPlace, console, folder_of, store_of
from obsinfra.cli.runs import OutputDir
from obsinfra.errors import ConfigError

if TYPE_CHECKING:
    from obsinfra.backup.store import CheckpointStore


def prune(
    run: RunPlace = "latest",
    output_dir: OutputDir = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    keep_last: Annotated[
        Optional[int],  # noqa: UP045 - typer reads it at run time
        typer.Option(min=1, help="Regular ones kept, the newest; default: as the run was started with."),
    ] = None,
    keep_every: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Also the first one at or after each multiple of so many steps."),
    ] = None,
    keep_best: Annotated[int, typer.Option(min=1, help="Best ones kept.")] = 1,
    best_metric: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Also those with the best values of this metric."),
    ] = None,
    best_mode: Annotated[str, typer.Option(help="min or max: which is better.")] = "min",
    keep_emergency: Annotated[
        int, typer.Option(min=0, help="Unconfirmed emergency ones kept; 0: all until confirmed.")
    ] = 0,
) -> None:
    """Remove checkpoints that no rule keeps.

    Always kept: tagged ones, the newest sound one, and the one committed last.
    """
    from obsinfra.backup import retention

    if best_mode not in ("min", "max"):
        raise ConfigError(f"--best-mode {best_mode!r}", "min or max")
    policy = retention.Retention(
        keep_last=keep_last or _configured_keep(output_dir, run),
        keep_every=keep_every,
        keep_best=keep_best,
        best_metric=best_metric,
        best_mode=cast(Literal["min", "max"], best_mode),
        keep_emergency=keep_emergency or None,
    )
    store = store_of(output_dir, run)
    _check_metric(store, best_metric)
    if dry_run:
        paths = [manifest.path for manifest in retention.doomed(store, policy)]
    else:
        paths = retention.prune(store, policy)
    for path in paths:
        console.print(f"{'would remove' if dry_run else 'removed'}  {path.stem}", soft_wrap=True)
    console.print(f"{len(paths)} {'to remove' if dry_run else 'removed'}, {_kept_count(store, paths)} kept")


def tag(
    checkpoint: Name,
    name: Annotated[str, typer.Argument(metavar="TAG", help="Letters, digits, '.', '_', '-'.")],
    run: OfRun = "latest",
    output_dir: OutputDir = Path("runs"),
    move: Annotated[bool, typer.Option("--move", help="Take the tag from another checkpoint.")] = False,
) -> None:
    """Name a checkpoint; it is kept as long as it has a tag."""
    from obsinfra.backup import tags

    store = store_of(output_dir, run)
    path = tags.find(store, checkpoint)
    tags.tag(store, path, name, move=move)
    console.print(f"{escape(name)} → {path.stem}")


def untag(
    name: Annotated[str, typer.Argument(metavar="TAG")],
    run: OfRun = "latest",
    output_dir: OutputDir = Path("runs"),
) -> None:
    """Take a tag away; the checkpoint stays until a prune."""
    from obsinfra.backup import tags

    tags.untag(store_of(output_dir, run), name)
    console.print(f"{escape(name)} removed")


def confirm(checkpoint: Name, run: OfRun = "latest", output_dir: OutputDir = Path("runs")) -> None:
    """Say that an emergency checkpoint was looked at: from now on it is kept as a regular one is."""
    from obsinfra.backup import tags

    store = store_of(output_dir, run)
    path = tags.find(store, checkpoint)
    tags.confirm(store, path)
    console.print(f"{path.stem} confirmed")


def _configured_keep(output_dir: Path, run: str) -> int:
    """`keep_checkpoints` as the run was started with, or the default."""
    default = 3
    folder = folder_of(output_dir, run)
    if folder is None:
        return default
    try:
        document: dict[str, Any] = tomllib.loads(folder.config_toml.read_text())
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {folder.config_toml}: {error}", "TOML", "give --keep-last") from error
    value = document.get("keep_checkpoints", default)
    return value if isinstance(value, int) and value >= 1 else default


def _check_metric(store: CheckpointStore, name: str | None) -> None:
    """Whether any checkpoint has that metric: a misspelt one would keep nothing."""
    from obsinfra.backup import tags

    known = sorted({metric for manifest in tags.readable(store) for metric in manifest.metrics})
    if name is not None and known and name not in known:
        raise ConfigError(f"--best-metric {name!r}, which no checkpoint has", f"one of {', '.join(known)}")


def _kept_count(store: CheckpointStore, gone: list[Path]) -> int:
    return len([path for path in store.manifest_paths() if path not in gone])
