"""A nested training state whose tensors lie in parts on ranks: one part of it, and all read back.

The keeper saves by it, `read_state` reads. Each rank's writer commits its part (`parts`); what is not in
parts is rank 0's: a JSON document and its tensors. Knows no trainers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from obsinfra.backup.dcp_values import value_text
from obsinfra.backup.state_tree import decode, encode
from obsinfra.backup.tensors import dtype_name
from obsinfra.errors import CheckpointError

MARK = "$part"
DOCUMENT = "state document"
TENSOR = "state tensor"


def part_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """This rank's part of `state` for a snapshot, as `parts` takes it; its tensors are the live ones. What
    several ranks have (HSDP) is in the part of the first. Not a collective.
    """
    items, values, shards = {}, {}, {}
    for name, value in flat_state(state).items():
        if not isinstance(value, torch.Tensor):
            values[name] = value_text(name, value).decode("ascii")
            continue
        own, offsets, mine = value, [0] * value.dim(), True
        if isinstance(value, DTensor):
            own = value.to_local()
            mine = _is_first(value) and (own.numel() > 0 or value.numel() == 0)
            offsets = list(
                compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)[1]
            )
        items[name] = {
            "dtype": dtype_name(value.dtype),
            "size": list(value.shape),
            "requires_grad": value.requires_grad,
        }
        if mine:
            shards[name] = {"offsets": offsets, "tensor": own}
    return {"items": items if dist.get_rank() == 0 else {}, "values": values, "shards": shards}


def _is_first(value: DTensor) -> bool:
    """Whether this rank is the first of those that have the same part."""
    place = value.device_mesh.get_coordinate() or ()
    return not any(
        at for at, placement in zip(place, value.placements, strict=True) if placement.is_replicate()
    )


def flat_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """By name: this rank's parts, by their place in the state; on rank 0 the rest, too."""
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


def everywhere(mine: bool) -> bool:
    """Whether every rank says so; one small collective."""
    flag = torch.tensor(float(mine))
    if dist.get_backend() == "nccl":
        flag = flag.cuda()
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())


def finite(state: Mapping[str, Any]) -> bool:
    """Whether this rank's parts of the model are."""
    model = [value.to_local() if isinstance(value, DTensor) else value for value in state["model"].values()]
    floats = [value for value in model if torch.is_floating_point(value) and value.numel()]
    return all(bool(torch.isfinite(value).all()) for value in floats)


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
