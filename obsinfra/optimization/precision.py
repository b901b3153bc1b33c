"""Which device, which precision: chosen once, by capability, and said out loud."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from obsinfra.errors import ConfigError
from obsinfra.optimization.arguments import one_of, shown


def choose_device(wanted: str | torch.device, *, disable_gpu: bool = False) -> torch.device:
    """The device to train on.

    Args:
        wanted: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        disable_gpu: `auto` means the CPU then; naming a GPU as well is an error.

    Raises:
        ConfigError: the device does not exist here, or contradicts `disable_gpu`.
    """
    if isinstance(wanted, torch.device):
        wanted = str(wanted)
    if not isinstance(wanted, str):
        raise ConfigError(f"device {shown(wanted)}", "auto, cpu, cuda, cuda:N or mps", "correct the device")
    if wanted == "auto":
        if not disable_gpu and torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        if not disable_gpu and torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(
            f"device {wanted!r}", "auto, cpu, cuda, cuda:N or mps", "correct --device"
        ) from None
    if disable_gpu and device.type != "cpu":
        raise ConfigError(
            f"device {wanted!r} with the GPU disabled", "one or the other", "drop --disable-gpu"
        )
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            found = f"cuda:0 … cuda:{count - 1}" if count else "none"
            raise ConfigError(
                f"device {wanted!r}", f"a CUDA device of this machine ({found})", "use --device auto"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device {wanted!r}", "a Mac with a Metal GPU", "use --device auto")
    elif device.type not in ("cpu", "mps") or device.index:
        raise ConfigError(f"device {wanted!r}", "auto, cpu, cuda, cuda:N or mps", "correct --device")
    return device


def choose_devices(
    device_ids: Sequence[int] | None, wanted: str = "auto", *, disable_gpu: bool = False
) -> tuple[torch.device, ...]:
    """The devices to use, the first one for this process: those of `device_ids`, or the one that is `wanted`.

    Raises:
        ConfigError: no ids, an id that is no CUDA device here, one named twice, or devices of different
            architectures, on which ranks would differ in speed and in arithmetic.
    """
    if device_ids is None:
        return (choose_device(wanted, disable_gpu=disable_gpu),)
    if not isinstance(device_ids, (list, tuple, range)) or not all(
        isinstance(index, int) for index in device_ids
    ):
        raise ConfigError(
            f"device_ids {shown(device_ids)}", "a list of numbers, such as [0, 1]", "correct it"
        )
    named = f"device ids {list(device_ids)}"
    if wanted != "auto" or disable_gpu:
        raise ConfigError(f"{named} beside another choice of device", "one or the other", "drop one of them")
    count = torch.cuda.device_count()
    found = f"ids of CUDA devices of this machine (0 … {count - 1})" if count else "none: no CUDA device here"
    if not device_ids or any(isinstance(i, bool) or not 0 <= i < count for i in device_ids):
        raise ConfigError(named, found, "correct device_ids, or leave them out")
    if len(set(device_ids)) != len(device_ids):
        raise ConfigError(named, "each device once", "name each device once")
    devices = tuple(torch.device("cuda", i) for i in device_ids)
    check_same_architecture(devices)
    return devices


def check_same_architecture(devices: Sequence[torch.device]) -> None:
    """Refuse devices that differ in name or compute capability.

    Raises:
        ConfigError: they do.
    """
    kinds = {device: kind_of(device) for device in devices}
    if len(set(kinds.values())) > 1:
        seen = ", ".join(f"{device}: {kind}" for device, kind in kinds.items())
        raise ConfigError(
            f"devices of different architectures ({seen})",
            "devices of one kind",
            "choose device_ids, or CUDA_VISIBLE_DEVICES, of one kind",
        )


def kind_of(device: torch.device) -> str:
    """What ranks must have alike to compute alike: name and capability of a CUDA device, else the type."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"


_NOTHING = nullcontext()
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True, slots=True)
class Precision:
    """A precision and why it was chosen.

    Attributes:
        name: `fp32`, `bf16` or `fp16`.
        device_type: where autocast applies.
        reason: for the log.
    """

    name: str
    device_type: str
    reason: str

    def autocast(self) -> AbstractContextManager[object]:
        """Context for the forward pass; does nothing under fp32."""
        if self.name == "fp32":
            return _NOTHING
        dtype = torch.bfloat16 if self.name == "bf16" else torch.float16
        return torch.autocast(self.device_type, dtype=dtype)

    def scaler(self) -> CountingScaler:
        """A gradient scaler; enabled under fp16 only, a pass-through otherwise."""
        return CountingScaler(self.device_type, enabled=self.name == "fp16")


class CountingScaler(torch.amp.GradScaler):
    """Torch's scaler, which counts the optimizer steps it leaves out. Its `update` waits for the device.

    Attributes:
        skipped_steps: so many were left out since it was made.
    """

    skipped_steps = 0

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """As torch's: the scale shrinks after a step that was left out, and only then."""
        if not self.is_enabled() or new_scale is not None:
            super().update(new_scale)
            return
        before = self.get_scale()
        super().update()
        self.skipped_steps += self.get_scale() < before


def choose_precision(wanted: str, device: torch.device, *, autocast_pays: bool = True) -> Precision:
    """The autocast precision for `device`.

    `auto` is bf16 where the hardware computes it natively (CUDA capability 8.0 and up, CPUs with
    AVX512-BF16 or AMX), fp16 on older CUDA devices, fp32 elsewhere and for models that say autocast does
    not pay.

    Raises:
        ConfigError: `wanted` is none.
    """
    one_of("precision", wanted, PRECISIONS)
    if wanted != "auto":
        return Precision(wanted, device.type, "as asked")
    if not autocast_pays:
        return Precision("fp32", device.type, "the workload keeps fp32")
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return Precision("bf16", "cuda", "native on this GPU")
        return Precision("fp16", "cuda", "this GPU has no native bf16")
    if device.type == "cpu" and cpu_has_bf16():
        return Precision("bf16", "cpu", "native on this CPU")
    return Precision("fp32", device.type, "no native 16-bit arithmetic here")


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively, as the kernel's flags tell (Linux on x86 and Arm)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    return any(f" {flag}" in flags for flag in ("avx512_bf16", "amx_bf16", "bf16 "))
