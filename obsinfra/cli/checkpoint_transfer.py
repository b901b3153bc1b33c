"""`obsinfra checkpoints export | import | push | pull`: into another format, or to a remote, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional, cast

import typer
from rich.markup import escape

from obsinfra.cli.checkpoint_place import Name, OfRun, console, progress, store_of
from obsinfra.cli.runs import OutputDir
from obsinfra.errors import CheckpointError, ConfigError


def export(
    checkpoint: Name,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="File to write; a folder for dcp.")],
    run: OfRun = "latest",
    output_dir: OutputDir = Path("runs"),
    form: Annotated[str, typer.Option("--format", help="safetensors, torch or dcp.")] = "safetensors",
    part: Annotated[str, typer.Option(help="Entry of the state, or 'all'.")] = "model",
    force: Annotated[bool, typer.Option("--force", help="Replace a target of the same kind.")] = False,
) -> None:
    """Write a checkpoint in another format.

    safetensors: for Hugging Face's loaders, as DIR/model.safetensors beside its config.json; a tensor with
    several names (tied weights) is in it once. torch: for torch.load(weights_only=True). dcp: for dcp.load.
    """
    from obsinfra.backup.backup_system import create_backup_system
    from obsinfra.backup.export import Format
    from obsinfra.backup.export import export as write

    backup = create_backup_system(store_of(output_dir, run).root)
    size = write(backup, checkpoint, target, form=cast(Format, form), part=part, replace=force)
    console.print(f"{size / 1e6:.1f} MB → {escape(str(target))}", soft_wrap=True)


def import_checkpoint(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="A .safetensors file, or one of torch.save.")
    ],
    run: OfRun = "latest",
    output_dir: OutputDir = Path("runs"),
    tag: Annotated[Optional[str], typer.Option(help="Its tag; default: imported-<id>.")] = None,  # noqa: UP045
    step: Annotated[int, typer.Option(min=0, help="Step it is of.")] = 0,
) -> None:
    """Make a checkpoint of a file of weights. Nothing in it is unpickled freely."""
    from obsinfra.backup.backup_system import create_backup_system
    from obsinfra.backup.export import import_file

    backup = create_backup_system(store_of(output_dir, run, new=True).root)
    saved = import_file(backup, source, step=step, tag=tag)
    console.print(f"{saved.bytes_total / 1e6:.1f} MB → {saved.path.stem}", soft_wrap=True)


def push(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where to, e.g. s3://bucket/folder/run.")],
    run: OfRun = "latest",
    output_dir: OutputDir = Path("runs"),
    checkpoint: Annotated[Optional[str], typer.Option(help="Only this one.")] = None,  # noqa: UP045
) -> None:
    """Copy checkpoints to a remote; only what is missing there. Started again, it goes on where it was."""
    from obsinfra.backup import transfer

    _check_url(url)
    with progress("pushing") as advance:
        done = transfer.push(store_of(output_dir, run), url, checkpoint, progress=advance)
    _print_transfer(done)


def pull(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where from, e.g. s3://bucket/folder/run.")],
    target: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it at run time
        typer.Argument(metavar="FOLDER", help="A folder of checkpoints, made if needed; default: --run's."),
    ] = None,
    run: OfRun = "latest",
    output_dir: OutputDir = Path("runs"),
    checkpoint: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Only this one: id, full name or 'latest'."),
    ] = None,
) -> None:
    """Copy checkpoints from a remote, every hash verified; only what is missing here."""
    from obsinfra.backup import transfer
    from obsinfra.backup.remote import Remote
    from obsinfra.backup.store import CheckpointStore

    _check_url(url)
    store = CheckpointStore(target) if target is not None else store_of(output_dir, run, new=True)
    with progress("pulling") as advance:
        done = transfer.pull(url, store, checkpoint, progress=advance)
    if not done.checkpoints and not Remote(url).of_one_run().manifests():
        raise CheckpointError(
            f"no checkpoints at {url}", "a copy that 'obsinfra checkpoints push' or checkpoint_remote made"
        )
    _print_transfer(done)


def _check_url(url: str) -> None:
    if "://" not in url:
        raise ConfigError(
            f"URL {url!r}", "one with a scheme, e.g. s3://bucket/folder/run or file:///folder/run"
        )


def _print_transfer(done: Any) -> None:
    for name in done.checkpoints:
        console.print(f"copied  {name.removesuffix('.json')}", soft_wrap=True)
    console.print(
        f"{len(done.checkpoints)} checkpoints, {done.objects} chunks, {done.bytes / 1e6:.1f} MB copied"
    )
