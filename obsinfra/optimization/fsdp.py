"""FSDP2: each rank keeps a part of the parameters, gradients and optimizer state, and computes with the whole
of one block at a time.

`wrapping` and the trainer divide models by it. Imported for that alone: it takes a second.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from obsinfra.errors import ConfigError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.optimization.wrapping import broadcast, check_wrappable


def divide(model: nn.Module, shard_size: int, *, offload: bool = False) -> list[Tensor]:
    """Divide a model in place, by `fully_shard` on each of `blocks_of` and on the model for the rest; a
    collective of all ranks. Rank 0's values are everyone's.

    Args:
        model: on this rank's device.
        shard_size: neighbouring ranks that have the whole together; with fewer than all, every group of them
            has it (HSDP).
        offload: keep the parts in host memory between their uses.

    Returns:
        The buffers that are part of the model's state, which stay whole and are not kept alike.

    Raises:
        ConfigError, RanksDifferError: as `Wrapping.wrap`.
    """
    check_wrappable(model, "FSDP2", problem_of)
    buffers = saved_buffers(model)
    broadcast((*model.parameters(), *model.buffers()))
    divide_over(model, _mesh(next(model.parameters()).device, shard_size), offload=offload)
    return buffers


def divide_over(model: nn.Module, mesh: DeviceMesh, *, offload: bool = False) -> None:
    """`divide` over the ranks of a mesh, all of which have the same values.

    Args:
        model: its layers may be divided already, by tensor parallelism over another dimension of the mesh:
            then each part is divided again, along another dimension of the tensor.
        mesh: of one dimension, or of two: groups that have the whole each, and the ranks of a group (HSDP).

    Raises:
        ConfigError: such a part cannot be divided evenly.
    """
    policy = _policy(torch.device(mesh.device_type), offload)
    shards = mesh.size(mesh.ndim - 1)
    for parameter in model.parameters():
        _second_dimension(parameter, shards)  # before the first is divided

    def place(parameter: nn.Parameter) -> Shard | None:
        return _second_dimension(parameter, shards)

    for module in (*blocks_of(model), model):
        fully_shard(module, mesh=mesh, offload_policy=policy, shard_placement_fn=place)


def _second_dimension(parameter: nn.Parameter, shards: int) -> Shard | None:
    """Where FSDP2 divides a parameter: None for its rows; where ranks of a layer have rows, the columns."""
    if not isinstance(parameter, DTensor) or parameter.dim() < 2:
        return None
    if all(getattr(placement, "dim", None) != 0 for placement in parameter.placements):
        return None
    if parameter.shape[1] % shards:
        raise ConfigError(
            f"a weight of shape {tuple(parameter.shape)}, whose rows are divided among the ranks of a layer, "
            f"cannot be divided among {shards} groups",
            "columns that divide",
            "choose another number of ranks, or --parallel tp without FSDP",
        )
    return Shard(1)


def keep_alike(model: nn.Module, buffers: list[Tensor]) -> None:
    """Before every forward pass buffers, such as batch norm's statistics, become rank 0's, as under DDP."""

    def exchange(module: nn.Module, inputs: Any) -> None:
        broadcast(buffers)

    if buffers:
        model.register_forward_pre_hook(exchange, prepend=True)


def saved_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers that are part of its state."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    kept = model.state_dict().keys() - names
    return [buffer for name, buffer in model.named_buffers() if name in kept]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: the entries of the outermost lists of modules, else the children; those
    with parameters, none of which is used outside of them. The rest goes with the model itself."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(one) for outer in lists for one in outer.modules() if one is not outer}
    found = [entry for one in lists if id(one) not in inner for entry in one] or list(model.children())
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    blocks = []
    for block in found:
        own: dict[int, int] = {}
        for _, parameter in block.named_parameters(remove_duplicate=False):
            own[id(parameter)] = own.get(id(parameter), 0) + 1
        if own and all(uses[key] == count for key, count in own.items()) and _called(block):
            blocks.append(block)
    return blocks


def _called(module: nn.Module) -> bool:
    """Whether it has a forward of its own, which is where its parameters are gathered."""
    return type(module).forward is not nn.Module.forward


def problem_of(model: nn.Module) -> str | None:
    """What speaks against dividing it, if anything."""
    if isinstance(model, torch.jit.ScriptModule):
        return "it is a ScriptModule, whose class cannot be extended"
    if not _called(model):
        return "it has no forward of its own, which is where its parameters are gathered"
    return None


def _mesh(device: torch.device, shard_size: int) -> DeviceMesh:
    """The ranks in one row, or in rows that have the whole model each."""
    rows = dist.get_world_size() // shard_size
    if rows == 1:
        return init_device_mesh(device.type, (shard_size,))
    return init_device_mesh(device.type, (rows, shard_size), mesh_dim_names=("replicate", "shard"))


def _policy(device: torch.device, offload: bool) -> OffloadPolicy:
    """Where the parts are between their uses."""
    if not offload:
        return OffloadPolicy()
    if device.type == "cpu":
        get_logger("training").info("fsdp_offload_changes_nothing", why="on the CPU they are in host memory")
    # Pinned, copies need not be waited for; without a device there is nothing to pin for.
    return CPUOffloadPolicy(pin_memory=device.type != "cpu")
