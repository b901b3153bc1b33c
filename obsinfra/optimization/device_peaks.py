"""What devices compute at most, by their makers' data sheets; `flops` divides by it.

Dense figures, at boost clock, in TFLOP/s (1e12 floating-point operations a second; a fused multiply-add is
two). Data sheets give tensor-core figures with 2:4 sparsity: half of that stands here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Peak:
    """One row of the table.

    Attributes:
        pattern: words that must all be in the device's name, as torch tells it; the first row that fits.
        half: bf16 and fp16 with fp32 accumulation, on tensor cores.
        tf32: fp32 matrices on tensor cores; None where there are none for it.
        fp32: without tensor cores.
        bf16: whether `half` holds for bf16, too.
        source: the data sheet.
    """

    pattern: tuple[str, ...]
    half: float
    tf32: float | None
    fp32: float
    source: str
    bf16: bool = True

    def flops(self, precision: str, *, tf32: bool) -> float | None:
        """FLOP/s in `fp32`, `bf16` or `fp16`; None where the device has no native arithmetic for it."""
        if precision == "bf16" and not self.bf16:
            return None
        if precision in ("bf16", "fp16"):
            return self.half * 1e12
        return (self.tf32 if tf32 and self.tf32 else self.fp32) * 1e12


PEAKS = (
    Peak(("B200",), 2250, 1125, 75, "NVIDIA Blackwell datasheet 3384703, HGX B200, per GPU"),
    Peak(("H200", "NVL"), 835.5, 417.5, 60, "NVIDIA H200 datasheet 3002446, H200 NVL"),
    Peak(("H200",), 989.5, 494.5, 67, "NVIDIA H200 datasheet 3002446, H200 SXM"),
    Peak(("GH200",), 989.5, 494.5, 67, "NVIDIA GH200 datasheet"),
    Peak(("H100", "NVL"), 835.5, 417.5, 60, "NVIDIA H100 datasheet 2430615, H100 NVL"),
    Peak(("H100", "PCIe"), 756, 378, 51, "NVIDIA H100 datasheet, H100 PCIe"),
    Peak(("H100",), 989.5, 494.5, 67, "NVIDIA H100 datasheet 2430615, H100 SXM"),
    Peak(("H800", "PCIe"), 756, 378, 51, "as H100 PCIe; tensor cores are not reduced"),
    Peak(("H800",), 989.5, 494.5, 67, "as H100 SXM; tensor cores are not reduced"),
    Peak(("A100",), 312, 156, 19.5, "NVIDIA A100 datasheet 1758950"),
    Peak(("A800",), 312, 156, 19.5, "as A100; only NVLink is reduced"),
    Peak(("A30",), 165, 82, 10.3, "NVIDIA A30 datasheet"),
    Peak(("A40",), 149.7, 74.8, 37.4, "NVIDIA A40 datasheet"),
    Peak(("RTX A6000",), 154.8, 77.4, 38.7, "NVIDIA Ampere GA102 whitepaper v2"),
    Peak(("A10G",), 70, 35, 31.5, "NVIDIA A10G datasheet"),
    Peak(("A10",), 125, 62.5, 31.2, "NVIDIA A10 datasheet"),
    Peak(("L40S",), 362, 183, 91.6, "NVIDIA L40S datasheet"),
    Peak(("L40",), 181, 90.5, 90.5, "NVIDIA L40 datasheet"),
    Peak(("L4",), 121, 60, 30.3, "NVIDIA L4 datasheet"),
    Peak(("RTX 4090",), 165.2, 82.6, 82.6, "NVIDIA Ada whitepaper v2.02, fp32 accumulation"),
    Peak(("RTX 3090 Ti",), 80, 40, 40, "NVIDIA Ampere GA102 whitepaper v2, fp32 accumulation"),
    Peak(("RTX 3090",), 71, 35.6, 35.6, "NVIDIA Ampere GA102 whitepaper v2, fp32 accumulation"),
    Peak(("V100", "PCIE"), 112, None, 14, "NVIDIA V100 datasheet", bf16=False),
    Peak(("V100",), 125, None, 15.7, "NVIDIA V100 datasheet, SXM2", bf16=False),
    Peak(("T4",), 65, None, 8.1, "NVIDIA T4 datasheet", bf16=False),
    Peak(("MI300X",), 1307.4, 653.7, 163.4, "AMD Instinct MI300X data sheet"),
    Peak(("MI325X",), 1307.4, 653.7, 163.4, "AMD Instinct MI325X data sheet"),
    Peak(("MI250X",), 191.5, None, 23.9, "AMD Instinct MI250X data sheet, one of its two dies"),
)


def find_peak(device_name: str) -> Peak | None:
    """The row for a device's name (`torch.cuda.get_device_name`); None if it is not in the table.

    None also for a part of a card (MIG): a data sheet has figures of the whole one.
    """
    words = device_name.replace("-", " ").split()
    if "MIG" in words:
        return None
    for peak in PEAKS:
        if all(_said(part, words, device_name) for part in peak.pattern):
            return peak
    return None


def peak_of(device: torch.device) -> tuple[Peak | None, str]:
    """The row for a device, and in words what was found."""
    if device.type != "cuda":
        return None, f"no peak for a {device.type}: MFU is a ratio to a GPU's data sheet"
    name = torch.cuda.get_device_name(device)
    found = find_peak(name)
    if "MIG" in name.split():
        return (
            None,
            f"{name!r} is a part of a card, whose peak is not known; give its TFLOP/s with --device-tflops",
        )
    if found is None:
        return None, f"{name!r} is not in the table of device peaks; give its TFLOP/s with --device-tflops"
    return found, f"{name}: {found.source}"


def _said(part: str, words: list[str], name: str) -> bool:
    """Whether a name has a word, or ends with several: `L4` is not `L40`, nor `RTX 4090` a laptop's."""
    return name.endswith(part) if " " in part else part in words
