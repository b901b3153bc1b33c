"""Data parallelism whose gradients are exchanged once all passes of a step are done, with who has failed.

DDP exchanges while backward still runs, which a rank that runs out of memory cannot take back; here it can.
`choose_parallelism` makes one where recovery on several ranks is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from obsinfra.observation.ranks import Ranks
from obsinfra.optimization.wrapping import broadcast
from obsinfra.training.parallelism import DataParallel

BUCKET_BYTES = 25 * 2**20
"""Exchanged at once, as DDP has it."""


class LateDataParallel(DataParallel):
    """Every rank has the whole model; nothing is exchanged before every rank's passes have ended.

    It is the `Agreement` of the ranks about failures: the first bucket of gradients carries them, so a step
    takes no further collective. What it costs is the overlap of exchange and backward, and on a device one
    wait per step.

    Args:
        ranks: the group; torch's process group is there.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks)
        self._parameters: list[Tensor] = []
        self._buffers: list[Tensor] = []

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself, with rank 0's values on every rank."""
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._buffers = list(model.buffers())
        broadcast((*model.parameters(), *self._buffers))
        return model

    def exchanging(self, model: nn.Module, *, now: bool) -> AbstractContextManager[None]:
        """Nothing: see `passed`."""
        return nullcontext()

    def agree(self, mine: bool) -> bool:
        """Whether any rank says yes; one small collective."""
        return self.largest(int(mine)) > 0

    def largest(self, number: int) -> int:
        """The largest number any rank has; one small collective."""
        found = torch.tensor([number], device=self._parameters[0].device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found.item())

    def passed(self, failed: bool) -> bool:
        """Exchange the gradients, unless any rank's passes have failed. Returns whether one's have."""
        present = [p.grad is not None for p in self._parameters]
        for number, bucket in enumerate(_buckets(self._parameters)):
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
            parts = [gradient.reshape(-1) for gradient in gradients]
            if number == 0:
                parts.append(torch.tensor([failed, *present], dtype=parts[0].dtype, device=parts[0].device))
            flat = torch.cat(parts)
            dist.all_reduce(flat)
            if number == 0:
                flags = flat[-1 - len(present) :].tolist()
                if flags[0] > 0:
                    return True
                present = [flag > 0 for flag in flags[1:]]
                flat = flat[: -1 - len(present)]
            self._put_back(bucket, gradients, flat.div_(self.ranks.size), present)
        broadcast(self._buffers)  # batch norm's statistics are rank 0's, as DDP has them
        return False

    def _put_back(
        self, bucket: list[Tensor], gradients: list[Tensor], flat: Tensor, present: list[bool]
    ) -> None:
        places = {id(parameter): place for place, parameter in enumerate(self._parameters)}
        first = 0
        for parameter, gradient in zip(bucket, gradients, strict=True):
            if present[places[id(parameter)]]:  # one that no rank has used keeps having none
                gradient.copy_(flat[first : first + gradient.numel()].view_as(gradient))
                parameter.grad = gradient
            first += gradient.numel()


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type and device, up to `BUCKET_BYTES`; the same on every rank."""
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        weight = parameter.numel() * parameter.element_size()
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (parameter.dtype, parameter.device)
        if bucket and (not alike or size + weight > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += weight
    if bucket:
        yield bucket
