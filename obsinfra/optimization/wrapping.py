"""A model on several ranks: whole on each (DDP), or divided among them (`fsdp`, `tensor_parallel`).

`GpuOptimizer` wraps by it for any loop, the trainer's parallelism for itself. Knows torch's process group, no
trainer and no run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from obsinfra.errors import ConfigError, RanksDifferError
from obsinfra.optimization.precision import kind_of

Parallel = Literal["off", "ddp", "fsdp", "hsdp", "tp"]
Compression = Literal["off", "bf16", "fp16", "powersgd"]

TRAVELS_AS = {"bf16": torch.bfloat16, "fp16": torch.float16, "powersgd": torch.float32}
"""What is summed on the way, by compression."""

POWERSGD_RANK = 4
POWERSGD_WHOLE_STEPS = 10


@dataclass(frozen=True, slots=True)
class Wrapping:
    """How ranks share a model.

    Attributes:
        parallel: `ddp`: whole on each rank; `fsdp`: a part on each; `hsdp`: whole once per `shard_size`
            neighbouring ranks; `tp`: a part of each layer on `tensor_parallel_size` neighbouring ones; `off`.
        shard_size: of hsdp; None: the ranks of a host.
        tensor_parallel_size: of tp, None: the ranks of a host; of fsdp and hsdp, which then divide what each
            rank of such a group has, None: no layer is divided. Groups count as ranks do otherwise.
        offload: of fsdp and hsdp: parts are kept in host memory between their uses.
        compression: of the gradients' exchange, by ddp.

    Raises:
        ConfigError: they do not go together.
    """

    parallel: Parallel = "off"
    shard_size: int | None = None
    tensor_parallel_size: int | None = None
    offload: bool = False
    compression: Compression = "off"

    def __post_init__(self) -> None:
        for name, value, needs in (
            ("shard_size", self.shard_size, ("hsdp",)),
            ("tensor_parallel_size", self.tensor_parallel_size, ("tp", "fsdp", "hsdp")),
            ("fsdp_offload", self.offload or None, ("fsdp", "hsdp")),
            ("gradient_compression", None if self.compression == "off" else self.compression, ("ddp",)),
        ):
            if value is not None and self.parallel not in needs:
                raise ConfigError(
                    f"{name} {value!r} with parallel {self.parallel!r}",
                    f"parallel {' or '.join(map(repr, needs))}",
                    f"set parallel, or drop {name}",
                )

    @property
    def in_parts(self) -> bool:
        """Whether a rank has a part of the model only."""
        return self.parallel in ("fsdp", "hsdp", "tp")

    @property
    def on(self) -> bool:
        """Whether ranks share the model at all."""
        return self.parallel != "off"

    @property
    def told(self) -> str:
        """In words, for the log."""
        offloaded = ", parts in host memory" if self.offload else ""
        size = self.tensor_parallel_size
        layers = f", layers divided among {size}" if size is not None else ""
        return f"{self.parallel}{layers}{offloaded}" + (
            "" if self.compression == "off" else f", gradients by {self.compression}"
        )

    def check_group(self) -> None:
        """Whether there is a process group, if one is needed.

        Raises:
            ConfigError: there is none.
        """
        if self.on and not (dist.is_available() and dist.is_initialized()):
            raise ConfigError(
                f"parallel {self.parallel!r} without a process group",
                "torch.distributed.init_process_group called before optimize_model",
                "start the program with torchrun, or drop parallel",
            )

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as every rank calls it; a collective of all ranks.

        Args:
            model: on this rank's device. Rank 0's values become everyone's.

        Raises:
            ConfigError: there is no process group, or the model cannot be wrapped; it says why.
            RanksDifferError: another rank has another model, or cannot wrap its own.
        """
        self.check_group()
        if self.parallel == "off":
            return model
        if self.parallel == "ddp":
            return replicate(model, self.compression)
        from obsinfra.optimization import fsdp

        together, groups = self.together, dist.get_world_size() // self.together
        shards = groups
        if self.parallel == "hsdp":
            shards = group_size(dist.get_world_size(), self.shard_size, "shard_size", together=together)
        if self.parallel == "tp" or self.tensor_parallel_size is not None:
            buffers = self._divide_layers(model, together, groups, shards)
        else:
            buffers = fsdp.divide(model, shards, offload=self.offload)
        fsdp.keep_alike(model, buffers)
        return model

    def data_part(self) -> tuple[int, int]:
        """Number of this rank's part of the data, and of parts.

        Raises:
            ConfigError: as `check_group` and `together`.
        """
        self.check_group()
        if not self.on:
            return 0, 1
        return dist.get_rank() // self.together, dist.get_world_size() // self.together

    @property
    def together(self) -> int:
        """Neighbouring ranks that compute the same batch: more than one where layers are divided.

        Raises:
            ConfigError: such groups do not fit the ranks.
        """
        if self.parallel != "tp" and self.tensor_parallel_size is None:
            return 1
        return group_size(dist.get_world_size(), self.tensor_parallel_size, "tensor_parallel_size")

    def _divide_layers(self, model: nn.Module, together: int, groups: int, shards: int) -> list[Tensor]:
        """By its plan, and by FSDP2 among the groups if so; the buffers of its state."""
        from obsinfra.optimization import fsdp, tensor_parallel

        option, parallel = "tensor_parallel_size", f"parallel {self.parallel!r}"
        if self.parallel == "tp":
            option = parallel
        else:
            tensor_parallel.check_several(groups, together, option, parallel)

        def problem(model: nn.Module) -> str | None:
            try:
                tensor_parallel.plan_of(model, together, option)
            except ConfigError as error:
                return str(error)
            return None if self.parallel == "tp" else fsdp.problem_of(model)

        check_wrappable(model, "tensor parallelism", problem)
        buffers = fsdp.saved_buffers(model)
        if self.parallel == "tp":
            mesh = tensor_parallel.divide_layers(model, together, {"data": groups}, option)
            tensor_parallel.average_gradients(model, mesh)
        else:
            tensor_parallel.divide_both(model, together, shards, option, offload=self.offload)
        return buffers


