"""Host snapshots: a copy of the training state in reused host buffers, taken at a step boundary.

Two buffers take turns, so that one complete snapshot always exists while the next is being made. What is
committed when the loop cannot be reached, or when its present state is not sound.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One complete copy.

    Attributes:
        state: nested state with CPU tensors that nobody else writes.
        step, epoch: where training was.
        taken_at: epoch seconds.
        metrics: values worth keeping with it (loss, gradient norm).
    """

    state: Mapping[str, Any]
    step: int
    epoch: int
    taken_at: float
    metrics: Mapping[str, float] = field(default_factory=dict)

    def finite(self) -> bool:
        """Whether every floating-point tensor of `state["model"]` is finite. Reads them all."""
        return all(
            bool(torch.isfinite(tensor).all())
            for tensor in _tensors(self.state.get("model", {}))
            if tensor.is_floating_point() or tensor.is_complex()
        )


class SnapshotBuffers:
    """Takes snapshots into two alternating sets of buffers; host memory never exceeds two copies.

    A snapshot handed out by `hold()` is not overwritten until the thread that got it releases it.
    """

    def __init__(self) -> None:
        self._buffers: list[dict[tuple[Any, ...], Tensor]] = [{}, {}]
        self._snapshots: list[Snapshot | None] = [None, None]
        self._newest = 1
        self._lock = threading.Lock()
        self._held: dict[int, int] = {}  # thread: slot
        self.last_seconds = 0.0

    def take(
        self, state: Mapping[str, Any], *, step: int, epoch: int, metrics: Mapping[str, float] | None = None
    ) -> bool:
        """Copy `state` (nested dicts, lists, tuples, plain values, tensors on any device).

        Only the loop's thread calls this, at a step boundary.

        Returns:
            False when the older buffer is being committed right now and nothing was copied.
        """
        started = time.perf_counter()
        with self._lock:
            slot = 1 - self._newest
            if slot in self._held.values():
                return False
            self._snapshots[slot] = None
        used: set[tuple[Any, ...]] = set()
        devices: set[torch.device] = set()
        copied = self._copy(state, (), self._buffers[slot], used, devices)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        for key in self._buffers[slot].keys() - used:
            del self._buffers[slot][key]
        with self._lock:
            self._snapshots[slot] = Snapshot(copied, step, epoch, time.time(), dict(metrics or {}))
            self._newest = slot
        self.last_seconds = time.perf_counter() - started
        return True

    def hold(self, *, sound: bool = False) -> Snapshot | None:
        """The newest snapshot, kept from being overwritten until this thread calls `release()`.

        Args:
            sound: prefer the newest whose model is finite; the other one is looked at too.
        """
        with self._lock:
            order = (self._newest, 1 - self._newest)
        for slot in order:
            with self._lock:
                snapshot = self._snapshots[slot]
                if snapshot is None:
                    continue
                self._held[threading.get_ident()] = slot
            if not sound or snapshot.finite():
                return snapshot
        self.release()
        return None

    def release(self) -> None:
        """The snapshot this thread holds may be overwritten again."""
        with self._lock:
            self._held.pop(threading.get_ident(), None)

    @property
    def newest_step(self) -> int | None:
        """Step of the newest snapshot; None before the first."""
        with self._lock:
            snapshot = self._snapshots[self._newest]
            return None if snapshot is None else snapshot.step

    def _copy(
        self,
        value: Any,
        path: tuple[Any, ...],
        buffers: dict[tuple[Any, ...], Tensor],
        used: set[tuple[Any, ...]],
        devices: set[torch.device],
    ) -> Any:
        if isinstance(value, Tensor):
            source = value.detach()
            buffer = buffers.get(path)
            if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                pin = source.device.type == "cuda"
                buffer = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=pin)
                buffers[path] = buffer
            used.add(path)
            devices.add(source.device)
            buffer.copy_(source, non_blocking=True)
            return buffer
        if isinstance(value, Mapping):
            return {
                key: self._copy(item, (*path, key), buffers, used, devices) for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            items = [
                self._copy(item, (*path, index), buffers, used, devices) for index, item in enumerate(value)
            ]
            return tuple(items) if isinstance(value, tuple) else items
        return copy.deepcopy(value)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
