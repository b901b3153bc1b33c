"""Activation checkpointing: blocks whose activations are computed again in the backward pass, not kept.

`gpu_optimizer` (and so the trainer) applies it; `flops` counts with and without. Method: Chen et al. 2016,
arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from obsinfra.errors import ConfigError
from obsinfra.optimization.arguments import whole_number
from obsinfra.optimization.model_checks import check_module
from obsinfra.optimization.weightless import weightless


@dataclass(frozen=True, slots=True)
class Checkpointing:
    """Which blocks of a model are recomputed, and what is known to come of it.

    Attributes:
        blocks: of the model.
        recomputed: their indices.
        kept_bytes, whole_bytes: activations kept for the backward pass, with these blocks recomputed and
            without; None where nobody asked for a budget.
    """

    blocks: int
    recomputed: tuple[int, ...]
    kept_bytes: int | None = None
    whole_bytes: int | None = None


class Recomputed:
    """Stands where a block's `forward` was."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


def checkpoint_activations(
    model: nn.Module,
    *,
    every: int = 1,
    budget_bytes: int | None = None,
    loss: Callable[[nn.Module], Tensor] | None = None,
) -> Checkpointing:
    """Recompute the activations of blocks in the backward pass instead of keeping them.

    A block is a child of the model's largest `nn.ModuleList` (transformer blocks, usually). Parameters and
    their names are untouched; so are loss and gradients.

    Args:
        model: changed in place.
        every: recompute every `every`-th block, the first one included.
        budget_bytes: recompute as few blocks as needed for the activations kept to stay below this, the
            largest first. Overrides `every`. They are weighed without computing anything.
        loss: the forward pass of one batch, in the precision of the training; for a budget.

    Raises:
        ConfigError: the model has no list of blocks, or does not stay below the budget with all of them
            recomputed.
    """
    check_module(model)
    whole_number("every", every, least=1)
    if budget_bytes is not None:
        whole_number("budget_bytes", budget_bytes, least=1)
    undo_checkpointing(model)  # what an earlier call chose
    blocks = _blocks(model)
    if budget_bytes is None:
        made = Checkpointing(len(blocks), tuple(range(0, len(blocks), every)))
    elif loss is None:
        raise ConfigError("an activation budget without a forward pass", "loss", "give loss=")
    else:
        made = Checkpointing(len(blocks), *_within(model, loss, budget_bytes))
    for index in made.recomputed:
        blocks[index].forward = Recomputed(blocks[index].forward)
    return made


def undo_checkpointing(model: nn.Module) -> None:
    """Keep all activations again."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Recomputed):
            del module.forward  # the class's own shows again


def _blocks(model: nn.Module) -> nn.ModuleList:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    if not lists:
        raise ConfigError(
            f"gradient checkpointing of {type(model).__name__}",
            "a model with its blocks in an nn.ModuleList of two or more",
            "drop --gradient-checkpointing",
        )
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


def _within(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], budget_bytes: int
) -> tuple[tuple[int, ...], int, int]:
    """Blocks to recompute for a budget, and what is kept then and without."""
    with weightless(model) as twin:
        undo_checkpointing(twin)
        whole, inside, entries = _saved_bytes(twin, loss)
    # A recomputed block keeps what goes into it, and little else.
    saved = {index: inside[index] - entries[index] for index in inside}
    kept, chosen = whole, []
    for index in sorted(saved, key=lambda index: (-saved[index], index)):
        if kept <= budget_bytes:
            break
        chosen.append(index)
        kept -= saved[index]
    if kept > budget_bytes:
        raise ConfigError(
            f"an activation budget of {budget_bytes / 1e6:.0f} MB",
            f"at least {kept / 1e6:.0f} MB, kept with all blocks recomputed ({whole / 1e6:.0f} MB with none)",
            "a smaller --batch-size or --micro-batch, or a larger budget",
        )
    return tuple(sorted(chosen)), kept, whole


def _saved_bytes(
    model: nn.Module, loss: Callable[[nn.Module], Tensor]
) -> tuple[int, dict[int, int], dict[int, int]]:
    """Bytes kept for the backward pass of one forward pass: in all, by block, and of each block's inputs.

    A tensor kept twice counts once, where it was kept first; parameters do not count.
    """
    ignored = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    seen: set[int] = set()
    alive: list[Any] = []  # a storage that is freed gives its address to another
    inside: dict[int, int] = {}
    entries: dict[int, int] = {}
    total, current = 0, -1

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in ignored and storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(storage)
            total += storage.nbytes()
            if current >= 0:
                inside[current] = inside.get(current, 0) + storage.nbytes()
        return tensor

    def enter(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal current
            current = index
            inside.setdefault(index, 0)
            entries[index] = sum(
                t.untyped_storage().nbytes() for t in args if isinstance(t, Tensor) and t.requires_grad
            )

        return hook

    def leave(*_: Any) -> None:
        nonlocal current
        current = -1

    hooks = []
    for index, block in enumerate(_blocks(model)):
        hooks += [block.register_forward_pre_hook(enter(index)), block.register_forward_hook(leave)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss(model)
    del result
    for hook in hooks:
        hook.remove()
    return total, inside, entries
