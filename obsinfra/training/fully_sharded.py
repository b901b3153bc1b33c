"""Training a model that is divided by FSDP2 (`optimization.fsdp`). `choose_parallelism` makes one where
`--parallel fsdp` or `hsdp` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from obsinfra.config.settings import Settings
from obsinfra.errors import ConfigError, DataError
from obsinfra.observation.ranks import Ranks
from obsinfra.optimization import fsdp
from obsinfra.optimization.wrapping import broadcast, group_size
from obsinfra.training.parallelism import DataParallel
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
        together: neighbouring ranks that count as one here, since they compute the same batch.

    Raises:
        ConfigError: a setting that does not work with it, or shards that do not fit the ranks.
    """

    def __init__(self, ranks: Ranks, settings: Settings, *, together: int = 1) -> None:
        refuse_what_needs_whole_models(settings)
        super().__init__(ranks)
        self._how, self._who = settings.parallel, "ranks"
        self._shard_size = ranks.size
        if settings.parallel == "hsdp":
            self._shard_size = group_size(ranks.size, settings.shard_size, "--shard-size", together=together)
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
            if 0 < last < self.parts:
                raise ConfigError(
                    f"the last batch of {workload} has {last} samples for {self.parts} {self._who}",
                    f"a sample for each in every pass with --accumulate and --parallel {self._how}",
                    "choose another --batch-size",
                )
        return divided

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself, in parts, with rank 0's values."""
        self._buffers = fsdp.divide(model, self._shard_size, offload=self._offload)
        return model

    def opened(self, batches: Sequence[Any]) -> tuple[list[Any], float]:
        """All parts, also an empty one, whose pass weighs nothing: it is a collective all the same.

        Raises:
            DataError: a batch of several that has fewer samples than there are ranks.
        """
        if len(batches) > 1 and (fewest := min(part.of for part in batches)) < self.parts:
            raise DataError(
                f"a batch of {fewest} samples for {self.parts} {self._who}",
                f"a sample for each in every pass with --accumulate and --parallel {self._how}",
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
            broadcast(self._buffers)  # batch norm's statistics are rank 0's, as DDP has them

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
