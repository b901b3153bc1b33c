"""The machine under a training: host and GPUs, sampled on the monitor's thread and read on any.

`TrainingMonitor` has one. What is shown of it as metrics is in `samples`; `host` and `gpus` are what the page
and the history take from the same readings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from obsinfra.catalog import metrics as catalog
from obsinfra.monitoring.gpu_sampler import create_gpu_sampler
from obsinfra.monitoring.host_sampler import HostSampler
from obsinfra.monitoring.sample import Sample


class Machine:
    """Both samplers and their last readings.

    Args:
        disk_path: folder whose file system's free space is reported.

    Attributes:
        samples: the last ones of all.
        host: the host's for people: ratios 0–1 and bytes, None where something cannot be read; empty before
            the first sample.
    """

    def __init__(self, disk_path: Path) -> None:
        self._host_sampler = HostSampler(disk_path)
        self._gpu_sampler = create_gpu_sampler()
        self.samples: list[Sample] = []
        self.host: dict[str, Any] = {}

    def sample(self) -> None:
        """Read everything anew."""
        sampled = [*self._host_sampler.sample(), *self._gpu_sampler.sample()]
        self.samples = sampled
        by_name = {metric.name: value for metric, labels, value in sampled if not labels}
        limit = by_name.get(catalog.CGROUP_MEMORY_LIMIT_BYTES.name)
        used = by_name.get(catalog.CGROUP_MEMORY_USED_BYTES.name)
        self.host = {
            "cpu_ratio": by_name.get(catalog.HOST_CPU_RATIO.name),
            "process_cpu_ratio": by_name.get(catalog.PROCESS_CPU_RATIO.name),
            "memory_ratio": by_name.get(catalog.MEMORY_PRESSURE_RATIO.name),
            "memory_used_bytes": used if limit else by_name.get(catalog.HOST_MEMORY_USED_BYTES.name),
            "memory_limit_bytes": limit or by_name.get(catalog.HOST_MEMORY_TOTAL_BYTES.name),
            "resident_bytes": by_name.get(catalog.PROCESS_RESIDENT_MEMORY_BYTES.name),
            "disk_free_bytes": by_name.get(catalog.DISK_FREE_BYTES.name),
        }

    def gpu_names(self) -> list[str]:
        """What each GPU is."""
        return [gpu["name"] for gpu in self._gpu_sampler.describe()]

    def gpus(self) -> list[dict[str, Any]]:
        """Each GPU for people: ratios 0–1, bytes, °C, W; None where something cannot be read."""
        values: dict[str, dict[str, float]] = {}
        for metric, labels, value in self.samples:
            if metric.labels == ("device",):
                values.setdefault(labels["device"], {})[metric.name] = value
        shown = {
            "utilization_ratio": catalog.GPU_UTILIZATION_RATIO,
            "memory_used_bytes": catalog.GPU_MEMORY_USED_BYTES,
            "memory_total_bytes": catalog.GPU_MEMORY_TOTAL_BYTES,
            "temperature_celsius": catalog.GPU_TEMPERATURE_CELSIUS,
            "power_watts": catalog.GPU_POWER_WATTS,
        }
        gpus: list[dict[str, Any]] = []
        for found in self._gpu_sampler.describe():
            own = values.get(found["device"], {})
            read = {name: own.get(metric.name) for name, metric in shown.items()}
            gpus.append({"device": found["device"], "name": found["name"], **read})
        return gpus

    def gpu_load(self) -> tuple[float | None, float | None]:
        """Mean utilisation of the GPUs and the fullest one's share of memory, both 0–1."""
        gpus = self.gpus()
        busy = [gpu["utilization_ratio"] for gpu in gpus if gpu["utilization_ratio"] is not None]
        full = [
            gpu["memory_used_bytes"] / gpu["memory_total_bytes"]
            for gpu in gpus
            if gpu["memory_used_bytes"] is not None and gpu["memory_total_bytes"]
        ]
        return sum(busy) / len(busy) if busy else None, max(full) if full else None

    def close(self) -> None:
        """Let go of the GPUs."""
        self._gpu_sampler.close()
