"""Tensor parallelism: each rank of a group computes a part of every layer that the model's plan names, on the
same batch; several groups divide the data. `choose_parallelism` makes one where `--parallel tp` asks for it,
or `--parallel fsdp` or `hsdp` with `--tensor-parallel-size` for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from obsinfra.config.settings import Settings
from obsinfra.observation.ranks import Ranks
from obsinfra.optimization import tensor_parallel
from obsinfra.optimization.fsdp import saved_buffers
from obsinfra.optimization.wrapping import broadcast, group_size
from obsinfra.training.fully_sharded import FullySharded, refuse_what_needs_whole_models
from obsinfra.training.parallelism import DataParallel
from obsinfra.workloads.protocol import Batches


class TensorParallel(DataParallel):
    """Neighbouring ranks are a group; gradients are averaged over the groups once a step's passes are done.

    Args:
        ranks: all of them; torch's process group is there.
        settings: checked for what does not work with it.

    Attributes:
        size: ranks of a group.
        option: what asked for it, for errors.

    Raises:
        ConfigError: a setting that does not work with it, or groups that do not fit the ranks.
    """

    def __init__(self, ranks: Ranks, settings: Settings) -> None:
        refuse_what_needs_whole_models(settings)
        super().__init__(ranks)
        self.option = "--parallel tp" if settings.parallel == "tp" else "--tensor-parallel-size"
        self.size = group_size(ranks.size, settings.tensor_parallel_size, "--tensor-parallel-size")
        self.part, self.parts = ranks.rank // self.size, ranks.size // self.size
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
        self._buffers = saved_buffers(model)
        mesh = tensor_parallel.divide_layers(model, self.size, {"data": self.parts}, self.option)
        self._peers = mesh.get_group()
        self._parameters = list(model.parameters())
        return model

    def opened(self, batches: Sequence[Any]) -> tuple[list[Any], float]:
        """As under DDP, among groups."""
        return (list(batches), 1.0) if self.parts == 1 else super().opened(batches)

    def counted(self, samples: int) -> int:
        """This rank's share of the samples its group has computed together."""
        place = self.ranks.rank % self.size
        return (place + 1) * samples // self.size - place * samples // self.size

    @contextmanager
    def exchanging(self, model: nn.Module, *, now: bool) -> Iterator[None]:
        """Within a group, passes exchange what they need; gradients are averaged after the last."""
        yield
        if not now or self.parts == 1:
            return
        assert self._peers is not None
        for parameter in self._parameters:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                own = tensor_parallel.own_part(parameter.grad)
                tensor_parallel.average_over(own, self._peers, self.parts)
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
        parallel = f"--parallel {settings.parallel}"
        tensor_parallel.check_several(groups, ranks.size, "--tensor-parallel-size", parallel)
        super().__init__(ranks, settings, together=ranks.size // groups)
        self.part, self.parts, self._who = self._layers.part, groups, "groups"

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself, its layers divided by its plan and the parts by FSDP2, with rank 0's values.

        Raises:
            ConfigError: as `TensorParallel.wrap`, or a part that cannot be divided among the groups.
        """
        self._buffers = saved_buffers(model)
        layers = self._layers
        shards = self._shard_size if self._how == "hsdp" else None
        tensor_parallel.divide_both(model, layers.size, shards, layers.option, offload=self._offload)
        return model

    def counted(self, samples: int) -> int:
        """As under tensor parallelism."""
        return self._layers.counted(samples)
