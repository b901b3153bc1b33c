"""How a model trains on the ranks of a run: wrapping it, dividing its data, agreeing on what was validated.

`Trainer` asks it and never the ranks themselves. `OneProcess` is the null object.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

import obsinfra
from obsinfra.config.settings import Settings
from obsinfra.errors import ConfigError, RanksDifferError
from obsinfra.observation.ranks import Ranks
from obsinfra.optimization.clipping import clip_gradients
from obsinfra.optimization.wrapping import device_of_rank, replicate
from obsinfra.training.own_time import OwnTime, timed_backward
from obsinfra.workloads.protocol import Batches, Workload

RANKS_OWN = frozenset({"inject", "metrics_host", "metrics_port", "device", "run", "resume", "threads"})
"""Settings that may differ between the ranks of a run."""

_NOTHING = nullcontext()


class Parallelism(Protocol):
    """What the trainer needs to know of the other ranks.

    Attributes:
        ranks: the processes themselves.
    """

    ranks: Ranks

    def device_name(self, settings: Settings) -> str:
        """The device setting for this rank."""
        ...

    def divide(self, batches: Batches, workload: str) -> Batches:
        """This rank's part of the data."""
        ...

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training; called once all that can fail on one rank alone is done."""
        ...

    def opened(self, batches: Sequence[Any]) -> tuple[list[Any], float]:
        """The batches of a step, and what their mean counts for in the mean over the ranks: 1 where all parts
        are equal."""
        ...

    def exchanging(self, model: nn.Module, *, now: bool) -> AbstractContextManager[None]:
        """Around a forward and backward pass; gradients are exchanged in the last one of a step alone."""
        ...

    def backward(self, loss: Tensor) -> float:
        """Run backward from `loss`; the seconds of it that waited for no other rank, less those that the
        forward pass before it waited."""
        ...

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        """Clip the gradients by their norm over all parameters; the norm before, the same everywhere."""
        ...

    def counted(self, samples: int) -> int:
        """Samples of a step's that this rank counts as its own, so that their sum over ranks is right."""
        ...

    @property
    def in_shards(self) -> bool:
        """Whether this rank has a part of the model only."""
        ...

    def agreed(self, values: Mapping[str, float]) -> dict[str, float]:
        """Validation metrics as rank 0 has them, so that all ranks decide alike."""
        ...


