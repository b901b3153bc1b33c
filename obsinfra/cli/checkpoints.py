"""`obsinfra checkpoints …`: what a run has saved, whether it is sound, keeping it, and taking it elsewhere.

RUN is a run's name, `latest`, or a folder of checkpoints (a path with a `/`); CHECKPOINT is an id, a full
name, a tag or `latest`.
"""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from obsinfra.cli.runs import OutputDir, find
from obsinfra.cli.tables import print_table
from obsinfra.errors import CheckpointError, ConfigError
from obsinfra.run.folder import RunFolder

if TYPE_CHECKING:
    from obsinfra.backup.manifest import Manifest
    from obsinfra.backup.store import CheckpointStore

console = Console()
RunPlace = Annotated[
    str, typer.Argument(metavar="RUN", help="Run name, 'latest', or a folder of checkpoints.")
]
OfRun = Annotated[
    str, typer.Option("--run", metavar="RUN", help="Run name, 'latest', or a folder of checkpoints.")
]
Name = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Id, full name, tag or 'latest'.")]
ShownLines = Annotated[int, typer.Option("--lines", "-n", min=1, help="How many rows at most.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    group = typer.Typer(help="Checkpoints of a run.", no_args_is_help=True)
    for name, command in (
        ("list", list_checkpoints),
        ("show", show),
        ("verify", verify),
        ("diff", diff),
        ("du", disk_usage),
        ("prune", prune),
        ("tag", tag),
        ("untag", untag),
        ("confirm", confirm),
        ("export", export),
        ("import", import_checkpoint),
        ("push", push),
        ("pull", pull),
    ):
        group.command(name)(command)
    app.add_typer(group, name="checkpoints", rich_help_panel="Look")


# ---- looking -----------------------------------------------------------------------------------------


def list_checkpoints(run: RunPlace = "latest", output_dir: OutputDir = Path("runs")) -> None:
    """Checkpoints, newest last."""
    from obsinfra.backup import tags

    store = _store(output_dir, run)
    names = _tags_by_checkpoint(store)
    confirmed = tags.confirmed(store)
    damaged: dict[Path, str] = {}
    table = _table("checkpoint", "epoch", "step", "made (UTC)", "MB", "tags", "why")
    for info in tags.readable(store, problems=damaged):
        marks = [*names.get(info.path.name, []), *(["(confirmed)"] if info.path.name in confirmed else [])]
        table.add_row(
            info.path.stem,
            str(info.epoch),
            str(info.step),
            info.created_at[:19].replace("T", " "),
            f"{info.bytes_total / 1e6:.1f}",
            escape(", ".join(marks)),
            escape(info.reason or ("torch.distributed" if info.distributed else "")),
        )
    if table.rows:
        print_table(console, table)
    elif not damaged:
        console.print(f"no checkpoint in {store.root} yet", soft_wrap=True)
    for path, problem in damaged.items():
        console.print(f"[red]damaged[/]  {path.stem}: {escape(problem)}", soft_wrap=True)


def show(
    checkpoint: Name = "latest",
    run: OfRun = "latest",
    output_dir: OutputDir = Path("runs"),
    lines: ShownLines = 40,
) -> None:
    """One checkpoint: where training was, what it holds, its largest tensors."""
    from obsinfra.backup import tags

    store = _store(output_dir, run)
    info = store.read_manifest(tags.find(store, checkpoint))
    names = _tags_by_checkpoint(store).get(info.path.name, [])
    ranks = info.attributes.get("world_size", 1)
    by = f"torch.distributed.checkpoint, {ranks} rank{'' if ranks == 1 else 's'}"
    rows = [
        ("checkpoint", info.path.stem),
        ("run", info.run or "–"),
        ("kind", info.kind),
        ("epoch, step", f"{info.epoch}, {info.step}"),
        ("made", info.created_at),
        ("why", info.reason or "–"),
        ("tags", ", ".join(names) or "–"),
        ("parent", info.parent or "–"),
        ("resumable", "yes" if info.resumable else "no"),
        *(
            [("saved by", by), ("load with", "dcp.load(…, storage_reader=ObsinfraReader(…))")]
            if info.distributed
            else []
        ),
        (
            "size",
            f"{info.bytes_total / 1e6:.1f} MB in {len(info.tensors)} "
            + ("shards" if info.distributed else "tensors"),
        ),
        ("metrics", ", ".join(f"{name} {value:.4g}" for name, value in info.metrics.items()) or "–"),
        ("versions", ", ".join(f"{name} {value}" for name, value in info.versions.items())),
    ]
    for name, value in rows:
        console.print(f"[bold]{name:<12}[/]{escape(value)}", soft_wrap=True)
    found = sorted(_shown_tensors(info), key=lambda tensor: (-tensor.nbytes, tensor.place))
    table = _table("tensor", "dtype", "shape", *(["shards"] if info.distributed else []), "MB")
    for tensor in found[:lines]:
        table.add_row(
            escape(tensor.place),
            tensor.dtype,
            str(tensor.shape).replace("[", "\\["),
            *([str(tensor.shards)] if info.distributed else []),
            f"{tensor.nbytes / 1e6:.3f}",
        )
    print_table(console, table)
    if len(found) > lines:
        console.print(f"and {len(found) - lines} smaller ones (--lines)")


def verify(
    run: RunPlace = "latest",
    output_dir: OutputDir = Path("runs"),
    checkpoint: Annotated[Optional[str], typer.Option(help="Only this one.")] = None,  # noqa: UP045
) -> None:
    """Read every chunk of every checkpoint and compare its hash; exit code 1 when one is damaged."""
    from obsinfra.backup import tags

    store = _store(output_dir, run)
    paths = store.manifest_paths() if checkpoint is None else [tags.find(store, checkpoint)]
    results: list[tuple[Path, str | None]] = []
    manifests = []
    for path in paths:
        try:
            manifests.append(store.read_manifest(path))
        except CheckpointError as error:
            results.append((path, str(error)))
    total = sum(manifest.bytes_total for manifest in manifests)
    with _progress("verifying") as advance:
        done = 0
        for manifest in manifests:
            problem = None
            read = done
            try:
                for digest in sorted(manifest.chunks()):
                    read += len(store.objects.read(digest, manifest.path.name))
                    advance(read, total)
            except CheckpointError as error:
                problem = str(error)
            if problem is None or manifest.path.exists():  # else pruned meanwhile
                results.append((manifest.path, problem))
            done += manifest.bytes_total  # more than was read where tensors share chunks
            advance(done, total)
    for path, problem in sorted(results):
        if problem is None:
            console.print(f"[green]sound[/]    {path.stem}")
        else:
            console.print(f"[red]damaged[/]  {path.stem}: {escape(problem)}", soft_wrap=True)
    if not results:
        console.print(f"no checkpoint in {store.root} yet", soft_wrap=True)
    if any(problem for _, problem in results):
        raise typer.Exit(1)


def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="Id, full name, tag or 'latest'.")],
    right: Annotated[str, typer.Argument(metavar="B", help="The same.")],
    run: OfRun = "latest",
    right_run: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it at run time
        typer.Option("--with-run", metavar="RUN", help="Run of B; default: that of A."),
    ] = None,
    output_dir: OutputDir = Path("runs"),
    lines: ShownLines = 200,
) -> None:
    """Tensors and values in which two checkpoints differ, bit for bit; exit code 1 when there are any."""
    from obsinfra.backup import tags
    from obsinfra.backup.compare import differences
    from obsinfra.backup.dcp_whole import read_any_state
    from obsinfra.backup.export import leaves

    states = []
    for name, place in ((left, run), (right, right_run or run)):
        store = _store(output_dir, place)
        states.append(read_any_state(store, store.read_manifest(tags.find(store, name))))
    sides = [{".".join(path): leaf for path, leaf in leaves(state)} for state in states]
    table = _table("where", "how", "MB")
    count = equal = 0
    changed_bytes = 0
    for place in sorted(sides[0].keys() | sides[1].keys()):
        sizes = [int(getattr(side.get(place), "nbytes", 0)) for side in sides]
        if place not in sides[0] or place not in sides[1]:
            how = "only in " + ("A" if place in sides[0] else "B")
        elif found := differences(sides[0][place], sides[1][place], ""):
            how = found[0].removeprefix(": ")
        else:
            equal += 1
            continue
        count += 1
        changed_bytes += max(sizes)
        if count <= lines:
            table.add_row(escape(place), escape(how), f"{max(sizes) / 1e6:.3f}" if max(sizes) else "")
    if not count:  # of empty containers, and of list or tuple, leaves know nothing
        for line in differences(states[0], states[1]):
            count += 1
            table.add_row("", escape(line), "")
    if count:
        print_table(console, table)
        if count > lines:
            console.print(f"and {count - lines} more (--lines)")
        console.print(f"{count} differ ({changed_bytes / 1e6:.3f} MB), {equal} are the same")
        raise typer.Exit(1)
    console.print(f"the same, bit for bit ({equal} tensors and values)")


