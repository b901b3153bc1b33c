"""Exact comparison of nested states, and a small state to save."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from obsinfra.backup.tensors import tensor_bytes


def small_state(seed: int = 0) -> dict[str, Any]:
    """Three tensors, one of which is the same for every seed, and plain values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(40, 10, generator=generator),
        "bias": torch.randn(7, generator=generator),
        "frozen": torch.arange(300.0),
        "seed": seed,
    }


def same(one: Any, other: Any) -> bool:
    """Whether `other` is what storing `one` must give: the same types and values to the last bit.

    Arrays may come back in native byte order. NaN is NaN, and 0.0 is not -0.0.
    """
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and bytes(tensor_bytes(one)) == bytes(tensor_bytes(other))
        )
    if isinstance(one, np.ndarray | np.generic):
        native = one.dtype.newbyteorder("=")
        return (
            isinstance(other, np.ndarray | np.generic)
            and isinstance(one, np.ndarray) == isinstance(other, np.ndarray)
            and (native, one.shape) == (other.dtype, other.shape)
            and one.astype(native).tobytes() == other.tobytes()
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(mine, theirs) and same(one[mine], other[theirs])
            for mine, theirs in zip(one, other, strict=True)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        if math.isnan(one) or math.isnan(other):
            return math.isnan(one) and math.isnan(other)
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return bool(one == other)