class OneProcess:
    """Nothing to wrap, divide or agree on."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def device_name(self, settings: Settings) -> str:
        return settings.device

    def divide(self, batches: Batches, workload: str) -> Batches:
        return batches

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def opened(self, batches: Sequence[Any]) -> tuple[list[Any], float]:
        return list(batches), 1.0

    def exchanging(self, model: nn.Module, *, now: bool) -> AbstractContextManager[None]:
        return _NOTHING

    def backward(self, loss: Tensor) -> float:
        return timed_backward(loss)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        return clip_gradients(parameters, limit)

    def counted(self, samples: int) -> int:
        return samples

    in_shards = False

    def agreed(self, values: Mapping[str, float]) -> dict[str, float]:
        return dict(values)


class DataParallel:
    """DistributedDataParallel over all ranks; every rank has the whole model and a part of each batch.

    Args:
        ranks: the group; torch's process group is there.
        compression: of gradients, see `Settings.gradient_compression`.

    Attributes:
        part, parts: which part of the data is this rank's, of how many.
    """

    def __init__(self, ranks: Ranks, compression: str = "off") -> None:
        self.ranks, self._compression = ranks, compression
        self.part, self.parts = ranks.rank, ranks.size
        self._own_time: OwnTime | None = None

    def device_name(self, settings: Settings) -> str:
        """`auto` and `cuda` mean the GPU of this rank's number on its host."""
        return device_of_rank(settings.device, disable_gpu=settings.disable_gpu)

    def divide(self, batches: Batches, workload: str) -> Batches:
        """Each global batch in contiguous parts as equal as can be.

        Raises:
            ConfigError: its data cannot be divided, or a batch has fewer samples than there are ranks.
        """
        divide = getattr(batches, "divide", None)
        if divide is None:
            raise ConfigError(
                f"the data of {workload} cannot be divided among {self.parts} ranks",
                "a workload whose batches have divide(rank, size), such as byte_gpt or digits",
                "train it in one process",
            )
        size = getattr(batches, "batch_size", self.parts)
        if size < self.parts:
            raise ConfigError(
                f"{self.parts} ranks for batches of {size} samples",
                "at least one sample for each rank",
                "choose a larger --batch-size, which counts the samples of all ranks, or fewer ranks",
            )
        divide(self.part, self.parts)
        return batches

    def wrap(self, model: nn.Module) -> nn.Module:
        """DDP; the gradients are averaged while backward still runs."""
        wrapped = replicate(model, self._compression)
        self._own_time = OwnTime(wrapped)
        return wrapped

    def opened(self, batches: Sequence[Any]) -> tuple[list[Any], float]:
        """Parts as they are; an empty one is left out unless there is nothing else."""
        rows, of = sum(part.rows for part in batches), sum(part.of for part in batches)
        used = [part.batch for part in batches if part.rows] or [batches[0].batch]
        return used, rows * self.parts / of

    def exchanging(self, model: nn.Module, *, now: bool) -> AbstractContextManager[None]:
        """DDP's `no_sync` but for the last."""
        if now:
            return nullcontext()
        assert isinstance(model, DistributedDataParallel)
        waiting: AbstractContextManager[None] = model.no_sync()
        return waiting

    def backward(self, loss: Tensor) -> float:
        """Up to where DDP waits for the exchange; all of it where nothing is exchanged in the passes."""
        return timed_backward(loss) if self._own_time is None else self._own_time.backward(loss)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        """Every rank has all gradients."""
        return clip_gradients(parameters, limit)

    def counted(self, samples: int) -> int:
        """All of its part."""
        return samples

    @property
    def in_shards(self) -> bool:
        """No."""
        return False

    def agreed(self, values: Mapping[str, float]) -> dict[str, float]:
        """One small broadcast per validation."""
        names = sorted(values)
        numbers = torch.tensor([values[name] for name in names], dtype=torch.float64)
        dist.broadcast(numbers, 0)
        return dict(zip(names, numbers.tolist(), strict=True))


def choose_parallelism(ranks: Ranks, settings: Settings) -> Parallelism:
    """How the ranks of a run train together.

    Args:
        settings: with `oom_recovery` on, a rank that runs out of memory in a step must not take the others
            with it; see also `Settings.parallel` and `Settings.gradient_compression`.

    Raises:
        ConfigError: what is asked for does not go together.
    """
    compression = settings.gradient_compression
    if settings.fsdp_offload == "on" and settings.parallel not in ("fsdp", "hsdp"):
        raise ConfigError(
            f"--fsdp-offload on with --parallel {settings.parallel}",
            "a model in parts, of which this is a way to keep them",
            "add --parallel fsdp, or drop --fsdp-offload",
        )
    if settings.checkpoint_form == "sharded":
        if settings.parallel not in ("fsdp", "hsdp", "tp"):
            raise ConfigError(
                f"--checkpoint-form sharded with --parallel {settings.parallel}",
                "fsdp, hsdp or tp, whose parts each rank can write",
                "add --parallel fsdp, or drop --checkpoint-form",
            )
        if settings.checkpoint_compression != "off":
            raise ConfigError(
                f"--checkpoint-form sharded with --checkpoint-compression {settings.checkpoint_compression}",
                "one or the other: parts are written as they are",
                "drop one of them",
            )
    if settings.shard_size is not None and settings.parallel != "hsdp":
        raise ConfigError(
            f"--shard-size {settings.shard_size} with --parallel {settings.parallel}",
            "--parallel hsdp, whose shards it sizes",
            "add --parallel hsdp, or drop --shard-size",
        )
    if settings.tensor_parallel_size is not None and settings.parallel not in ("tp", "fsdp", "hsdp"):
        raise ConfigError(
            f"--tensor-parallel-size {settings.tensor_parallel_size} with --parallel {settings.parallel}",
            "--parallel tp, whose groups it sizes, or fsdp or hsdp, with which it goes together",
            "add --parallel tp, fsdp or hsdp, or drop --tensor-parallel-size",
        )
    if ranks.alone:
        if settings.parallel in ("fsdp", "hsdp", "tp"):
            raise ConfigError(
                f"--parallel {settings.parallel} in one process",
                "several ranks to divide the model among",
                "start with --nproc-per-node 2 or more, or train with --parallel auto",
            )
        return OneProcess(ranks)
    if settings.parallel in ("fsdp", "hsdp") and settings.tensor_parallel_size is not None:
        from obsinfra.training.tensor_parallel import TensorAndFullySharded

        return TensorAndFullySharded(ranks, settings)
    if settings.parallel in ("fsdp", "hsdp"):
        from obsinfra.training.fully_sharded import FullySharded

        return FullySharded(ranks, settings)
    if settings.parallel == "tp":
        from obsinfra.training.tensor_parallel import TensorParallel

        return TensorParallel(ranks, settings)
    if settings.oom_recovery == "on":
        if compression != "off":
            raise ConfigError(
                f"--gradient-compression {compression} with --oom-recovery on",
                "one or the other: recovery exchanges gradients itself, after the passes",
                "drop one of them",
            )
        from obsinfra.training.late_exchange import LateDataParallel

        return LateDataParallel(ranks)
    return DataParallel(ranks, compression)


