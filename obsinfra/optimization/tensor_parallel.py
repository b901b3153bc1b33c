"""Tensor parallelism: neighbouring ranks divide each layer that the model's plan names; also within FSDP2.

`wrapping` and the trainer divide models by it. Imported for that alone: it takes a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from obsinfra.errors import ConfigError
from obsinfra.optimization.fsdp import divide_over
from obsinfra.optimization.tensor_styles import Whole
from obsinfra.optimization.wrapping import broadcast

DIMENSION = "tensor"
"""Of the mesh: the ranks that divide a layer."""


def plan_of(model: nn.Module, size: int, option: str) -> dict[str, Any]:
    """Styles by names of modules, as the model's `tensor_parallel_plan(size)` gives them.

    Args:
        size: ranks that divide a layer.
        option: what asked for it, for the error.

    Raises:
        ConfigError: it has none, or none for so many ranks.
    """
    plan = getattr(model, "tensor_parallel_plan", None)
    if not callable(plan):
        raise ConfigError(
            f"{option} with {type(model).__name__}, which has no tensor_parallel_plan",
            "a model that says which of its layers can be divided, as that of byte_gpt",
            "give it a method tensor_parallel_plan(size) that returns styles of "
            "torch.distributed.tensor.parallel by names of modules, or divide it by fsdp",
        )
    styles: dict[str, Any] = plan(size)
    return styles


def divide_layers(model: nn.Module, size: int, groups: Mapping[str, int], option: str) -> DeviceMesh:
    """Divide what the plan names, in place; the rest each rank has whole. Rank 0's values are everyone's.

    Args:
        size: ranks that divide a layer.
        groups: how many of such groups, by dimension of the mesh.
        option: as `plan_of`.

    Returns:
        The mesh of the groups: the ranks that have the same part.

    Raises:
        ConfigError: as `plan_of`.
    """
    styles = plan_of(model, size, option)
    broadcast((*model.parameters(), *model.buffers()))
    device = next(model.parameters()).device
    names = (*groups, DIMENSION)
    mesh = init_device_mesh(device.type, (*groups.values(), size), mesh_dim_names=names)
    for name, module in model.named_modules():
        if name in styles or any(True for _ in module.parameters(recurse=False)):
            parallelize_module(module, mesh[DIMENSION], styles.get(name) or Whole())
    return mesh[tuple(groups)]


def divide_both(model: nn.Module, size: int, shards: int | None, option: str, *, offload: bool) -> None:
    """`divide_layers`, and what each rank has then by FSDP2, among the groups.

    Args:
        shards: so many groups have the whole together (HSDP); None: all.

    Raises:
        ConfigError: as `plan_of`, or a part that cannot be divided among the groups.
    """
    parts = dist.get_world_size() // size
    groups = {"data": parts}
    if shards is not None and shards < parts:
        groups = {"replicate": parts // shards, "shard": shards}
    divide_over(model, divide_layers(model, size, groups, option), offload=offload)


def check_several(groups: int, size: int, option: str, parallel: str) -> None:
    """Whether there is anything for FSDP2 to do.

    Raises:
        ConfigError: one group has all ranks.
    """
    if groups == 1:
        raise ConfigError(
            f"{option} {size} of {size} ranks with {parallel}",
            "several groups, among which FSDP divides the model",
            "make it smaller, or choose tp alone",
        )


def average_gradients(model: nn.Module, groups: DeviceMesh) -> None:
    """Have each gradient averaged over the groups as soon as backward has it, for loops that know nothing of
    groups. Of several passes that add up, the sum of means is the mean of sums."""
    peers, parts = groups.get_group(), groups.size()

    def average(parameter: Tensor) -> None:
        if parameter.grad is not None:
            average_over(own_part(parameter.grad), peers, parts)

    for parameter in model.parameters():
        if parts > 1 and parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]


def average_over(gradient: Tensor, peers: dist.ProcessGroup, parts: int) -> None:
    """The mean over the groups, in place; a collective of those that have the same part."""
    with torch.no_grad():
        dist.all_reduce(gradient, group=peers)
        gradient.div_(parts)


def own_part(value: Tensor) -> Tensor:
    """What of it this rank has; the same memory."""
    return value.to_local() if isinstance(value, DTensor) else value
