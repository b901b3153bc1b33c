"""Which kernel computes `scaled_dot_product_attention`: torch's choice, or a named one; and how fast each is.

`gpu_optimizer` applies a choice to the whole process, as torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from obsinfra.errors import ConfigError, first_line
from obsinfra.optimization.arguments import one_of, shown, whole_number
from obsinfra.optimization.precision import choose_device
from obsinfra.optimization.timing import time_in_turns

Kernel = Literal["auto", "flash", "efficient", "cudnn", "math"]

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Of queries, keys and values."""

_untouched: dict[str, bool] | None = None
"""What was allowed before a kernel was named here; None while none is."""


@dataclass(frozen=True, slots=True)
class AttentionTimes:
    """Forward and backward pass of one attention, by kernel.

    Attributes:
        seconds: median by kernel that can compute it.
        refused: what torch says of the others.
    """

    seconds: dict[str, float]
    refused: dict[str, str]

    @property
    def fastest(self) -> str:
        """Name of the fastest kernel."""
        return min(self.seconds, key=self.seconds.__getitem__)


def use_attention(kernel: Kernel) -> str:
    """Choose the kernel for the whole process. The plain one stays allowed, for what a named one cannot do.

    `auto` takes back what was named here, and leaves alone what somebody else has chosen.

    Returns:
        In words, what is the case now.

    Raises:
        ConfigError: there is no such kernel.
    """
    one_of("attention", kernel, ("auto", *BACKENDS))
    global _untouched
    if kernel == "auto":
        if _untouched is not None:
            _allow(_untouched)
            _untouched = None
        return "torch chooses, by shapes"
    if _untouched is None:
        _untouched = _allowed()
    _allow({name: name in (kernel, "math") for name in BACKENDS})
    return "as asked" if kernel == "math" else "as asked, else math"


def _allowed() -> dict[str, bool]:
    cuda: Any = torch.backends.cuda  # these functions have no annotations
    return {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }


def _allow(kernels: dict[str, bool]) -> None:
    cuda = torch.backends.cuda
    cuda.enable_flash_sdp(kernels["flash"])
    cuda.enable_mem_efficient_sdp(kernels["efficient"])
    cuda.enable_cudnn_sdp(kernels["cudnn"])
    cuda.enable_math_sdp(kernels["math"])


def measure_attention(
    shape: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    causal: bool = True,
    rounds: int = 5,
) -> AttentionTimes:
    """Time each kernel on one shape.

    Args:
        shape: of queries, keys and values: [batch, heads, length, channels of a head].
        device, dtype: where and in what.
        causal: each position sees those before it.
        rounds: measurements of each.

    Raises:
        ConfigError: no such shape or type, or a device that is not there.
    """
    if not isinstance(shape, (list, tuple)) or len(shape) != 4:
        raise ConfigError(
            f"shape {shown(shape)}", "[batch, heads, length, channels of a head]", "give all four"
        )
    for size in shape:
        whole_number("shape with", size, least=1)
    if dtype not in TYPES:
        raise ConfigError(f"dtype {shown(str(dtype))}", f"one of {', '.join(map(str, TYPES))}", "correct it")
    whole_number("rounds", rounds, least=1)
    device = choose_device(device)
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(shape, device=device, dtype=dtype, generator=generator, requires_grad=True)
        for _ in range(3)
    )

    def pass_of(backend: SDPBackend) -> Callable[[], None]:
        def run() -> None:
            with sdpa_kernel(backend):
                out = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
                torch.autograd.grad(out.sum(), (query, key, value))

        return run

    calls, refused = {}, {}
    for name, backend in BACKENDS.items():
        call = pass_of(backend)
        try:
            call()
        except RuntimeError as error:
            refused[name] = first_line(error)
        else:
            calls[name] = call
    times = time_in_turns(calls, device, rounds=rounds, warm_up=1)
    return AttentionTimes({name: timing.median for name, timing in times.items()}, refused)
