"""One slot of shared memory: how a snapshot lies in it, and when it is complete. For trainer and writer.

The header comes last and goes first: a slot says that it is complete only while every byte of it is. Knows
no torch and no NumPy, so that the writer process stays small.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from obsinfra.backup.store import RawTensor

HEADER_BYTES = 4096
"""The header's page; tensors start behind it."""

ALIGNMENT_BYTES = 64

GROWTH_BYTES = 2 * 2**20
"""Slots are multiples of this, so that a document a few bytes longer does not mean a new mapping."""

_POPULATE = getattr(mmap, "MAP_POPULATE", 0)
"""All pages at once: one by one they would take longer than comparing them."""

_MAGIC = b"obsnap1\n"
_FIELDS = struct.Struct("<8sQQQ?32s")
"""Magic, sequence, offset and length of the JSON part, sound, sha256 of the JSON part."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies in a slot: dtype name (as `torch.<name>`), shape, offset and size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SnapshotHead:
    """What is known of a snapshot besides its tensors.

    Attributes:
        run: run id, may be empty.
        step, epoch: where training was.
        taken_at: epoch seconds.
        metrics: values worth keeping with it (loss, gradient norm).
        versions: of the code that took it.
    """

    run: str
    step: int
    epoch: int
    taken_at: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Header:
    """A complete slot's header.

    Attributes:
        sequence: counts the snapshots of one trainer, from 1.
        sound: whether the trainer had nothing against the state.
        json_offset, json_bytes, json_sha256: the JSON part.
    """

    sequence: int
    sound: bool
    json_offset: int
    json_bytes: int
    json_sha256: bytes


@dataclass(frozen=True, slots=True)
class SlotContent:
    """A complete snapshot as it lies in shared memory."""

    header: Header
    head: SnapshotHead
    document: Any
    tensors: Sequence[RawTensor]


def create_slot(folder: Path) -> int:
    """A descriptor of fresh shared memory: a memfd, else an unlinked file in `folder`. Close-on-exec.

    Raises:
        OSError: neither can be made.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("obsinfra-snapshot", os.MFD_CLOEXEC)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())


def grow_slot(fd: int, nbytes: int) -> None:
    """Reserve at least `nbytes`, now, so that a copy cannot run out of memory half way.

    Raises:
        OSError: there is not as much.
    """
    wanted = -(-nbytes // GROWTH_BYTES) * GROWTH_BYTES
    present = os.fstat(fd).st_size
    if wanted > present:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, present, wanted - present)
        else:
            os.ftruncate(fd, wanted)


def aligned(offset: int) -> int:
    """The next offset at which a tensor may begin."""
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def json_part(head: SnapshotHead, document: Any, places: Sequence[TensorPlace]) -> bytes:
    """The text of a slot's JSON part."""
    return json.dumps(
        {
            "head": [head.run, head.step, head.epoch, head.taken_at, dict(head.metrics), dict(head.versions)],
            "tensors": [[place.dtype, place.shape, place.offset, place.nbytes] for place in places],
            "document": document,
        },
        separators=(",", ":"),
    ).encode("ascii")


def mark_incomplete(mapping: mmap.mmap) -> None:
    """Before anything else of a slot is overwritten."""
    mapping[: _FIELDS.size + 32] = bytes(_FIELDS.size + 32)


def mark_complete(mapping: mmap.mmap, sequence: int, sound: bool, json_offset: int, text: bytes) -> None:
    """After everything else of a slot is in place: put the JSON part at its offset, then the header."""
    mapping[json_offset : json_offset + len(text)] = text
    fields = _FIELDS.pack(_MAGIC, sequence, json_offset, len(text), sound, hashlib.sha256(text).digest())
    mapping[: _FIELDS.size + 32] = fields + hashlib.sha256(fields).digest()


def read_header(fd: int) -> Header | None:
    """The header of a slot; None while it is not complete."""
    raw = os.pread(fd, _FIELDS.size + 32, 0)
    fields = raw[: _FIELDS.size]
    if len(raw) < _FIELDS.size + 32 or hashlib.sha256(fields).digest() != raw[_FIELDS.size :]:
        return None
    magic, sequence, json_offset, json_bytes, sound, digest = _FIELDS.unpack(fields)
    if magic != _MAGIC or json_offset + json_bytes > os.fstat(fd).st_size:
        return None
    return Header(sequence, sound, json_offset, json_bytes, digest)


class SlotReader:
    """Reads one slot. Keeps its mapping, since making it takes as long as comparing what is in it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._whole = memoryview(b"")

    def read(self) -> SlotContent | None:
        """The snapshot in the slot, None when it is not complete.

        Nobody may overwrite it while the answer is in use.
        """
        header = read_header(self._fd)
        if header is None:
            return None
        size = os.fstat(self._fd).st_size
        if size != len(self._whole):
            mapping = mmap.mmap(self._fd, size, flags=mmap.MAP_SHARED | _POPULATE, prot=mmap.PROT_READ)
            self._whole = memoryview(mapping)
        whole = self._whole
        text = bytes(whole[header.json_offset : header.json_offset + header.json_bytes])
        if hashlib.sha256(text).digest() != header.json_sha256:
            return None
        body = json.loads(text)
        tensors = [
            RawTensor(dtype, tuple(shape), whole[offset : offset + nbytes])
            for dtype, shape, offset, nbytes in body["tensors"]
        ]
        return SlotContent(header, SnapshotHead(*body["head"]), body["document"], tensors)
