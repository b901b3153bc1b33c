"""torch.compile and activation checkpointing, applied to a finished module."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from obsinfra.errors import ConfigError


def compile_model(model: nn.Module, wanted: str, device: torch.device) -> nn.Module:
    """The module to call: compiled in place when `wanted` is `on`, or `auto` on a CUDA device.

    In place (`Module.compile`), so parameter names and state_dict stay the user's.
    """
    if wanted == "on" or (wanted == "auto" and device.type == "cuda"):
        model.compile()
    return model


def checkpoint_activations(model: nn.Module) -> int:
    """Recompute the activations of each block in the backward pass instead of keeping them.

    A block is a child of the model's largest `nn.ModuleList` (transformer blocks, usually). Parameters
    and their names are untouched.

    Returns:
        How many blocks were wrapped.

    Raises:
        ConfigError: the model has no list of blocks.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    if not lists:
        raise ConfigError(
            f"gradient checkpointing of {type(model).__name__}",
            "a model with its blocks in an nn.ModuleList of two or more",
            "drop --gradient-checkpointing",
        )
    blocks = max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return len(blocks)
