"""TF32: fp32 matrix products on tensor cores, with 10 bits of mantissa instead of 23.

`gpu_optimizer` applies it to the whole process, as torch does.
"""

from __future__ import annotations

import torch


def allow_tf32(wanted: bool, device: torch.device) -> str:
    """Let fp32 matrix products and convolutions on CUDA use tensor cores, or not.

    Returns:
        In words, what is the case now.
    """
    if device.type != "cuda":
        return f"TF32 does not apply to a {device.type}"
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    torch.backends.cudnn.allow_tf32 = wanted
    if not wanted:
        return "TF32 off, as asked"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "this GPU has no TF32"
    return "TF32 on"


def tf32_allowed() -> bool:
    """Whether fp32 matrix products may use tensor cores."""
    return torch.get_float32_matmul_precision() != "highest"
