"""Ranks of a gloo group on the loopback, a process each, and what they do in the tests of `dcp`."""

from __future__ import annotations

import errno
import json
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from crashing_writer import start
from faulty_files import FailingFiles, KillingFiles, WatchedFiles
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.compare import differences
from obsinfra.backup.dcp import ObsinfraReader, ObsinfraWriter
from obsinfra.backup.file_layer import FileLayer

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


# ---- a training ------------------------------------------------------------------------------------------


def build(seed: int) -> nn.Module:
    """Layers whose rows do not divide by two, and one with a single row, so that a rank's shard is empty."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5), nn.Linear(5, 1))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):  # the data begins anew at each call
        optimizer.zero_grad()
        model(torch.randint(0, 7, (4,), generator=generator)).square().mean().backward()
        optimizer.step()


def state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, options: StateDictOptions | None = None
) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    return {"model": of_model, "optimizer": of_optimizer}


def save(
    root: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int = 1,
    files: FileLayer | None = None,
) -> str:
    """Save, and tell the manifest's path."""
    state = state_of(model, optimizer) | {"step": step}
    metadata = dcp.save(state, storage_writer=ObsinfraWriter(root, step=step, files=files))
    assert metadata.storage_meta is not None
    return str(metadata.storage_meta.checkpoint_id)


def load(root: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest, and tell its step."""
    state = state_of(model, optimizer) | {"step": -1}
    dcp.load(state, storage_reader=ObsinfraReader(root))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def keep(root: Path, state: dict[str, Any]) -> None:
    """Set a whole state aside, not through DCP."""
    create_backup_system(root).save(state, step=0, epoch=0)


def kept(root: Path) -> Any:
    return create_backup_system(root).load().state


# ---- processes -------------------------------------------------------------------------------------------


def in_group(folder: Path, task: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Run `task(rank, folder, *arguments)` on two ranks; tells their exit codes."""
    folder.mkdir()
    ranks = [start(_rank, rank, folder, task, arguments) for rank in range(2)]
    for rank in ranks:
        rank.join()
    return [rank.exitcode for rank in ranks]


def _rank(rank: int, folder: Path, task: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    task(rank, folder, *arguments)
    dist.destroy_process_group()


def report(folder: Path, rank: int) -> dict[str, Any]:
    """What a rank found out, by topic."""
    found: dict[str, Any] = json.loads((folder / f"report-{rank}.json").read_text())
    return found


# ---- what ranks do ---------------------------------------------------------------------------------------


def all_topics(rank: int, folder: Path, saved_by_one: Path) -> None:
    """Everything that ranks which stay alive can show, each topic apart."""
    found: dict[str, Any] = {}
    for topic in (_save_ddp, _save_fsdp, _load_ddp, _load_fsdp, _load_one, _fail, _disagree):
        try:
            found[topic.__name__.removeprefix("_")] = topic(rank, folder, saved_by_one)
        except BaseException:  # DCP's is one
            found[topic.__name__.removeprefix("_")] = traceback.format_exc()
    (folder / f"report-{rank}.json").write_text(json.dumps(found))


def _ddp(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = DistributedDataParallel(build(seed))
    return model, optimizer_of(model)


def _fsdp(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build(seed)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.children():
        if not isinstance(layer, nn.Tanh):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, optimizer_of(model)


def _save(
    rank: int, folder: Path, name: str, made: tuple[nn.Module, torch.optim.Optimizer]
) -> dict[str, Any]:
    """Train, save, set the whole state aside twice: now and one step later."""
    model, optimizer = made
    train(model, optimizer, 3)
    files = WatchedFiles()
    manifest = save(folder / name, model, optimizer, 3, files)
    objects = [path for operation, path in files.operations if operation == "rename" and path.suffix == ""]
    answer = {"manifest": manifest, "objects": [path.name for path in objects]}
    for moment in ("then", "later"):
        whole = state_of(model, optimizer, WHOLE)
        if rank == 0:
            keep(folder / f"{name}-{moment}", whole)
        train(model, optimizer, 1)
    return answer


def _save_ddp(rank: int, folder: Path, _: Path) -> dict[str, Any]:
    return _save(rank, folder, "ddp", _ddp(1))


def _save_fsdp(rank: int, folder: Path, _: Path) -> dict[str, Any]:
    return _save(rank, folder, "fsdp", _fsdp(2))


def _load(
    rank: int, made: tuple[nn.Module, torch.optim.Optimizer], store: Path, expected: Path
) -> dict[str, Any]:
    model, optimizer = made
    train(model, optimizer, 1)  # so that nothing is right by chance
    step = load(store, model, optimizer)
    whole = state_of(model, optimizer, WHOLE)
    return {"step": step, "differences": differences(kept(expected), whole) if rank == 0 else []}


def _load_ddp(rank: int, folder: Path, _: Path) -> dict[str, Any]:
    """What DDP saved, into FSDP2."""
    return _load(rank, _fsdp(11), folder / "ddp", folder / "ddp-then")


def _load_fsdp(rank: int, folder: Path, _: Path) -> dict[str, Any]:
    """What FSDP2 saved, into DDP, and into FSDP2, which then trains on."""
    answer = _load(rank, _ddp(12), folder / "fsdp", folder / "fsdp-then")
    model, optimizer = made = _fsdp(13)
    answer["same"] = _load(rank, made, folder / "fsdp", folder / "fsdp-then")
    for moment in ("then", "later"):
        whole = state_of(model, optimizer, WHOLE)
        if rank == 0:
            answer[moment] = differences(kept(folder / f"fsdp-{moment}"), whole)
        train(model, optimizer, 1)
    return answer


def _load_one(rank: int, folder: Path, saved_by_one: Path) -> dict[str, Any]:
    """What one process saved, into FSDP2; and back for one process to load."""
    made = _fsdp(14)
    answer = _load(rank, made, saved_by_one, saved_by_one.with_name("one-then"))
    save(folder / "back", *made)
    return answer


def _fail(rank: int, folder: Path, _: Path) -> dict[str, Any]:
    """The disk of rank 1 fails. Then both save, through a store that has seen that."""
    model, optimizer = _ddp(15)
    files = FailingFiles(3, errno.EIO) if rank == 1 else None
    try:
        save(folder / "ddp", model, optimizer, 4, files)
    except dcp.CheckpointException as error:
        failure = {str(failed): repr(wrapped[0]) for failed, wrapped in error.failures.items()}
    manifests = sorted(path.name for path in (folder / "ddp" / "manifests").iterdir())
    dist.barrier()
    return {"failure": failure, "manifests": manifests, "next": save(folder / "ddp", model, optimizer, 5)}


def _disagree(rank: int, folder: Path, _: Path) -> dict[str, Any]:
    """Each rank names another checkpoint."""
    model, optimizer = _ddp(16)
    before = state_of(model, optimizer)
    paths = sorted((folder / "ddp" / "manifests").glob("*.json"))
    state = state_of(model, optimizer)
    try:
        dcp.load(state, storage_reader=ObsinfraReader(folder / "ddp", paths[rank]))
    except dcp.CheckpointException as error:
        return {"error": str(error), "differences": differences(before, state)}
    return {}


def save_with_a_death(rank: int, folder: Path, root: Path, at: int) -> None:
    """Rank 1 is killed right before operation number `at` of its save."""
    model, optimizer = _fsdp(3)
    train(model, optimizer, 1)
    try:
        save(root, model, optimizer, 2, KillingFiles(at) if rank == 1 else None)
    except BaseException as error:
        (folder / "report-0.json").write_text(json.dumps({"error": repr(error)}))
    os._exit(0)  # the group cannot be taken down in good order any more
