"""FSDP2: each rank keeps a part of the parameters, gradients and optimizer state, and computes with the whole
of one block at a time. `choose_parallelism` makes one where `--parallel fsdp` or `hsdp` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from obsinfra.config.settings import Settings
from obsinfra.errors import ConfigError, DataError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.observation.ranks import Ranks
from obsinfra.training.parallelism import DataParallel, group_size
from obsinfra.workloads.protocol import Batches

REFUSED = {
    "oom_recovery": (("on",), "a pass is a collective here, which one rank cannot repeat alone"),
    "gradient_compression": (("bf16", "fp16", "powersgd"), "its hooks are DDP's"),
    "compile": (("on",), "the whole model is compiled as one graph before it is divided"),
    "micro_batch": (None, "ranks with more rows would make more passes than others; use --accumulate"),
}
"""Settings that do not work with it: the values (None: any), and why."""


class FullySharded(DataParallel):
    """`fully_shard` on each block and on the model; data is divided as under DDP.

    Under `hsdp`, neighbouring ranks have the whole together, and each of them averages its gradients with
    those that have the same part in the other groups.

    Every pass is a collective of all ranks, so all make the same number of them.

    Args:
        ranks: the group; torch's process group is there.
        settings: checked for what does not work with it.

    Raises:
        ConfigError: a setting that does not work with it, or shards that do not fit the ranks.
    """

    def __init__(self, ranks: Ranks, settings: Settings) -> None:
        refuse_what_needs_whole_models(settings)
        super().__init__(ranks)
        self._how = settings.parallel
        self._shard_size = ranks.size
        if settings.parallel == "hsdp":
            self._shard_size = group_size(ranks, settings.shard_size, "--shard-size")
        self._accumulate = settings.accumulate
        self._offload = settings.fsdp_offload == "on"
        self._buffers: list[Tensor] = []

    def divide(self, batches: Batches, workload: str) -> Batches:
        """As under DDP.

        Raises:
            ConfigError: as under DDP, and where a rank would have nothing to do in one of several passes.
        """
        size = getattr(batches, "batch_size", None)
        samples = getattr(batches, "epoch_samples", None)
        divided = super().divide(batches, workload)
        if self._accumulate > 1 and size and samples:
            last = samples - (len(batches) - 1) * size
            if 0 < last < self.ranks.size:
                raise ConfigError(
                    f"the last batch of {workload} has {last} samples for {self.ranks.size} ranks",
                    f"a sample for each rank in every pass with --accumulate and --parallel {self._how}",
                    "choose another --batch-size",
                )
        return divided

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself, in parts, with rank 0's values."""
        self._buffers = saved_buffers(model)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, 0)
        device = next(model.parameters()).device
        mesh, policy = self._mesh(device), self._policy(device)
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, offload_policy=policy)
        fully_shard(model, mesh=mesh, offload_policy=policy)
        return model

    def _mesh(self, device: torch.device) -> DeviceMesh:
        """The ranks in one row, or in rows that have the whole model each."""
        rows = self.ranks.size // self._shard_size
        if rows == 1:
            return init_device_mesh(device.type, (self.ranks.size,))
        return init_device_mesh(device.type, (rows, self._shard_size), mesh_dim_names=("replicate", "shard"))

    def _policy(self, device: torch.device) -> OffloadPolicy:
        """Where the parts are between their uses."""
        if not self._offload:
            return OffloadPolicy()
        if device.type == "cpu":
            get_logger("training").info(
                "fsdp_offload_changes_nothing", why="on the CPU they are in host memory"
            )
        # Pinned, copies need not be waited for; without a device there is nothing to pin for.
        return CPUOffloadPolicy(pin_memory=device.type != "cpu")

    def opened(self, batches: Sequence[Any]) -> tuple[list[Any], float]:
        """All parts, also an empty one, whose pass weighs nothing: it is a collective all the same.

        Raises:
            DataError: a batch of several that has fewer samples than there are ranks.
        """
        if len(batches) > 1 and (fewest := min(part.of for part in batches)) < self.ranks.size:
            raise DataError(
                f"a batch of {fewest} samples for {self.ranks.size} ranks",
                f"a sample for each rank in every pass with --accumulate and --parallel {self._how}",
                "choose another --batch-size",
            )
        return super().opened(batches)

    @contextmanager
    def exchanging(self, model: nn.Module, *, now: bool) -> Iterator[None]:
        """Gradients stay whole on each rank until the last pass, which sums and divides them."""
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(now)
        yield
        if now:
            with torch.no_grad():
                for buffer in self._buffers:  # batch norm's statistics are rank 0's, as DDP has them
                    dist.broadcast(buffer, 0)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        """Over the gradients of all ranks: one small collective."""
        norm = clip_grad_norm_(parameters, limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @property
    def in_shards(self) -> bool:
        """Yes."""
        return True


def refuse_what_needs_whole_models(settings: Settings) -> None:
    """Whether all settings work where ranks have parts of the model.

    Raises:
        ConfigError: one does not.
    """
    for name, (values, why) in REFUSED.items():
        value = getattr(settings, name)
        if value in values if values is not None else value is not None:
            option = f"--{name.replace('_', '-')} {value}"
            raise ConfigError(
                f"{option} with --parallel {settings.parallel}",
                f"one or the other: {why}",
                "drop one of them",
            )


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
