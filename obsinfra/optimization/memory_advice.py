"""What memory there is and who has it, as one document, and what could be done about it, with numbers.

For `MemoryOptimizer.get_memory_info` and `get_memory_recommendations`. Looks, changes nothing.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from obsinfra.optimization.host_guard import HostMemory
from obsinfra.optimization.memory_forecast import FAR_SECONDS, MemoryForecast
from obsinfra.optimization.micro_batching import MicroBatching
from obsinfra.optimization.reclaim import cuda_in_use, resident_bytes

ACTIVATIONS_RATIO = 0.5
"""Activations of more than this share of a device's peak are worth recomputing."""

FRAGMENTED_RATIO = 0.2
IDLE_RATIO = 0.5
FULL_RATIO = 0.9
SWAP_BYTES = 10**9


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One thing to change.

    Attributes:
        what: in plain words.
        because: the numbers behind it, by name; bytes where a name ends so.
        setting: the setting or environment variable to change.
        value: to what, where that can be said.
    """

    what: str
    because: dict[str, Any]
    setting: str
    value: str | None = None


def memory_info(
    host: HostMemory,
    forecasts: dict[str, MemoryForecast],
    micro_batching: MicroBatching,
    model: nn.Module | None,
    recoveries: int,
) -> dict[str, Any]:
    """Host, process, devices, model and micro-batch; bytes where a name ends so."""
    return {
        "host": {
            "used_bytes": host.used_bytes,
            "limit_bytes": host.limit_bytes,
            "ratio": host.ratio,
            "limited_by": host.source,
            "swap_used_bytes": int(psutil.swap_memory().used),
        },
        "process": {"resident_bytes": resident_bytes(), "gc_counts": list(gc.get_count())},
        "cuda": [_device(index) for index in range(torch.cuda.device_count())] if cuda_in_use() else [],
        "model": None if model is None else _model(model),
        "micro_batch": {"rows": micro_batching.limit, "out_of_memory_recoveries": recoveries},
        "seconds_to_exhaustion": {
            device: left for device, one in forecasts.items() if (left := one.seconds_left()) < FAR_SECONDS
        },
    }


def recommendations(info: dict[str, Any], max_memory_percent: float) -> list[Recommendation]:
    """What the numbers of `memory_info` suggest, the most pressing first."""
    found: list[Recommendation] = []
    for device, seconds in info["seconds_to_exhaustion"].items():
        found.append(
            Recommendation(
                f"memory of {device} grows steadily; look for what is kept from step to step",
                {"seconds_to_exhaustion": seconds},
                "leak_check_steps",
                "100",
            )
        )
    host = info["host"]
    if max_memory_percent and host["ratio"] > max_memory_percent / 100.0:
        found.append(
            Recommendation(
                f"memory of the {host['limited_by']} is nearly full: fewer loader workers, smaller caches",
                {"used_bytes": host["used_bytes"], "limit_bytes": host["limit_bytes"]},
                "num_workers",
            )
        )
    if host["swap_used_bytes"] > SWAP_BYTES:
        found.append(
            Recommendation(
                "the host swaps; what is swapped out and touched again stalls the step",
                {"swap_used_bytes": host["swap_used_bytes"]},
                "num_workers",
            )
        )
    micro = info["micro_batch"]
    if micro["out_of_memory_recoveries"] and micro["rows"]:
        found.append(
            Recommendation(
                "start with the micro-batch that was found to fit",
                {"out_of_memory_recoveries": micro["out_of_memory_recoveries"], "rows": micro["rows"]},
                "micro_batch",
                str(micro["rows"]),
            )
        )
    for device in info["cuda"]:
        found += _of_device(device, info["model"], micro["rows"])
    return found


def _of_device(
    device: dict[str, Any], model: dict[str, Any] | None, rows: int | None
) -> list[Recommendation]:
    found = []
    peak, total, reserved = device["allocated_peak_bytes"], device["total_bytes"], device["reserved_bytes"]
    idle = reserved - device["allocated_bytes"]
    if reserved > 0.5 * total and idle > FRAGMENTED_RATIO * reserved and device["retries"]:
        found.append(
            Recommendation(
                "the allocator's cache is in pieces: let its segments grow",
                {"reserved_bytes": reserved, "not_allocated_bytes": idle, "retries": device["retries"]},
                "PYTORCH_CUDA_ALLOC_CONF",
                "expandable_segments:True",
            )
        )
    activations = peak - (model["training_bytes"] if model is not None else 0)
    if model is not None and peak > FULL_RATIO * total and activations > ACTIVATIONS_RATIO * peak:
        because = {"peak_bytes": peak, "total_bytes": total, "activation_bytes": activations}
        found.append(
            Recommendation(
                "most of the peak is activations: recompute them", because, "gradient_checkpointing", "true"
            )
        )
        if model["float32_ratio"] == 1.0:
            found.append(
                Recommendation(
                    "keep activations in 16 bits where the device can", because, "precision", "bf16"
                )
            )
    if 0 < peak < IDLE_RATIO * total and rows is None:
        found.append(
            Recommendation(
                "more than half of the device is never used: a larger batch, or no recomputation",
                {"peak_bytes": peak, "total_bytes": total},
                "batch_size",
            )
        )
    return found


def _model(model: nn.Module) -> dict[str, Any]:
    """Bytes of parameters, gradients and buffers, and what AdamW takes: four times the parameters.
    What a lazy module has not made yet does not count."""
    parameters = [parameter for parameter in model.parameters() if not is_lazy(parameter)]
    size = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    single = sum(p.numel() for p in parameters if p.dtype == torch.float32)
    count = sum(p.numel() for p in parameters)
    return {
        "parameters": count,
        "parameter_bytes": size,
        "gradient_bytes": sum(
            p.grad.numel() * p.grad.element_size() for p in parameters if p.grad is not None
        ),
        "buffer_bytes": sum(b.numel() * b.element_size() for b in model.buffers() if not is_lazy(b)),
        "training_bytes": size + 3 * trained,
        "float32_ratio": single / count if count else 0.0,
    }


def _device(index: int) -> dict[str, Any]:
    stats = torch.cuda.memory_stats(index)
    free, total = torch.cuda.mem_get_info(index)
    reserved = int(stats.get("reserved_bytes.all.current", 0))
    allocated = int(stats.get("allocated_bytes.all.current", 0))
    return {
        "device": index,
        "free_bytes": int(free),
        "total_bytes": int(total),
        "allocated_bytes": allocated,
        "allocated_peak_bytes": int(stats.get("allocated_bytes.all.peak", 0)),
        "reserved_bytes": reserved,
        "reserved_peak_bytes": int(stats.get("reserved_bytes.all.peak", 0)),
        "fragmentation_ratio": 1.0 - allocated / reserved if reserved else 0.0,
        "retries": int(stats.get("num_alloc_retries", 0)),
        "out_of_memory_errors": int(stats.get("num_ooms", 0)),
    }
