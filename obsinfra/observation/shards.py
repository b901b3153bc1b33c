"""State that is spread over the ranks, as by FSDP2: gathered for a checkpoint, put back from one.

`LoopState` calls it. What is gathered is what one process would have: same names, same optimizer state, so
that a checkpoint does not say how it was trained. Imported for such states alone: it takes a second or two.
Gathering is a collective; putting back is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

TOGETHER = ("tensor", "tp")
"""Names of the mesh's dimension along which ranks compute the same batch."""


def ranks_together(model: nn.Module) -> int:
    """How many neighbouring ranks divide its layers (tensor parallelism), and so must draw alike; 1: none."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            if (mesh.mesh_dim_names or ("",))[-1] in TOGETHER:  # the last are neighbours
                return mesh.size(mesh.ndim - 1)
    return 1


def gathered_model(model: nn.Module, *, keep: bool) -> dict[str, Any]:
    """Its state_dict with whole tensors, in host memory; a collective.

    Args:
        keep: False on ranks that only lend their parts: None stands for the tensors there.
    """
    # By parameter: tied weights are one tensor here too. By object, since the parts of a rank may be empty
    # and so at no address.
    owners = dict(model.named_parameters(remove_duplicate=False))
    state = model.state_dict()
    whole: dict[int, Any] = {}
    for name, value in state.items():
        owner = id(owners.get(name, value))
        if owner not in whole:
            whole[owner] = gathered(value, keep=keep)
    return {name: whole[id(owners.get(name, value))] for name, value in state.items()}


def gathered(value: Any, *, keep: bool) -> Any:
    """Any nested state, as `gathered_model`; what is not in shards is as it was."""
    if isinstance(value, DTensor):
        tensor = value.full_tensor()
        return tensor.cpu() if keep else None  # one after another: never all of it on a device
    if isinstance(value, Mapping):
        # All ranks must come to the same tensor at the same time, in whatever order they met them.
        parts = {key: gathered(value[key], keep=keep) for key in sorted(value, key=repr)}
        return {key: parts[key] for key in value}
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)([gathered(item, keep=keep) for item in value])
    return value


def scattered_model(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """This rank's parts of a whole state_dict; what does not fit stays whole, for the error about it."""
    own = model.state_dict()
    return {name: _part(value, own.get(name)) for name, value in state.items()}


def scattered_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """This rank's parts of a whole optimizer state: moments are divided as their parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    like = dict(enumerate(parameters))
    divided = {
        number: {name: _part(value, like.get(number)) for name, value in moments.items()}
        for number, moments in state["state"].items()
    }
    return {**state, "state": divided}


def _part(value: Any, like: Any) -> Any:
    fits = isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape
    if not fits or isinstance(value, DTensor):
        return value
    # Every rank has read all of it: it takes its part and asks nobody. A part is on the mesh's device at
    # first; parameters that are kept in host memory are not.
    part = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return part.to(like.device)