def disk_usage(run: RunPlace = "latest", output_dir: OutputDir = Path("runs")) -> None:
    """Bytes by checkpoint: what only it needs (its removal frees so much) and what it shares with others."""
    from obsinfra.backup.usage import usage

    found = usage(_store(output_dir, run))
    table = _table("checkpoint", "unique MB", "shared MB")
    for one in found.checkpoints:
        table.add_row(
            one.manifest.path.stem, f"{one.unique_bytes / 1e6:.3f}", f"{one.shared_bytes / 1e6:.3f}"
        )
    print_table(console, table)
    console.print(
        f"{found.total_bytes / 1e6:.3f} MB on disk"
        + (
            f", {found.unreferenced_bytes / 1e6:.3f} MB of it named by no readable checkpoint"
            if found.unreferenced_bytes
            else ""
        )
    )


# ---- keeping -----------------------------------------------------------------------------------------


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
    store = _store(output_dir, run)
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

    store = _store(output_dir, run)
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

    tags.untag(_store(output_dir, run), name)
    console.print(f"{escape(name)} removed")


def confirm(checkpoint: Name, run: OfRun = "latest", output_dir: OutputDir = Path("runs")) -> None:
    """Say that an emergency checkpoint was looked at: from now on it is kept as a regular one is."""
    from obsinfra.backup import tags

    store = _store(output_dir, run)
    path = tags.find(store, checkpoint)
    tags.confirm(store, path)
    console.print(f"{path.stem} confirmed")


