"""A nested training state whose tensors lie in parts on the ranks, saved by all at once and read back.

The keeper saves by it, `read_state` reads. Each rank writes its parts (`dcp`'s writer); what is not in parts
is rank 0's: a JSON document and its tensors. Knows no trainers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from obsinfra.backup.backup_system import Kind, SavedCheckpoint
from obsinfra.backup.dcp import ObsinfraSavePlanner, ObsinfraWriter
from obsinfra.backup.state_tree import decode, encode
from obsinfra.errors import CheckpointError

MARK = "$part"
DOCUMENT = "state document"
TENSOR = "state tensor"


def save_in_parts(
    state: Mapping[str, Any],
    store: Path,
    *,
    kind: Kind,
    step: int,
    epoch: int,
    metrics: Mapping[str, float],
    reason: str,
    run: str,
    resumable: bool,
) -> SavedCheckpoint | None:
    """Commit `state` durably, each rank its parts; a collective of all ranks, and all wait for it.

    Returns:
        What was saved, on rank 0 alone. Of `bytes_written` it is not known which were new: all are counted.

    Raises:
        CheckpointError: on every rank, when one of them failed; the store's checkpoints are as they were.
    """
    started = time.perf_counter()
    writer = ObsinfraWriter(
        store,
        kind=kind,
        step=step,
        epoch=epoch,
        metrics=metrics,
        reason=reason,
        run=run,
        resumable=resumable,
    )
    try:
        save(flat_state(state), storage_writer=writer, planner=ObsinfraSavePlanner())
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise CheckpointError(f"rank {rank} could not write its part: {cause}") from error
    if (saved := writer.saved) is None:
        return None
    seconds = time.perf_counter() - started
    size = saved.bytes_total
    return SavedCheckpoint(saved.path, saved.id, kind, step, epoch, size, size, seconds)


def flat_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What this rank gives to `dcp.save`: parts by their place in the state; on rank 0 the rest, too."""
    parts: dict[str, Any] = {}
    rest = _split(state, "", parts)
    if dist.get_rank() != 0:
        return parts
    document, tensors = encode(rest)
    plain = {f"{TENSOR} {number}": tensor for number, tensor in enumerate(tensors)}
    return {DOCUMENT: json.dumps({"document": document, "tensors": len(tensors)}), **plain, **parts}


def nested_state(flat: Mapping[str, Any]) -> Any:
    """The inverse of `flat_state`, once all parts of each tensor are put together.

    Raises:
        CheckpointError: it is not what `flat_state` has made.
    """
    try:
        kept = json.loads(flat[DOCUMENT])
        tensors = [flat[f"{TENSOR} {number}"] for number in range(kept["tensors"])]
        return _joined(decode(kept["document"], tensors), flat)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"state in parts is malformed: {error!r}", "one written by a trainer"
        ) from error


def everywhere(mine: bool, state: Mapping[str, Any]) -> bool:
    """Whether every rank says so and its own parts of the model are finite; one small collective."""
    model = [value.to_local() if isinstance(value, DTensor) else value for value in state["model"].values()]
    floats = [value for value in model if torch.is_floating_point(value) and value.numel()]
    flag = torch.tensor(float(mine and all(bool(torch.isfinite(value).all()) for value in floats)))
    if dist.get_backend() == "nccl":
        flag = flag.cuda()
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())


def _split(value: Any, path: str, parts: dict[str, Any]) -> Any:
    if isinstance(value, DTensor):
        parts[path] = value.detach()
        return {MARK: path}
    if isinstance(value, Mapping):
        return {
            key: _split(item, f"{path}.{key}" if path else str(key), parts) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)([_split(item, f"{path}.{number}", parts) for number, item in enumerate(value)])
    return value


def _joined(value: Any, flat: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {MARK}:
            return flat[value[MARK]]
        return {key: _joined(item, flat) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_joined(item, flat) for item in value])
    return value
