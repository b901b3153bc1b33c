"""How a chunk's file is encoded: as it is, or as one zstd frame, told by the file's suffix.

Used by `objects` and `store`; decides by a sample what pays. Knows no files, no tensors and no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import zstandard

Compression = Literal["off", "auto"]
"""`off`: chunks are written as they are. `auto`: those are compressed of which a sample says that it pays."""

SUFFIX = ".zst"
"""Of the file of a compressed chunk; the name before it is the sha256 of what is inside."""

LEVEL = 1
"""Of zstd. What is not compressed away at this level (noise in weights) is not at higher ones either."""

SAMPLE_BYTES = 64 * 1024
"""Taken from the start, the middle and the end of a tensor."""

PAYS_RATIO = 0.75
"""A tensor is compressed if its sample shrinks at least to this. Weights in float32 come to 0.92, in bfloat16
to 0.78: what they would save is not worth the time that each save and load would take longer."""

SMALLEST_BYTES = 4096
"""Chunks up to this size stay as they are: a file takes a block of the disk anyway."""


class DamagedFrame(ValueError):
    """The bytes are not one whole zstd frame of the size that was expected at most."""


def check_compression(name: str) -> None:
    """Whether `name` is a kind of compression.

    Raises:
        ValueError: it is not.
    """
    if name not in ("off", "auto"):
        raise ValueError(f"compression is off or auto, got {name!r}")


def pays(data: memoryview) -> bool:
    """Whether a tensor of these bytes is worth compressing, judged by a sample of at most 3 × 64 KiB."""
    if len(data) <= SMALLEST_BYTES:
        return False
    if len(data) <= 3 * SAMPLE_BYTES:
        sample = bytes(data)
    else:
        middle = (len(data) - SAMPLE_BYTES) // 2
        parts = (data[:SAMPLE_BYTES], data[middle : middle + SAMPLE_BYTES], data[-SAMPLE_BYTES:])
        sample = b"".join(parts)
    return len(compress(memoryview(sample))) <= PAYS_RATIO * len(sample)


def judge(compression: Compression, data: memoryview) -> Callable[[], bool]:
    """A question about one tensor that is answered when first asked, and then remembered."""
    answer: bool | None = None if compression == "auto" else False

    def worth_it() -> bool:
        nonlocal answer
        if answer is None:
            answer = pays(data)
        return answer

    return worth_it


def compress(data: memoryview) -> bytes:
    """One zstd frame that says how much is in it."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(data)


def decompress(frame: bytes, at_most: int) -> bytes:
    """What is in a frame. No more memory is taken than `at_most`, whatever the frame says.

    Raises:
        DamagedFrame: not one whole frame and nothing else, or more is in it.
    """
    try:
        size = zstandard.frame_content_size(frame)
        if not 0 < size <= at_most:  # below 0: it does not say; no chunk is empty
            raise DamagedFrame(f"{size} bytes in a frame that may hold {at_most}")
        data = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedFrame(str(error)) from error
    if len(data) != size:
        raise DamagedFrame(f"{len(data)} bytes in a frame that says {size}")
    return data
