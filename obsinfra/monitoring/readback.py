"""Reading device scalars without waiting: a copy into pinned memory now, the value a step or more later.

Made by the recorder when the first tensor on a device is handed to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

SLOTS = 64
"""Copies that may be under way; when the device is further behind than this, the oldest is waited for."""


class DeviceReadback:
    """A ring of pinned slots, each with room for a loss and a gradient norm.

    Args:
        arrived: called with (loss, gradient norm, step), None for what was not recorded, in order.
    """

    def __init__(self, arrived: Callable[[float | None, float | None, int], None]) -> None:
        self._arrived = arrived
        self._slots: Tensor | None = None
        self._events: list[torch.Event] = []
        self._has: list[tuple[bool, bool, int]] = [(False, False, 0)] * SLOTS
        self._head = 0
        self._tail = 0
        self._lock = threading.Lock()

    def put(self, loss: Tensor | None, grad_norm: Tensor | None, step: int) -> None:
        """Start copying the values of `step`; deliver what earlier copies brought."""
        given = loss if loss is not None else grad_norm
        if given is None:
            return
        if self._slots is None:
            pin = given.device.type == "cuda"
            self._slots = torch.zeros(SLOTS, 2, dtype=torch.float32, pin_memory=pin)
            self._events = [torch.Event(device=given.device.type) for _ in range(SLOTS)]
        full = self._head - self._tail == SLOTS
        if full:
            self._events[self._tail % SLOTS].synchronize()
        self.collect(wait=full)
        slot = self._head % SLOTS
        for column, value in enumerate((loss, grad_norm)):
            if value is not None:
                self._slots[slot, column].copy_(value.reshape(()), non_blocking=True)
        self._has[slot] = (loss is not None, grad_norm is not None, step)
        self._events[slot].record()
        self._head += 1

    def collect(self, *, wait: bool = False) -> None:
        """Deliver every copy that has finished, in order, without waiting for the device.

        While another thread delivers, this returns at once, or after it when told to `wait`.
        """
        if not self._lock.acquire(blocking=wait):
            return
        try:
            while self._tail < self._head and self._slots is not None:
                slot = self._tail % SLOTS
                if not self._events[slot].query():
                    return
                loss, norm = self._slots[slot].tolist()
                has_loss, has_norm, step = self._has[slot]
                self._tail += 1
                self._arrived(loss if has_loss else None, norm if has_norm else None, step)
        finally:
            self._lock.release()
