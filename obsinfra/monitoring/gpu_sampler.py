"""What NVML tells of each visible GPU, and PyTorch's CUDA allocator beside it, as samples of the catalogue.

The monitor's housekeeping thread calls it. Never imports torch: its allocator is asked only where torch is
loaded already and has initialised CUDA. A machine without a GPU gets a null sampler.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from obsinfra.catalog import metrics as catalog
from obsinfra.catalog.metrics import Metric
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.sample import Sample

COMPONENT = "gpu_sampler"

THROTTLE_REASONS = {
    "applications_clocks_setting": 0x2,
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "sw_thermal_slowdown": 0x20,
    "hw_thermal_slowdown": 0x40,
    "hw_power_brake_slowdown": 0x80,
    "display_clock_setting": 0x100,
}
"""Bits of `nvmlClocksEventReasons` in nvml.h, by nvidia-smi's names. An idle GPU (0x1) is not throttled."""

NVLINK_FIELDS = {"crc": 38, "replay": 52, "recovery": 59}
"""Field ids of nvml.h whose values are totals over all links: CRC flit errors, replays, recoveries."""

XID_EVENTS_PER_SAMPLE = 128
"""A GPU in trouble can raise events faster than they are read; the rest waits for the next sample."""

Value = tuple[Metric, Mapping[str, str], float]
Reading = Iterator[Value]


class GpuSampler(Protocol):
    """What the monitor needs of a GPU sampler.

    Attributes:
        reason: why there is nothing to sample; None when there is.
        errors: readings that failed for another reason than not being supported, and devices lost.
    """

    reason: str | None
    errors: int

    def sample(self) -> list[Sample]:
        """Present readings of every device; what a device does not have is absent."""
        ...

    def describe(self) -> list[dict[str, str]]:
        """`device` (torch's index, as text), `name` and `uuid` of every device."""
        ...

    def close(self) -> None:
        """Give NVML back. May be called twice."""
        ...


class NullGpuSampler:
    """No GPU that NVML shows; `reason` says why. PyTorch's allocator is still asked (ROCm, WSL)."""

    def __init__(self, reason: str) -> None:
        self.reason: str | None = reason
        self.errors = 0

    def sample(self) -> list[Sample]:
        return allocator_samples()

    def describe(self) -> list[dict[str, str]]:
        return []

    def close(self) -> None:
        pass


def create_gpu_sampler() -> GpuSampler:
    """An NVML sampler, or a null one with the reason: no library, no driver, no GPU, none visible."""
    try:
        import pynvml
    except ImportError as error:
        return NullGpuSampler(f"nvidia-ml-py is not installed: {error}")
    from obsinfra.monitoring.visible_devices import accessible_devices, visible_devices

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return NullGpuSampler(f"NVML cannot be used: {error}")
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        devices = accessible_devices()
        reason = f"CUDA_VISIBLE_DEVICES={setting!r} hides every GPU" if devices else "NVML finds no GPU"
        visible = visible_devices(devices, setting)
    except pynvml.NVMLError as error:
        visible, reason = [], f"NVML cannot be used: {error}"
    if not visible:
        pynvml.nvmlShutdown()
        return NullGpuSampler(reason)
    return NvmlGpuSampler(devices, visible)


