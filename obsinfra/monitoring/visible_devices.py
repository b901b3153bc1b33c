"""Which of NVML's devices a CUDA program sees, and under which number.

For the GPU sampler, so that its `device` label is the N of torch's `cuda:N`. NVML lists every GPU of the
machine in PCI order; CUDA applies `CUDA_VISIBLE_DEVICES` to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pynvml


@dataclass(slots=True)
class Device:
    """One device as CUDA counts it.

    Attributes:
        label: torch's device index, as text.
        handle: NVML's handle of the device or MIG slice.
        board: NVML's handle of the physical GPU; temperature, power and clocks belong to it.
        name, uuid: as the driver tells; the uuid begins with `GPU-` or `MIG-`.
        lost: it stopped answering.
    """

    label: str
    handle: Any
    board: Any
    name: str
    uuid: str
    lost: bool = False


def accessible_devices() -> list[Device]:
    """Every GPU this user may open, in NVML's order; one that does not answer is left out, as CUDA does.

    Raises:
        pynvml.NVMLError: the driver does not even count them.
    """
    found: list[Device] = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            found.append(_device(handle, handle, len(found)))
        except pynvml.NVMLError:
            continue
    return found


def visible_devices(devices: Sequence[Device], setting: str | None) -> list[Device]:
    """`devices` as `CUDA_VISIBLE_DEVICES` selects and orders them, labelled anew.

    Rules of CUDA (and of `torch.cuda`): indices or unique beginnings of UUIDs; the first that is invalid ends
    the list, one that is named twice empties it.

    Args:
        devices: what `accessible_devices` returned.
        setting: the variable's value; None when it is not set.
    """
    if setting is None:
        return list(devices)
    chosen: list[Device] = []
    for item in (part.strip() for part in setting.split(",")):
        device = _named(devices, item)
        if device is None:
            break
        if any(device.uuid == other.uuid for other in chosen):
            return []
        label = str(len(chosen))
        chosen.append(Device(label, device.handle, device.board, device.name, device.uuid))
    return chosen


def _named(devices: Sequence[Device], item: str) -> Device | None:
    if item.startswith("MIG-"):
        return _mig_slice(item)
    if item.startswith("GPU-"):
        matches = [device for device in devices if device.uuid.startswith(item)]
        return matches[0] if len(matches) == 1 else None
    number = re.match(r"\+?\d+", item)
    if number is None or int(number[0]) >= len(devices):
        return None
    return devices[int(number[0])]


def _mig_slice(uuid: str) -> Device | None:
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return _device(handle, pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle), 0)
    except pynvml.NVMLError:
        return None


def _device(handle: Any, board: Any, number: int) -> Device:
    uuid = str(pynvml.nvmlDeviceGetUUID(handle))
    try:
        name = str(pynvml.nvmlDeviceGetName(handle))
    except pynvml.NVMLError:
        name = "GPU"
    return Device(str(number), handle, board, name, uuid)
