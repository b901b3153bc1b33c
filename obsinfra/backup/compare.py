"""Telling whether two training states are the same, bit for bit, and where they are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def differences(left: Any, right: Any, path: str = "state") -> list[str]:
    """Places at which two nested states differ; empty when they are identical.

    Tensors and arrays are equal when dtype, shape and every bit are; so NaN equals itself, 0.0 is not −0.0.

    Args:
        left, right: nested dicts, lists, tuples, tensors, arrays and plain values.
        path: what to call the top in the answer.
    """
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        left, right = torch.from_numpy(left), torch.from_numpy(right)
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return [] if _same_bits(left, right) else [f"{path}: {_tensor(left)} and {_tensor(right)} differ"]
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        found = [f"{path}.{key}: on one side only" for key in left.keys() ^ right.keys()]
        for key in left:
            if key in right:
                found += differences(left[key], right[key], f"{path}.{key}")
        return found
    if isinstance(left, (list, tuple)) and type(left) is type(right):
        if len(left) != len(right):
            return [f"{path}: {len(left)} and {len(right)} items"]
        pairs = enumerate(zip(left, right, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{path}[{i}]")]
    same = type(left) is type(right) and (left == right or (left != left and right != right))
    return [] if same else [f"{path}: {left!r} and {right!r}"]


def count_tensors(state: Any) -> int:
    """How many tensors a nested state has."""
    if isinstance(state, Tensor):
        return 1
    if isinstance(state, Mapping):
        return sum(count_tensors(item) for item in state.values())
    if isinstance(state, (list, tuple)):
        return sum(count_tensors(item) for item in state)
    return 0


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if not left.numel():
        return True
    bits = [side.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for side in (left, right)]
    return bool(torch.equal(*bits))


def _tensor(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
