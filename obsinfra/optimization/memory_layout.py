"""channels_last for models with convolutions, where it pays: measured if it can be tried, else by rule.

`gpu_optimizer` applies it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from obsinfra.optimization.model_checks import copied
from obsinfra.optimization.timing import time_in_turns

WantedLayout = bool | Literal["auto", "rule"]
"""`auto` measures if it can; `rule` never does, so that a resumed run decides as the first one did."""

WORTH_RATIO = 1.03
"""A layout must be faster by this to be changed: less is within what timing sees by chance."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Whether a model's images are laid out with channels last, and why.

    Attributes:
        channels_last: it is.
        reason: for the log.
        speedup: seconds of forward and backward with channels first ÷ with channels last; None where it was
            not measured.
    """

    channels_last: bool
    reason: str
    speedup: float | None = None


def choose_layout(
    model: nn.Module,
    wanted: WantedLayout,
    device: torch.device,
    *,
    half: bool,
    loss: Callable[[nn.Module], Tensor] | None = None,
) -> Layout:
    """Lay a model's weights out with channels last where that was asked for or pays; values stay.

    Args:
        model: on its device; changed in place.
        wanted: asked for, or who decides.
        device: where it runs.
        half: whether it runs in bf16 or fp16.
        loss: the forward pass of one batch. With it `auto` measures on a copy, forward and backward;
            without, it goes by the rule, which is NVIDIA's: on tensor cores in 16 bits.
    """
    convolutions = sum(isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) for module in model.modules())
    if wanted is False or (wanted is not True and not convolutions):
        return Layout(False, "as asked" if wanted is False else "no convolution over images")
    if wanted is True:
        found = Layout(True, "as asked")
    elif wanted == "auto" and loss is not None:
        found = _measured(model, device, loss)
    elif device.type == "cuda" and half:
        found = Layout(True, "tensor cores take it without rearranging; not measured")
    else:
        found = Layout(False, f"not measured, and no rule for {device.type} in this precision")
    if found.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return found


def _measured(model: nn.Module, device: torch.device, loss: Callable[[nn.Module], Tensor]) -> Layout:
    def step_of(candidate: nn.Module) -> Callable[[], None]:
        def step() -> None:
            candidate.zero_grad(set_to_none=True)
            loss(candidate).backward()  # type: ignore[no-untyped-call]

        return step

    first, last = copied(model), copied(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        times = time_in_turns({"first": step_of(first), "last": step_of(last)}, device)
    speedup = times["first"].median / times["last"].median
    return Layout(speedup >= WORTH_RATIO, f"measured: {speedup:.2f} × as fast with channels last", speedup)
