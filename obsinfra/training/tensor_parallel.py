"""Tensor parallelism: each rank of a group computes a part of every layer that the model's plan names, on the
same batch; several groups divide the data. `choose_parallelism` makes one where `--parallel tp` asks for it,
or `--parallel fsdp` or `hsdp` with `--tensor-parallel-size` for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.utils import clip_grad_norm_

from obsinfra.config.settings import Settings
from obsinfra.errors import ConfigError
from obsinfra.observation.ranks import Ranks
from obsinfra.optimization.fsdp import divide_over, saved_buffers
from obsinfra.optimization.tensor_styles import Whole
from obsinfra.optimization.wrapping import broadcast, group_size
from obsinfra.training.fully_sharded import FullySharded, refuse_what_needs_whole_models
from obsinfra.training.parallelism import DataParallel
from obsinfra.workloads.protocol import Batches


class TensorParallel(DataParallel):
    """Neighbouring ranks are a group; gradients are averaged over the groups once a step's passes are done.

    Args:
        ranks: all of them; torch's process group is there.
        settings: checked for what does not work with it.

    Raises:
        ConfigError: a setting that does not work with it, or groups that do not fit the ranks.
    """

    def __init__(self, ranks: Ranks, settings: Settings) -> None:
        refuse_what_needs_whole_models(settings)
        super().__init__(ranks)
        self._option = "--parallel tp" if settings.parallel == "tp" else "--tensor-parallel-size"
        self._group = group_size(ranks.size, settings.tensor_parallel_size, "--tensor-parallel-size")
        self.part, self.parts = ranks.rank // self._group, ranks.size // self._group
        # Within a group all compute on the same activations, so they must drop the same ones, too.
        ranks.draws_as = self.part
        self._peers: dist.ProcessGroup | None = None
        self._parameters: list[nn.Parameter] = []
        self._buffers: list[Tensor] = []

    def divide(self, batches: Batches, workload: str) -> Batches:
        """As under DDP, among groups."""
        return batches if self.parts == 1 else super().divide(batches, workload)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself, its layers divided by its plan, with rank 0's values.

        Raises:
            ConfigError: it has no plan, or none for groups of this size.
        """
        self._peers = self.divide_layers(model, {"data": self.parts}).get_group()
        self._parameters = list(model.parameters())
        return model

    def divide_layers(self, model: nn.Module, groups: Mapping[str, int]) -> DeviceMesh:
        """Divide what the plan names, in place; the mesh of the groups.

        Args:
            groups: its dimensions, by name; their product is the number of groups.

        Raises:
            ConfigError: as `wrap`.
        """
        plan = getattr(model, "tensor_parallel_plan", None)
        if plan is None:
            raise ConfigError(
                f"{self._option} with {type(model).__name__}, which has no tensor_parallel_plan",
                "a model that says which of its layers can be divided, as that of byte_gpt",
                "train with --parallel fsdp or ddp alone",
            )
        styles = plan(self._group)
        self._buffers = saved_buffers(model)
        broadcast((*model.parameters(), *model.buffers()))
        device = next(model.parameters()).device
        names = (*groups, "tensor")
        mesh = init_device_mesh(device.type, (*groups.values(), self._group), mesh_dim_names=names)
        for name, module in model.named_modules():
            if name in styles or any(True for _ in module.parameters(recurse=False)):
                parallelize_module(module, mesh["tensor"], styles.get(name) or Whole())
        return mesh[tuple(groups)]

    def opened(self, batches: Sequence[Any]) -> tuple[list[Any], float]:
        """As under DDP, among groups."""
        return (list(batches), 1.0) if self.parts == 1 else super().opened(batches)

    def counted(self, samples: int) -> int:
        """This rank's share of the samples its group has computed together."""
        place = self.ranks.rank % self._group
        return (place + 1) * samples // self._group - place * samples // self._group

    @contextmanager
    def exchanging(self, model: nn.Module, *, now: bool) -> Iterator[None]:
        """Within a group, passes exchange what they need; gradients are averaged after the last."""
        yield
        if not now or self.parts == 1:
            return
        with torch.no_grad():
            for parameter in self._parameters:
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    gradient = _own(parameter.grad)
                    dist.all_reduce(gradient, group=self._peers)
                    gradient.div_(self.parts)
            broadcast(self._buffers)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        """Over the gradients of the whole group: one small collective."""
        norm = clip_grad_norm_(parameters, limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @property
    def in_shards(self) -> bool:
        """Yes."""
        return True


class TensorAndFullySharded(FullySharded):
    """Both: neighbouring ranks are a group that divides the layers, and the groups divide what each of their
    ranks has by FSDP2 (a mesh of two dimensions), or each `--shard-size` of the groups do (HSDP, of three).
    Data is divided among groups.

    Args:
        ranks: all of them; torch's process group is there.
        settings: checked for what does not work with it.

    Raises:
        ConfigError: a setting that does not work with it, or groups that do not fit the ranks.
    """

    def __init__(self, ranks: Ranks, settings: Settings) -> None:
        self._layers = TensorParallel(ranks, settings)
        groups = self._layers.parts
        if groups == 1:
            all_of_them = f"--tensor-parallel-size {ranks.size} of {ranks.size} ranks"
            raise ConfigError(
                f"{all_of_them} with --parallel {settings.parallel}",
                "several groups, among which FSDP divides the model",
                "make it smaller, or train with --parallel tp",
            )
        super().__init__(ranks, settings, together=ranks.size // groups)
        self.part, self.parts, self._who = self._layers.part, groups, "groups"

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself, its layers divided by its plan and the parts by FSDP2, with rank 0's values.

        Raises:
            ConfigError: as `TensorParallel.wrap`, or a part that cannot be divided among the groups.
        """
        self._buffers = saved_buffers(model)
        groups = {"data": self.parts}
        if self._how == "hsdp" and self._shard_size < self.parts:
            groups = {"replicate": self.parts // self._shard_size, "shard": self._shard_size}
        divide_over(model, self._layers.divide_layers(model, groups), offload=self._offload)
        return model

    def counted(self, samples: int) -> int:
        """As under tensor parallelism."""
        return self._layers.counted(samples)


def _own(value: Tensor) -> Tensor:
    """What of it this rank has; the same memory."""
    return value.to_local() if isinstance(value, DTensor) else value
