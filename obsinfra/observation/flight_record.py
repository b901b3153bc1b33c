"""The last collectives of this rank, kept by torch's flight recorder: what a hang is understood by.

Ranks that hang wait in different collectives, or some wait in one that another never came to; the records of
all ranks, held beside each other, tell which. As JSON, as torch has it (`torch.distributed.flight_recorder`
describes the fields); nothing is pickled.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch._C import _distributed_c10d

from obsinfra.run.files import write_atomic

KEPT = 2000
"""Collectives that are remembered, unless TORCH_FR_BUFFER_SIZE says otherwise; 0 turns it off."""


@dataclass(frozen=True, slots=True)
class FlightRecord:
    """What was written.

    Attributes:
        path: the file.
        last: the newest collective this rank has called: its number in the group, name, and shapes it sends.
    """

    path: Path
    last: str


def start_recording() -> None:
    """To be called before the process group is made, which reads the size of the record."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(KEPT))


def dump_collectives(folder: Path, rank: int) -> FlightRecord | None:
    """Write `collectives-rank<rank>-<time>.json` into `folder`. On any thread; waits for no other rank.

    Returns:
        None where no collective was recorded: there is no group, or recording is off.

    Raises:
        OSError: it cannot be written.
    """
    found = _recorded()
    if found is None:
        return None
    path = folder / f"collectives-rank{rank}-{time.time_ns()}.json"
    write_atomic(path, found)
    newest = max(json.loads(found)["entries"], key=lambda entry: entry["record_id"])
    sizes = " ".join(str(size) for size in newest["input_sizes"][:3])
    return FlightRecord(path, f"{newest['collective_seq_id']} {newest['profiling_name']} {sizes}".strip())


def _recorded() -> bytes | None:
    """What NCCL's recorder has where there are GPUs, else that of the other backends."""
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump: Callable[[], bytes] | None = getattr(_distributed_c10d, name, None)
        if dump is not None and json.loads(found := dump()).get("entries"):
            return found
    return None