def device_of_rank(device: str, *, disable_gpu: bool = False) -> str:
    """`auto` and `cuda` mean the GPU of this rank's number on its host, as torchrun tells it."""
    local = local_rank()
    gpus = torch.cuda.is_available() and not disable_gpu
    return f"cuda:{local}" if gpus and local is not None and device in ("auto", "cuda") else device


def local_rank() -> int | None:
    """This process's number on its host, from 0; None where torchrun has not started it."""
    told = os.environ.get("LOCAL_RANK", "")
    return int(told) if told.isdigit() else None


def group_size(ranks: int, asked: int | None, option: str, *, together: int = 1) -> int:
    """Ranks of a group; those of a host unless asked otherwise.

    Args:
        together: neighbouring ranks that count as one, those of a tensor-parallel group.

    Raises:
        ConfigError: it does not divide the number of ranks.
    """
    members, who = ranks // together, "ranks" if together == 1 else f"groups of {together} ranks"
    size = asked or max(int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) // together, 1)
    if members % size:
        whose = "" if asked else f" (the {who} of a host)"
        raise ConfigError(
            f"{option} {size}{whose} does not divide {members} {who}",
            "groups of as many ranks each",
            f"choose another {option} or number of ranks",
        )
    return size


def replicate(model: nn.Module, compression: str = "off") -> DistributedDataParallel:
    """DDP: the whole model on each rank; gradients are averaged while backward still runs.

    Args:
        compression: what gradients travel as: `off`, `bf16`, `fp16`, or `powersgd` (rank 4).

    Raises:
        ConfigError, RanksDifferError: as `Wrapping.wrap`.
    """
    check_wrappable(model, "DDP", _ddp_problem)
    device = next(model.parameters()).device
    if compression != "off":
        check_compression(compression, model)
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=compression != "powersgd",  # whose hook fails on them
        bucket_cap_mb=_bucket_megabytes(model) if compression == "powersgd" else None,
    )
    if compression != "off":
        wrapped.register_comm_hook(*_compressing(compression, device))
    return wrapped


