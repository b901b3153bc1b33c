"""Optimizers whose step is one kernel for all parameters, where torch has one for the device.

`gpu_optimizer` makes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

FUSED_DEVICES = ("cuda", "cpu", "mps")

FUSED_IN_PARTS = (torch.optim.Adam, torch.optim.AdamW)
"""Those of which torch 2.13 has the kernel for tensors in parts (DTensor); others fail at the first step."""


def create_optimizer(
    kind: Callable[..., torch.optim.Optimizer],
    parameters: Iterable[Any],
    device: torch.device,
    **options: Any,
) -> tuple[torch.optim.Optimizer, str]:
    """An optimizer, fused where its class and the parameters allow it.

    Args:
        kind: class of the optimizer.
        parameters: tensors or parameter groups.
        device: where they are.
        options: its own; `fused` and `foreach` are taken as they are.

    Returns:
        The optimizer, and how it computes: `fused`, or why not.
    """
    parameters = list(parameters)
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
    try:
        return kind(parameters, **options, fused=True), "fused"
    except RuntimeError as error:
        return kind(parameters, **options), f"not fused: {str(error).partition(chr(10))[0]}"


def _tensors(parameters: list[Any]) -> Iterator[torch.Tensor]:
    """The parameters of groups, too; they may come with their names."""
    for entry in parameters:
        if isinstance(entry, dict):
            entry["params"] = list(entry["params"])
            yield from _tensors(entry["params"])
        else:
            yield entry[1] if isinstance(entry, tuple) else entry
