"""Clipping gradients by their norm, as `torch.nn.utils.clip_grad_norm_` does and bit for bit the same.

Called by the trainer's parallelism once a step, where torch's own takes as long as a small model's backward
pass: it sorts the gradients by device and type, goes through them one by one in Python, and multiplies them
by 1.0 where there is nothing to clip.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

_SMALLEST_NORM = 1e-6
"""What torch adds to the norm before it divides by it."""


def clip_gradients(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """Scale the gradients in place so that their L2 norm over all parameters is at most `limit`.

    Gradients that are dense, on the CPU, of one type and without a graph of their own are gone through by one
    call each for norms and product, and not multiplied at all while the norm is below the limit. For others
    torch's own is called: to look at the norm would make a device wait.

    Args:
        parameters: those without a gradient are passed over.
        limit: `inf` only measures.

    Returns:
        The norm before, a tensor of no dimension. If not finite, it makes gradients NaN or 0, as in torch.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not _alike_on_cpu(gradients):
        return clip_grad_norm_(parameters, limit)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    scale = limit / (norm + _SMALLEST_NORM)
    if not scale.item() >= 1.0:  # so that NaN multiplies, too
        torch._foreach_mul_(gradients, scale)
    return norm


def _alike_on_cpu(gradients: Sequence[Tensor]) -> bool:
    if not gradients:
        return False
    kind = gradients[0].dtype
    for gradient in gradients:
        if (
            type(gradient) is not Tensor
            or not gradient.is_cpu
            or gradient.dtype is not kind
            or gradient.layout is not torch.strided
            or gradient.requires_grad
        ):
            return False
    return True
