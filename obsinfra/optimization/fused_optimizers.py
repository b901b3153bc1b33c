"""Optimizers whose step is one kernel for all parameters, where torch has one for the device.

`gpu_optimizer` makes them. None of torch's fused kernels takes a sparse gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from obsinfra.errors import ConfigError, first_line
from obsinfra.optimization.arguments import function, shown

FUSED_DEVICES = ("cuda", "cpu", "mps")

FUSED_IN_PARTS = (torch.optim.Adam, torch.optim.AdamW)
"""Those of which torch 2.13 has the kernel for tensors in parts (DTensor); others fail at the first step."""

TAKE_SPARSE = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam)
"""Torch's optimizers that take sparse gradients, unfused."""


def sparse_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters whose gradients will be sparse, with their names: of embeddings made with `sparse=True`."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            yield f"{name}.weight" if name else "weight", module.weight


def create_optimizer(
    kind: Callable[..., torch.optim.Optimizer],
    parameters: Iterable[Any],
    device: torch.device,
    sparse: Mapping[Tensor, str] | None = None,
    **options: Any,
) -> tuple[torch.optim.Optimizer, str]:
    """An optimizer, fused where its class and the parameters allow it.

    Args:
        kind: class of the optimizer.
        parameters: tensors or parameter groups.
        device: where they are.
        sparse: names of tensors whose gradients are known to be sparse; looked up by identity.
        options: its own; `fused` and `foreach` are taken as they are.

    Returns:
        The optimizer, and how it computes: `fused`, or why not.

    Raises:
        ConfigError: no parameters, options that the class does not take, or a gradient is known to be
            sparse, and `kind` or `fused=True` does not take that. At the first step of a fused optimizer:
            a gradient that nobody knew of is sparse.
    """
    try:
        return _create(kind, parameters, device, sparse, options)
    except (TypeError, ValueError) as error:
        name = getattr(kind, "__name__", shown(kind))
        raise ConfigError(
            f"{name} with the options {shown(options)}: {error}", f"what {name} takes", "correct them"
        ) from error


def _create(
    kind: Callable[..., torch.optim.Optimizer],
    parameters: Iterable[Any],
    device: torch.device,
    sparse: Mapping[Tensor, str] | None,
    options: dict[str, Any],
) -> tuple[torch.optim.Optimizer, str]:
    function("kind", kind, "torch.optim.AdamW")
    if isinstance(parameters, (nn.Module, Tensor)) or not isinstance(parameters, Iterable):
        raise ConfigError(f"parameters {shown(parameters)}", "several of them", "give model.parameters()")
    parameters = list(parameters)
    if not parameters:
        raise ConfigError("no parameters to optimize", "one or more", "give those of the model to train")
    for tensor in _tensors(parameters):
        if not isinstance(tensor, Tensor):
            raise ConfigError(
                f"a parameter {shown(tensor)}", "tensors, or groups with params", "give model.parameters()"
            )
        if is_lazy(tensor):
            raise ConfigError(
                "parameters without a shape, of a lazy module",
                "parameters with values",
                "call the model once on a batch before",
            )
    known = [sparse[tensor] for tensor in _tensors(parameters) if tensor in sparse] if sparse else []
    if known:
        _check_takes_sparse(kind, known, fused=bool(options.get("fused")))
    if "fused" in options or "foreach" in options:
        return kind(parameters, **options), "as asked"
    if "fused" not in inspect.signature(kind).parameters:
        return kind(parameters, **options), f"{getattr(kind, '__name__', kind)} has no fused version"
    if device.type not in FUSED_DEVICES:
        return kind(parameters, **options), f"no fused version on {device.type}"
    if not all(torch.is_floating_point(tensor) for tensor in _tensors(parameters)):
        return kind(parameters, **options), "not fused: some parameters are no floating-point numbers"
    in_parts = any(hasattr(tensor, "placements") for tensor in _tensors(parameters))
    if in_parts and kind not in FUSED_IN_PARTS:
        name = getattr(kind, "__name__", kind)
        return kind(parameters, **options), f"not fused: torch has no {name} in one kernel for parts"
    if known:
        return kind(parameters, **options), f"not fused: the gradient of {known[0]} is sparse"
    try:
        made = kind(parameters, **options, fused=True)
    except RuntimeError as error:
        return kind(parameters, **options), f"not fused: {first_line(error)}"
    _refuse_sparse_gradients(made)
    return made, "fused"


def _check_takes_sparse(kind: Callable[..., Any], names: list[str], *, fused: bool) -> None:
    name = getattr(kind, "__name__", str(kind))
    of_torch = getattr(kind, "__module__", "").startswith("torch.optim")
    if fused or (of_torch and kind not in TAKE_SPARSE):
        raise ConfigError(
            f"{'a fused ' if fused else ''}{name} for {', '.join(names)}, whose gradients are sparse",
            f"dense gradients, or one of {', '.join(one.__name__ for one in TAKE_SPARSE)}, unfused",
            "drop fused=True" if fused and kind in TAKE_SPARSE else "sparse=False in that nn.Embedding",
        )


def _refuse_sparse_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Look at each parameter's first gradient before a fused kernel does, and no more afterwards."""
    unseen = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    numbers = {id(tensor): number for number, tensor in enumerate(unseen)}

    def look(*_: Any) -> None:
        if not unseen:
            return
        for tensor in unseen:
            if tensor.grad is not None and tensor.grad.layout is not torch.strided:
                raise ConfigError(
                    f"a fused {type(optimizer).__name__}, and parameter {numbers[id(tensor)]} of shape "
                    f"{list(tensor.shape)} has a sparse gradient",
                    "dense gradients",
                    "sparse=False in its nn.Embedding; or fused=False, in an optimizer that takes them: "
                    f"{', '.join(one.__name__ for one in TAKE_SPARSE)}",
                )
        unseen[:] = [tensor for tensor in unseen if tensor.grad is None]

    optimizer.register_step_pre_hook(look)


def _tensors(parameters: list[Any]) -> Iterator[Tensor]:
    """The parameters of groups, too; they may come with their names."""
    for entry in parameters:
        if isinstance(entry, dict) and "params" in entry:
            params = entry["params"]
            entry["params"] = [params] if isinstance(params, Tensor) else list(params)
            yield from _tensors(entry["params"])
        else:
            yield entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