def check_compression(how: str, model: nn.Module) -> None:
    """Whether this group can exchange what gradients are compressed to; one small collective.

    Raises:
        ConfigError: it cannot, on every rank.
    """
    odd = next((name for name, p in model.named_parameters() if p.is_complex() and p.requires_grad), None)
    if odd is not None:
        raise ConfigError(
            f"gradient compression {how} of {odd}, which is complex",
            "real parameters: the imaginary part would be lost",
            "drop gradient_compression",
        )
    device = next(model.parameters()).device
    trial = torch.ones(1, dtype=TRAVELS_AS[how], device=device)
    try:
        dist.all_reduce(trial)
    except (RuntimeError, ValueError, TypeError) as error:  # before anything was sent: for all the same
        raise ConfigError(
            f"gradient compression {how} on {device.type}: {str(error).partition(chr(10))[0][:200]}",
            f"a backend that sums {trial.dtype}, as gloo and NCCL do (here {_backend_of(device)})",
            "choose another one, or drop gradient_compression",
        ) from error


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every rank rank 0's values."""
    with torch.no_grad():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def check_wrappable(model: nn.Module, by: str, problem_of: Callable[[nn.Module], str | None]) -> None:
    """Whether all ranks can wrap the same model; one small collective.

    Args:
        by: what wraps it, for the errors.
        problem_of: what speaks against this model in particular, if anything.

    Raises:
        ConfigError: this rank's model cannot be wrapped.
        RanksDifferError: another rank's cannot, or is another one.
    """
    problem = _wrapped_already(model) or _without_values(model) or problem_of(model)
    shapes = (
        []
        if problem
        else [(n, list(p.shape), str(p.dtype), p.requires_grad) for n, p in model.named_parameters()]
    )
    kind = next((kind_of(parameter.device) for parameter in model.parameters()), "")
    mine = torch.tensor(
        [problem is not None, _number_of(kind.encode()), _number_of(json.dumps(shapes).encode())],
        device=_meeting_place(model),
    )
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, mine)
    found = [one.tolist() for one in all_of_them]
    if problem is not None:
        raise ConfigError(
            f"{type(model).__name__} cannot be wrapped by {by}: {problem}",
            "a model that can",
            "wrap one that can, or train without it",
        )
    if failed := [rank for rank, (other, *_) in enumerate(found) if other]:
        raise RanksDifferError(
            f"rank {failed[0]} cannot wrap its model by {by}", "the same model on every rank"
        )
    if odd := [rank for rank, (_, other, _) in enumerate(found) if other != found[0][1]]:
        raise RanksDifferError(
            f"rank {odd[0]} computes on another kind of device than rank 0 (this one: {kind})",
            "devices of one kind on every rank",
            "name the devices, or start on hosts that are alike",
        )
    if odd := [rank for rank, (*_, shape) in enumerate(found) if shape != found[0][2]]:
        raise RanksDifferError(
            f"rank {odd[0]} has parameters of other names, shapes or types than rank 0, or trains others",
            "the same model on every rank",
            "build it from the same code and settings",
        )


def _number_of(text: bytes) -> int:
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


def _meeting_place(model: nn.Module) -> torch.device:
    """Where a collective's tensors lie: a group of NCCL alone takes none of the CPU's."""
    if "gloo" in str(dist.get_backend_config()):
        return torch.device("cpu")
    return next((parameter.device for parameter in model.parameters()), torch.device("cuda"))


def _wrapped_already(model: nn.Module) -> str | None:
    if isinstance(model, DistributedDataParallel):
        return "it is wrapped by DDP already"
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        return "ranks have parts of it already"
    return None


def _without_values(model: nn.Module) -> str | None:
    parameters = dict(model.named_parameters())
    if not parameters:
        return "it has no parameters"
    lazy = next((name for name, parameter in parameters.items() if is_lazy(parameter)), None)
    if lazy is not None:
        return f"{lazy} has no shape yet; call the model once on a batch before"
    meta = next((name for name, parameter in parameters.items() if parameter.is_meta), None)
    return None if meta is None else f"{meta} has no values (device meta)"


def _ddp_problem(model: nn.Module) -> str | None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return "none of its parameters is trained (requires_grad), so there is nothing to exchange"
    return None


def _bucket_megabytes(model: nn.Module) -> int:
    """One bucket for all: PowerSGD's second exchange starts when the first is answered, and of two buckets
    that may be in another order on each rank. NCCL's streams keep an order; gloo takes one bucket's message
    for the other's, and the process ends."""
    return 1 + sum(p.numel() * p.element_size() for p in model.parameters()) // 2**20


def _in_bf16(state: Any, bucket):  # type: ignore[no-untyped-def]  # torch wants no text for types
    """A hook of DDP: the mean of a bucket, each rank's share and each sum of them rounded to bf16."""
    whole = bucket.buffer()
    half = whole.to(torch.bfloat16).div_(dist.get_world_size())

    def widened(summed: Any) -> Tensor:
        whole.copy_(summed.value()[0])
        return whole  # type: ignore[no-any-return]

    return dist.all_reduce(half, async_op=True).get_future().then(widened)


def _backend_of(device: torch.device) -> str:
    """What exchanges tensors of a device, such as `gloo`."""
    by_device = dict(part.split(":", 1) for part in str(dist.get_backend_config()).split(","))
    return by_device.get(device.type, "none")


def _compressing(how: str, device: torch.device) -> tuple[Any, Callable[..., Any]]:
    """State and hook of torch's own gradient compression; of bf16 ours where torch's is not allowed."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if how == "bf16":
        return None, default_hooks.bf16_compress_hook if _backend_of(device) == "nccl" else _in_bf16
    if how == "fp16":
        return None, default_hooks.fp16_compress_hook
    # Vogels et al. 2019, arXiv 1905.13727. Gradients travel whole for the first steps, in which they change
    # most. Its error feedback is not in checkpoints: a resumed run begins with none.
    state = powerSGD_hook.PowerSGDState(
        dist.group.WORLD, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=POWERSGD_WHOLE_STEPS
    )
    return state, powerSGD_hook.powerSGD_hook