def check_alike(
    ranks: Ranks, settings: Settings, workload: Workload, model: nn.Module, hardware: dict[str, str]
) -> None:
    """Whether all ranks have the same code, data, settings, hardware and model. Each says what is different.

    Args:
        hardware: the device's kind and the precision in use, which `auto` chooses by what a host has.

    Raises:
        RanksDifferError: they have not, on every rank.
        PeerLostError: a rank failed before.
    """
    if ranks.alone:
        return
    mine = _fingerprint(settings, workload, model) | {"hardware": hardware}
    all_of_them = ranks.gather("fingerprint", mine)
    for name in mine:
        values = [json.dumps(one[name], sort_keys=True) for one in all_of_them]
        odd = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            raise RanksDifferError(
                f"rank {odd} has another {name} than rank 0: {_difference(all_of_them, name, odd)}",
                f"the same {name} on every rank",
                "train on hosts with devices of one kind, or say --device cpu or --precision on each"
                if name == "hardware"
                else "bring the same code, data and settings to every host",
            )


def _difference(found: list[Any], name: str, odd: int) -> str:
    first, other = found[0][name], found[odd][name]
    if isinstance(first, dict) and isinstance(other, dict):
        keys = [key for key in sorted({*first, *other}) if first.get(key) != other.get(key)]
        return "; ".join(f"{key} {other.get(key)!r}, not {first.get(key)!r}" for key in keys[:3])[:600]
    return f"{other!r}, not {first!r}"[:600]


def _fingerprint(settings: Settings, workload: Workload, model: nn.Module) -> dict[str, Any]:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    shapes = [
        (name, list(value.shape), str(value.dtype), name in trained)
        if isinstance(value, torch.Tensor) and not is_lazy(value)  # of which wrapping says that it has none
        else (name, type(value).__name__)
        for name, value in model.state_dict().items()
    ]
    own = settings.model_dump(mode="json", exclude=set(RANKS_OWN))
    return {
        "version": {"torch": torch.__version__, "python": list(sys.version_info[:2])},
        "code": {"obsinfra": _sources(Path(obsinfra.__file__).parent), "workload": _source(workload)},
        "settings": own,
        "data": json.loads(json.dumps(workload.describe_data(), default=str)),
        "model": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
    }


def _sources(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _source(workload: Workload) -> str:
    file = inspect.getsourcefile(type(workload))
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else "unknown"