# ---- taking elsewhere --------------------------------------------------------------------------------


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

    backup = create_backup_system(_store(output_dir, run).root)
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

    backup = create_backup_system(_store(output_dir, run, new=True).root)
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
    with _progress("pushing") as advance:
        done = transfer.push(_store(output_dir, run), url, checkpoint, progress=advance)
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
    store = CheckpointStore(target) if target is not None else _store(output_dir, run, new=True)
    with _progress("pulling") as advance:
        done = transfer.pull(url, store, checkpoint, progress=advance)
    if not done.checkpoints and not Remote(url).of_one_run().manifests():
        raise CheckpointError(
            f"no checkpoints at {url}", "a copy that 'obsinfra checkpoints push' or checkpoint_remote made"
        )
    _print_transfer(done)


# ---- shared ------------------------------------------------------------------------------------------


def _store(output_dir: Path, run: str, *, new: bool = False) -> CheckpointStore:
    """The store of a run, or at a path.

    Args:
        new: it need not be there yet.
    """
    from obsinfra.backup.store import CheckpointStore

    folder = _run_folder(output_dir, run)
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


def _run_folder(output_dir: Path, run: str) -> RunFolder | None:
    """The run's folder; None when `run` is a folder of checkpoints."""
    if "/" not in run:
        return find(output_dir, run)
    path = Path(run).expanduser()
    return RunFolder(path) if (path / "run.json").exists() else None


def _configured_keep(output_dir: Path, run: str) -> int:
    """`keep_checkpoints` as the run was started with, or the default."""
    default = 3
    folder = _run_folder(output_dir, run)
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


def _tags_by_checkpoint(store: CheckpointStore) -> dict[str, list[str]]:
    from obsinfra.backup import tags

    names: dict[str, list[str]] = {}
    for name, manifest_name in tags.tags(store).items():
        names.setdefault(manifest_name, []).append(name)
    return names


def _check_metric(store: CheckpointStore, name: str | None) -> None:
    """Whether any checkpoint has that metric: a misspelt one would keep nothing."""
    from obsinfra.backup import tags

    known = sorted({metric for manifest in tags.readable(store) for metric in manifest.metrics})
    if name is not None and known and name not in known:
        raise ConfigError(f"--best-metric {name!r}, which no checkpoint has", f"one of {', '.join(known)}")


def _check_url(url: str) -> None:
    if "://" not in url:
        raise ConfigError(
            f"URL {url!r}", "one with a scheme, e.g. s3://bucket/folder/run or file:///folder/run"
        )


def _kept_count(store: CheckpointStore, gone: list[Path]) -> int:
    return len([path for path in store.manifest_paths() if path not in gone])


@dataclass(frozen=True, slots=True)
class _ShownTensor:
    place: str
    dtype: str
    shape: list[int]
    shards: int
    nbytes: int


def _shown_tensors(manifest: Manifest) -> Iterator[_ShownTensor]:
    """Every place of a state at which there is a tensor; shards of one are counted together."""
    if not manifest.distributed:
        for place, index in _places(manifest.state, "state"):
            entry = manifest.tensors[index]
            yield _ShownTensor(place, entry.dtype, list(entry.shape), 1, entry.nbytes)
        return
    for name, item in manifest.state["items"].items():
        if "shards" in item:
            nbytes = sum(manifest.tensors[shard["entry"]].nbytes for shard in item["shards"])
            yield _ShownTensor(name, item["dtype"], item["size"], len(item["shards"]), nbytes)


def _places(document: Any, path: str) -> Iterator[tuple[str, int]]:
    """Where in a state document tensors are, and their indices."""
    if isinstance(document, list):
        for index, item in enumerate(document):
            yield from _places(item, f"{path}[{index}]")
    elif isinstance(document, dict):
        if isinstance(document.get("tensor"), int) and "$" in document:
            yield path, document["tensor"]
        elif document.get("$") == "map":
            for key, item in document["items"]:
                yield from _places(item, f"{path}[{key!r}]")
        elif document.get("$") == "tuple":
            yield from _places(document["items"], path)
        elif "$" not in document:
            for key, item in document.items():
                yield from _places(item, f"{path}.{key}")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(
            column,
            overflow="fold",
            no_wrap=column in ("checkpoint", "made (UTC)"),  # what one copies, whatever the width
            justify="right" if column.endswith("MB") else "left",
        )
    return table


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over bytes; nothing off a terminal."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_transfer(done: Any) -> None:
    for name in done.checkpoints:
        console.print(f"copied  {name.removesuffix('.json')}", soft_wrap=True)
    console.print(
        f"{len(done.checkpoints)} checkpoints, {done.objects} chunks, {done.bytes / 1e6:.1f} MB copied"
    )