class NvmlGpuSampler:
    """Reads NVML, one device and one reading at a time, so that a failure costs only itself.

    Made by `create_gpu_sampler` after `nvmlInit`.

    Args:
        devices: every `visible_devices.Device` of the machine.
        visible: those CUDA sees, labelled with torch's indices.
    """

    reason: str | None = None

    def __init__(self, devices: list[Any], visible: list[Any]) -> None:
        import pynvml

        self.errors = 0
        self._nvml = pynvml
        self._unsupported = (
            pynvml.NVMLError_NotSupported,
            pynvml.NVMLError_FunctionNotFound,
            pynvml.NVMLError_NoPermission,
        )
        self._gone = (
            pynvml.NVMLError_GpuIsLost,
            pynvml.NVMLError_ResetRequired,
            pynvml.NVMLError_GpuNotFound,
        )
        self._readings: tuple[Callable[[Any], Reading], ...] = (
            self._memory,
            self._utilization,
            self._temperature,
            self._power,
            lambda device: self._clock(device, "sm", pynvml.NVML_CLOCK_SM),
            lambda device: self._clock(device, "memory", pynvml.NVML_CLOCK_MEM),
            self._throttled,
            lambda device: self._ecc(device, "corrected", pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            lambda device: self._ecc(device, "uncorrected", pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            self._pcie_replays,
            self._nvlink,
        )
        self._all, self._devices = devices, visible
        self._matched_to_torch = False
        self._logged: set[str] = set()
        self._xids: dict[tuple[str, str], int] = {}
        self._events: Any = None
        self._open = True
        self._watch_xids()

    def sample(self) -> list[Sample]:
        if not self._open:
            return []
        self._match_torch()
        out: list[Sample] = []
        for device in self._devices:
            self._sample_device(device, out)
        self._collect_xids()
        labels = {device.uuid: device.label for device in self._devices}
        for (uuid, xid), count in self._xids.items():
            where = {"device": labels.get(uuid, "unknown"), "xid": xid}
            out.append(Sample(catalog.GPU_XID_ERRORS, where, float(count)))
        out.extend(allocator_samples())
        out.append(Sample(catalog.TELEMETRY_ERRORS, {"component": COMPONENT}, float(self.errors)))
        return out

    def describe(self) -> list[dict[str, str]]:
        return [
            {"device": device.label, "name": device.name, "uuid": device.uuid} for device in self._devices
        ]

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._free_events()
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError as error:
            self._failed("shutdown", error)

    # ---- readings of one device: each yields only once its NVML call has succeeded -------------------

    def _memory(self, device: Any) -> Reading:
        memory = self._nvml.nvmlDeviceGetMemoryInfo(device.handle)
        yield catalog.GPU_MEMORY_USED_BYTES, {}, memory.used
        yield catalog.GPU_MEMORY_TOTAL_BYTES, {}, memory.total
        if memory.total:
            yield catalog.GPU_MEMORY_RATIO, {}, memory.used / memory.total

    def _utilization(self, device: Any) -> Reading:
        rates = self._nvml.nvmlDeviceGetUtilizationRates(device.handle)
        yield catalog.GPU_UTILIZATION_RATIO, {}, rates.gpu / 100
        yield catalog.GPU_MEMORY_ACTIVITY_RATIO, {}, rates.memory / 100

    def _temperature(self, device: Any) -> Reading:
        nvml = self._nvml
        try:
            celsius = nvml.nvmlDeviceGetTemperatureV(device.board, nvml.NVML_TEMPERATURE_GPU)
        except (AttributeError, nvml.NVMLError_FunctionNotFound):  # older bindings, older driver
            celsius = nvml.nvmlDeviceGetTemperature(device.board, nvml.NVML_TEMPERATURE_GPU)
        yield catalog.GPU_TEMPERATURE_CELSIUS, {}, celsius

    def _power(self, device: Any) -> Reading:
        yield catalog.GPU_POWER_WATTS, {}, self._nvml.nvmlDeviceGetPowerUsage(device.board) / 1000

    def _clock(self, device: Any, name: str, domain: int) -> Reading:
        megahertz = self._nvml.nvmlDeviceGetClockInfo(device.board, domain)
        yield catalog.GPU_CLOCK_HERTZ, {"clock": name}, megahertz * 1e6

    def _throttled(self, device: Any) -> Reading:
        nvml = self._nvml
        try:
            reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(device.board)
        except (AttributeError, nvml.NVMLError_FunctionNotFound):  # its name before driver 535
            reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device.board)
        for name, bit in THROTTLE_REASONS.items():
            yield catalog.GPU_THROTTLED, {"reason": name}, float(bool(reasons & bit))

    def _ecc(self, device: Any, name: str, kind: int) -> Reading:
        count = self._nvml.nvmlDeviceGetTotalEccErrors(device.board, kind, self._nvml.NVML_VOLATILE_ECC)
        yield catalog.GPU_ECC_ERRORS, {"type": name}, count

    def _pcie_replays(self, device: Any) -> Reading:
        yield catalog.GPU_PCIE_REPLAYS, {}, self._nvml.nvmlDeviceGetPcieReplayCounter(device.board)

    def _nvlink(self, device: Any) -> Reading:
        """Field values carry an error each; what this device or driver does not count is absent."""
        nvml = self._nvml
        fields = nvml.nvmlDeviceGetFieldValues(device.board, list(NVLINK_FIELDS.values()))
        absent = (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_INVALID_ARGUMENT)
        for name, found in zip(NVLINK_FIELDS, fields, strict=True):
            if found.nvmlReturn in absent:
                continue
            if found.nvmlReturn != nvml.NVML_SUCCESS:
                raise nvml.NVMLError(found.nvmlReturn)
            small = found.valueType == nvml.NVML_VALUE_TYPE_UNSIGNED_INT
            count = found.value.uiVal if small else found.value.ullVal
            yield catalog.GPU_NVLINK_ERRORS, {"type": name}, count

    # ---- inside --------------------------------------------------------------------------------------

    def _sample_device(self, device: Any, out: list[Sample]) -> None:
        for reading in self._readings:
            try:
                values = list(reading(device))
            except self._unsupported:
                continue
            except self._gone as error:
                if not device.lost:
                    device.lost = True
                    self.errors += 1
                    get_logger("system").error(
                        "gpu_lost", device=device.label, uuid=device.uuid, error=str(error)
                    )
                return  # nothing else would answer; asked again at the next sample, in case it comes back
            except self._nvml.NVMLError as error:
                self._failed(f"device {device.label}", error)
                continue
            if device.lost:
                device.lost = False
                get_logger("system").warning("gpu_answers_again", device=device.label, uuid=device.uuid)
                self._watch_xids()
            out.extend(
                Sample(metric, {"device": device.label, **labels}, float(value))
                for metric, labels, value in values
            )

    def _failed(self, what: str, error: Exception) -> None:
        self.errors += 1
        key = f"{what}: {error}"
        if key not in self._logged:
            self._logged.add(key)
            get_logger("system").warning("gpu_reading_failed", what=what, error=str(error))

    def _watch_xids(self) -> None:
        """Ask the driver to tell of critical errors (XID) of every visible GPU that can."""
        self._free_events()
        nvml = self._nvml
        try:
            self._events = nvml.nvmlEventSetCreate()
        except self._unsupported:
            return
        except nvml.NVMLError as error:
            self._failed("XID events", error)
            return
        self._event_devices = {_address(device.board): device.uuid for device in self._devices}
        wanted = nvml.nvmlEventTypeXidCriticalError
        for device in self._devices:
            try:
                if not device.lost and nvml.nvmlDeviceGetSupportedEventTypes(device.board) & wanted:
                    nvml.nvmlDeviceRegisterEvents(device.board, wanted, self._events)
            except self._unsupported:
                continue
            except nvml.NVMLError as error:
                self._failed(f"XID events of device {device.label}", error)

    def _collect_xids(self) -> None:
        """Count the events that have come, without waiting for one."""
        for _ in range(XID_EVENTS_PER_SAMPLE):
            if self._events is None:
                return
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
            except self._nvml.NVMLError_Timeout:
                return
            except self._nvml.NVMLError as error:
                # A lost GPU spoils the whole set: go on with the others'.
                self._failed("XID events", error)
                self._watch_xids()
                return
            # By the handle's address: a GPU that fell off the bus (XID 79) no longer tells its uuid.
            uuid = self._event_devices.get(_address(event.device), "unknown")
            key = (uuid, str(event.eventData))
            self._xids[key] = self._xids.get(key, 0) + 1
            if self._xids[key] == 1:
                get_logger("system").error("gpu_xid", uuid=uuid, xid=event.eventData)

    def _free_events(self) -> None:
        events, self._events = self._events, None
        if events is not None:
            try:
                self._nvml.nvmlEventSetFree(events)
            except self._nvml.NVMLError as error:
                self._failed("XID events", error)

    def _match_torch(self) -> None:
        """Once torch has initialised CUDA, number the devices as it does: CUDA may put faster GPUs first."""
        if self._matched_to_torch:
            return
        cuda = _initialised_cuda()
        if cuda is None:
            return
        self._matched_to_torch = True
        by_uuid = {device.uuid: device for device in self._all}
        ordered = []
        for index in range(cuda.device_count()):
            uuid = getattr(cuda.get_device_properties(index), "uuid", None)
            device = by_uuid.get(f"GPU-{uuid}")
            if device is None:
                return  # a MIG slice, ROCm or an older torch: the environment's order stands
            ordered.append(device)
        if [device.uuid for device in ordered] == [device.uuid for device in self._devices]:
            return
        for index, device in enumerate(ordered):
            device.label = str(index)
        self._devices = ordered
        self._watch_xids()


def allocator_samples() -> list[Sample]:
    """PyTorch's caching CUDA allocator on each device this process uses; nothing before CUDA is in use."""
    cuda = _initialised_cuda()
    if cuda is None:
        return []
    out: list[Sample] = []
    for index in range(cuda.device_count()):
        stats = cuda.memory_stats(index)
        if not stats.get("reserved_bytes.all.peak"):
            continue
        device = {"device": str(index)}
        for state, key in (
            ("allocated", "allocated_bytes.all.current"),
            ("allocated_peak", "allocated_bytes.all.peak"),
            ("reserved", "reserved_bytes.all.current"),
            ("reserved_peak", "reserved_bytes.all.peak"),
        ):
            if key in stats:
                out.append(
                    Sample(catalog.CUDA_ALLOCATOR_BYTES, {**device, "state": state}, float(stats[key]))
                )
        out.append(Sample(catalog.CUDA_ALLOCATOR_RETRIES, device, float(stats.get("num_alloc_retries", 0))))
    return out


def _initialised_cuda() -> Any:
    """`torch.cuda` where torch is imported (wholly) and CUDA is in use, else None."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    initialised = getattr(cuda, "is_initialized", None)
    return cuda if initialised is not None and initialised() else None


def _address(handle: Any) -> int | None:
    """NVML's handles are pointers; ctypes compares its wrappers by identity, so compare where they point."""
    return ctypes.cast(handle, ctypes.c_void_p).value
