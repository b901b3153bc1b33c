"""Copies of the training state in two slots of shared memory: all of a save that the loop waits for.

The slots take turns, are reused and grow when they must. Who commits them, and which of them may be
overwritten, is the checkpointer's business. The reading side is `slot`, without torch.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obsinfra.backup.slot import (
    HEADER_BYTES,
    SnapshotHead,
    TensorPlace,
    aligned,
    create_slot,
    grow_slot,
    json_part,
    mark_complete,
    mark_incomplete,
)
from obsinfra.backup.state_tree import encode
from obsinfra.backup.tensors import dtype_name
from obsinfra.monitoring.logging_config import get_logger


@dataclass(frozen=True, slots=True)
class Taken:
    """What the trainer remembers of a complete slot."""

    sequence: int
    step: int
    sound: bool


class SharedSnapshots:
    """Two slots of shared memory; host memory never exceeds two copies of the largest state.

    One thread takes; `taken` may be read by others.

    Args:
        folder: where the slots' files go on systems without memfd.

    Attributes:
        fds: the slots' descriptors, for the writer.
        taken: what is complete in either slot.
        last_seconds: how long the last `take` took.

    Raises:
        OSError: no shared memory can be made.
    """

    def __init__(self, folder: Path) -> None:
        self.fds = (create_slot(folder), create_slot(folder))
        self.taken: list[Taken | None] = [None, None]
        self.last_seconds = 0.0
        self._slots = tuple(_Slot(fd) for fd in self.fds)
        self._sequence = 0

    def newest(self, *, sound: bool = False, besides: int | None = None) -> int | None:
        """The slot of the newest complete snapshot, or of the newest sound one; None when there is none.

        Args:
            besides: a slot to leave out, because it is about to be overwritten.
        """
        found = [
            (taken.sequence, slot)
            for slot, taken in enumerate(self.taken)
            if taken is not None and slot != besides and (taken.sound or not sound)
        ]
        return max(found)[1] if found else None

    def next_slot(self) -> int:
        """Which slot to overwrite: an incomplete one, else the only one that is not sound, else the older."""
        first, second = self.taken
        if first is None or second is None:
            return 0 if first is None else 1
        if first.sound != second.sound:
            return 0 if not first.sound else 1
        return 0 if first.sequence < second.sequence else 1

    def take(self, slot: int, state: Mapping[str, Any], head: SnapshotHead, *, sound: bool) -> None:
        """Copy `state` (as `state_tree.encode` takes; tensors on any device) into a slot that nobody reads.

        When it raises before the copy began, the slot is as it was; else it is incomplete.

        Raises:
            CheckpointError: something in the state cannot be stored; it names the place.
            OSError: not enough memory.
        """
        started = time.perf_counter()
        document, tensors = encode(state)
        places = _lay_out(tensors)
        text = json_part(head, document, places)
        json_offset = aligned(places[-1].offset + places[-1].nbytes if places else HEADER_BYTES)
        pin = any(tensor.device.type == "cuda" for tensor in tensors)
        target = self._slots[slot]
        target.reserve(json_offset + len(text), pin=pin)
        self.taken[slot] = None
        mark_incomplete(target.mapping)
        _copy(tensors, target.views(places, tensors))
        self._sequence += 1
        mark_complete(target.mapping, self._sequence, sound, json_offset, text)
        self.taken[slot] = Taken(self._sequence, head.step, sound)
        self.last_seconds = time.perf_counter() - started

    def close(self) -> None:
        """Give the memory back; the writer's own descriptors keep it for the writer."""
        self.taken = [None, None]
        for slot in self._slots:
            slot.close()


class _Slot:
    """The trainer's mapping of one slot, and views of its last layout."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._places: Sequence[TensorPlace] = ()
        self._views: list[Tensor] = []
        self._whole: Tensor | None = None
        self._mapping: mmap.mmap | None = None
        self._pinned = False

    @property
    def mapping(self) -> mmap.mmap:
        assert self._mapping is not None
        return self._mapping

    def reserve(self, nbytes: int, *, pin: bool) -> None:
        """Have at least `nbytes` mapped, page-locked for CUDA when asked.

        Raises:
            OSError: not enough memory; what was mapped stays.
        """
        if self._mapping is None or len(self._mapping) < nbytes:
            grow_slot(self._fd, nbytes)
            self._unmap()
            self._mapping = mmap.mmap(self._fd, os.fstat(self._fd).st_size)
            self._whole = torch.frombuffer(self._mapping, dtype=torch.uint8)
        if pin and not self._pinned:
            self._pinned = True  # tried: a second attempt would fail the same way
            assert self._whole is not None
            _page_lock(self._whole)

    def views(self, places: Sequence[TensorPlace], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors over the slot's memory, one for each place."""
        if places != self._places:
            assert self._whole is not None
            whole = self._whole
            self._views = [
                whole[place.offset : place.offset + place.nbytes].view(tensor.dtype).view(tensor.shape)
                for place, tensor in zip(places, tensors, strict=True)
            ]
            self._places = places
        return self._views

    def close(self) -> None:
        self._unmap()
        os.close(self._fd)

    def _unmap(self) -> None:
        if self._pinned and self._whole is not None:
            torch.cuda.cudart().cudaHostUnregister(self._whole.data_ptr())  # type: ignore[no-untyped-call]
        self._pinned = False
        self._places, self._views, self._whole, self._mapping = (), [], None, None


def _lay_out(tensors: Sequence[Tensor]) -> list[TensorPlace]:
    places = []
    offset = HEADER_BYTES
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        places.append(TensorPlace(dtype_name(tensor.dtype), tuple(tensor.shape), offset, nbytes))
        offset = aligned(offset + nbytes)
    return places


@torch.no_grad()
def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy pairwise; when this returns every byte has arrived."""
    streams: dict[torch.device, torch.cuda.Stream] = {}
    for source, target in zip(sources, targets, strict=True):
        if source.device.type == "cuda":
            stream = streams.get(source.device)
            if stream is None:
                stream = streams[source.device] = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]
                stream.wait_stream(torch.cuda.current_stream(source.device))
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
        else:
            target.copy_(source)
    for stream in streams.values():
        # Not overlapped with the next forward: an optimizer step could overtake the copy of a parameter.
        stream.synchronize()


def _page_lock(whole: Tensor) -> None:
    """Lock a mapping's pages, so that the device copies into it directly; without that it is only slower."""
    error = torch.cuda.cudart().cudaHostRegister(  # type: ignore[no-untyped-call]
        whole.data_ptr(), whole.numel(), 0
    )
    if int(error) != 0:
        get_logger("system").warning("snapshot_not_pinned", error=str(error), bytes=whole.numel())
