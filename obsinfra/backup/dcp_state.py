"""A nested training state whose tensors lie in parts on ranks: one part of it, and all read back.

The keeper saves by it, `read_state` reads. Each rank's writer commits its part (`parts`); what is not in
parts is rank 0's: a JSON document and its tensors. Knows no trainers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor

from obsinfra.backup.dcp_values import value_text
from obsinfra.backup.state_tree import decode, encode
from obsinfra.backup.tensors import dtype_name
from obsinfra.errors import CheckpointError

MARK = "$part"
DOCUMENT = "state document"
TENSOR = "state tensor"


def part_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """This rank's part of `state` for a snapshot, as `parts` takes it; its tensors are the live ones. What
    several ranks have (HSDP, what tensor parallelism leaves whole) is in the part of the first. Not a
    collective.
    """
    items, values, shards = {}, {}, {}
    runs_of = cache(_runs)  # most tensors are divided alike
    for name, value in flat_state(state).items():
        if not isinstance(value, torch.Tensor):
            values[name] = value_text(name, value).decode("ascii")
            continue
        items[name] = {
            "dtype": dtype_name(value.dtype),
            "size": list(value.shape),
            "requires_grad": value.requires_grad,
        }
        if not isinstance(value, DTensor):
            shards[name] = [{"offsets": [0] * value.dim(), "tensor": value}]
        elif _is_first(value):
            shards[name] = _pieces(value, runs_of)
    return {"items": items if dist.get_rank() == 0 else {}, "values": values, "shards": shards}


def _is_first(value: DTensor) -> bool:
    """Whether this rank is the first of those that have the same part: along each dimension of the mesh that
    does not divide it, and, of the meshes of several groups of ranks, in the one of rank 0."""
    mesh = value.device_mesh
    place = mesh.get_coordinate() or ()
    again = any(at for at, placement in zip(place, value.placements, strict=True) if placement.is_replicate())
    return not again and bool((mesh.mesh == 0).any())


def _pieces(value: DTensor, runs_of: Callable[..., list[tuple[int, int]]]) -> list[dict[str, Any]]:
    """What this rank has of a tensor, as boxes: one, unless a part of it is of several stretches (the query,
    key and value of one head); none of one that has too few rows for all ranks."""
    own = value.to_local()
    if own.numel() == 0 and value.numel() > 0:
        return []
    per_dimension = []
    for dim, size in enumerate(value.shape):
        placements = tuple(
            _of_one_dimension(placement) if getattr(placement, "dim", None) == dim else Replicate()
            for placement in value.placements
        )
        per_dimension.append(runs_of(size, value.device_mesh, placements))
    pieces = []
    for box in itertools.product(*(_with_places(runs) for runs in per_dimension)):
        piece = own
        for dim, (_, length, place) in enumerate(box):
            piece = piece.narrow(dim, place, length)
        pieces.append({"offsets": [offset for offset, _, _ in box], "tensor": piece})
    return pieces


def _of_one_dimension(placement: Any) -> Placement:
    """The same division, of a tensor that has this dimension alone."""
    factor = getattr(placement, "split_factor", None)
    kind: Any = type(placement)
    alike: Placement = kind(0) if factor is None else kind(0, split_factor=factor)
    return alike


def _runs(size: int, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> list[tuple[int, int]]:
    """Which of `size` rows this rank has: first and number of each stretch. Torch divides the numbers
    themselves, as it does the rows; nobody is asked."""
    if all(placement.is_replicate() for placement in placements) or size == 0:
        return [(0, size)]
    numbers = torch.arange(size, device=mesh.device_type)
    own = distribute_tensor(numbers, mesh, placements, src_data_rank=None).to_local().cpu()
    breaks = ((own.diff() != 1).nonzero().flatten() + 1).tolist()
    return [
        (int(own[first]), end - first)
        for first, end in itertools.pairwise([0, *breaks, own.numel()])
        if end > first
    ]


def _with_places(runs: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """With each stretch, where in this rank's rows it begins."""
    lengths = itertools.accumulate((length for _, length in runs), initial=0)
    return [(offset, length, place) for (offset, length), place in zip(runs, lengths, strict=False)]


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
