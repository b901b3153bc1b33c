"""CPU, memory, disk and network of host, container and process, as samples of the catalogue.

The monitor's housekeeping thread calls it about once a second; a sample takes a few hundred microseconds, so
never on the step path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from obsinfra.catalog import metrics as catalog
from obsinfra.catalog.metrics import Metric
from obsinfra.monitoring.cgroup import memory_limit, memory_limits
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.sample import Sample

COMPONENT = "host_sampler"

CPU_WINDOW_SECONDS = 0.05
"""A ratio over less than this is noise (the kernel counts in 10 ms): the last one stands."""

Reading = Iterator[tuple[Metric, float]]


class HostSampler:
    """Samples on demand. Ratios are over the time since the previous sample, counters since creation.

    What cannot be read here is absent from the samples; failures are counted and each kind is logged once.

    Args:
        disk_path: folder whose file system's free space is reported; it need not exist yet.
        cgroup_root: where `proc` and `sys` are found for the memory limit; another one for tests.

    Attributes:
        errors: readings that failed.
    """

    def __init__(self, disk_path: Path, *, cgroup_root: Path = Path("/")) -> None:
        self.errors = 0
        self._disk_path = disk_path
        self._cgroup_root = cgroup_root
        self._process = psutil.Process()
        self._failed: set[str] = set()
        self._disk_start = _disk_bytes()
        self._network_start = _network_bytes()
        self._cpu_at = time.monotonic()
        self._host_cpu = _host_cpu_seconds()
        self._process_cpu = time.process_time()
        self._host_cpu_ratio: float | None = None
        self._process_cpu_ratio: float | None = None

    def sample(self) -> list[Sample]:
        """Every reading that is to be had, and the count of those that failed."""
        readings: tuple[Callable[[], Reading], ...] = (
            self._cpu,
            self._resident,
            self._memory,
            self._disk,
            self._disk_free,
            self._network,
        )
        out: list[Sample] = []
        for reading in readings:
            try:
                out.extend([Sample(metric, {}, float(value)) for metric, value in reading()])
            except (OSError, psutil.Error, ValueError, RuntimeError) as error:
                self.errors += 1
                name = reading.__name__.lstrip("_")
                if name not in self._failed:
                    self._failed.add(name)
                    get_logger("system").warning("host_reading_failed", reading=name, error=repr(error))
        out.append(Sample(catalog.TELEMETRY_ERRORS, {"component": COMPONENT}, float(self.errors)))
        return out

    def _cpu(self) -> Reading:
        now = time.monotonic()
        if now - self._cpu_at >= CPU_WINDOW_SECONDS:
            busy, total = _host_cpu_seconds()
            busy_before, total_before = self._host_cpu
            process = time.process_time()
            if total > total_before:
                ratio = (busy - busy_before) / (total - total_before)
                self._host_cpu_ratio = min(1.0, max(0.0, ratio))
            self._process_cpu_ratio = (process - self._process_cpu) / (now - self._cpu_at)
            self._cpu_at, self._host_cpu, self._process_cpu = now, (busy, total), process
        if self._host_cpu_ratio is not None:
            yield catalog.HOST_CPU_RATIO, self._host_cpu_ratio
        if self._process_cpu_ratio is not None:
            yield catalog.PROCESS_CPU_RATIO, self._process_cpu_ratio

    def _resident(self) -> Reading:
        yield catalog.PROCESS_RESIDENT_MEMORY_BYTES, self._process.memory_info().rss

    def _memory(self) -> Reading:
        memory = psutil.virtual_memory()
        used = memory.total - memory.available
        yield catalog.HOST_MEMORY_USED_BYTES, used
        yield catalog.HOST_MEMORY_TOTAL_BYTES, memory.total
        yield catalog.HOST_SWAP_USED_BYTES, psutil.swap_memory().used
        tightest = memory_limit(self._cgroup_root)
        if tightest is not None:
            yield catalog.CGROUP_MEMORY_USED_BYTES, tightest.used_bytes
            yield catalog.CGROUP_MEMORY_LIMIT_BYTES, tightest.limit_bytes
        fullest = max((level.ratio for level in memory_limits(self._cgroup_root)), default=0.0)
        yield catalog.MEMORY_PRESSURE_RATIO, max(used / memory.total, fullest)

    def _disk(self) -> Reading:
        now = _disk_bytes()
        if now is not None and self._disk_start is not None:
            yield catalog.DISK_READ_BYTES, now[0] - self._disk_start[0]
            yield catalog.DISK_WRITTEN_BYTES, now[1] - self._disk_start[1]

    def _disk_free(self) -> Reading:
        folder = self._disk_path.absolute()
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        yield catalog.DISK_FREE_BYTES, psutil.disk_usage(str(folder)).free

    def _network(self) -> Reading:
        now = _network_bytes()
        if now is not None and self._network_start is not None:
            yield catalog.NETWORK_RECEIVED_BYTES, now[0] - self._network_start[0]
            yield catalog.NETWORK_SENT_BYTES, now[1] - self._network_start[1]


def _host_cpu_seconds() -> tuple[float, float]:
    """Busy and total processor seconds since boot. Guest time is already in user time."""
    times = psutil.cpu_times()
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - times.idle - getattr(times, "iowait", 0.0), total


def _disk_bytes() -> tuple[int, int] | None:
    """Bytes read and written by all disks; psutil evens out wrap-arounds. None without disks."""
    try:
        counters = psutil.disk_io_counters()
    except (OSError, RuntimeError, ValueError):
        return None  # a container without /proc/diskstats
    return None if counters is None else (counters.read_bytes, counters.write_bytes)


def _network_bytes() -> tuple[int, int] | None:
    """Bytes received and sent by all interfaces but loopback, which never leaves the host."""
    try:
        interfaces = psutil.net_io_counters(pernic=True)
    except (OSError, RuntimeError, ValueError):
        return None
    counters = [counter for name, counter in interfaces.items() if name != "lo"]
    if not counters:
        return None
    return sum(counter.bytes_recv for counter in counters), sum(counter.bytes_sent for counter in counters)
