"""`obsinfra checkpoints …`: the group of commands, and those that look at what a run has saved.

Keeping is in `checkpoint_keeping`, taking elsewhere in `checkpoint_transfer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.markup import escape
from rich.table import Table

from obsinfra.cli import checkpoint_keeping as keeping
from obsinfra.cli import checkpoint_transfer as transfer
from obsinfra.cli.checkpoint_place import Name, OfRun, RunPlace, console, progress, store_of
from obsinfra.cli.runs import OutputDir
from obsinfra.cli.tables import print_table
from obsinfra.errors import CheckpointError

if TYPE_CHECKING:
    from obsinfra.backup.manifest import Manifest
    from obsinfra.backup.store import CheckpointStore

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
        ("prune", keeping.prune),
        ("tag", keeping.tag),
        ("untag", keeping.untag),
        ("confirm", keeping.confirm),
        ("export", transfer.export),
        ("import", transfer.import_checkpoint),
        ("push", transfer.push),
        ("pull", transfer.pull),
    ):
        group.command(name)(command)
    app.add_typer(group, name="checkpoints", rich_help_panel="Look")


def list_checkpoints(run: RunPlace = "latest", output_dir: OutputDir = Path("runs")) -> None:
    """Checkpoints, newest last."""
    from obsinfra.backup import tags

    store = store_of(output_dir, run)
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

    store = store_of(output_dir, run)
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

    store = store_of(output_dir, run)
    paths = store.manifest_paths() if checkpoint is None else [tags.find(store, checkpoint)]
    results: list[tuple[Path, str | None]] = []
    manifests = []
    for path in paths:
        try:
            manifests.append(store.read_manifest(path))
        except CheckpointError as error:
            results.append((path, str(error)))
    total = sum(manifest.bytes_total for manifest in manifests)
    with progress("verifying") as advance:
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
        store = store_of(output_dir, place)
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

    found = usage(store_of(output_dir, run))
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


def _tags_by_checkpoint(store: CheckpointStore) -> dict[str, list[str]]:
    from obsinfra.backup import tags

    names: dict[str, list[str]] = {}
    for name, manifest_name in tags.tags(store).items():
        names.setdefault(manifest_name, []).append(name)
    return names


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
