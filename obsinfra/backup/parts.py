"""One checkpoint of several ranks: their writers each commit a part, and meet in the store's folder.

`writer` calls it for an order with a part. Chunks are durable before the others hear of a part; rank 0's
writer makes the one manifest once all are there, so that they count together or not at all.
`dcp_state.part_of` makes what lies in the slots. Never imports torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obsinfra.backup.manifest import DISTRIBUTED, DISTRIBUTED_VERSION, Head, Manifest, TensorEntry
from obsinfra.backup.slot import SlotContent
from obsinfra.backup.store import CheckpointStore, RawTensor
from obsinfra.errors import CheckpointError

PARTS_SECONDS = 600.0
"""How long a part waits for the others."""

ALONE_SECONDS = 10.0
"""How long it still waits once its own trainer is gone: those of the others may be, too."""

LEAVE_SECONDS = 5.0
"""How long rank 0 waits for the others to have read the outcome, after which chunks may be removed again."""

OUTCOME = "outcome.json"

_PAUSE_SECONDS = 0.02
"""Between two looks at files of the other ranks' writers, on other hosts perhaps: no event tells of them."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of which checkpoint.

    Attributes:
        launch, number: of a checkpoint; the same on all ranks, and of no other checkpoint of the store.
        rank, size: whose it is, of how many.
    """

    launch: str
    number: int
    rank: int
    size: int

    def folder(self, store: CheckpointStore) -> Path:
        """Where the parts meet."""
        return store.root / "parts" / f"{self.launch}-{self.number}"


def commit_part(
    store: CheckpointStore, content: SlotContent, head: Head, part: Part, gone: Callable[[], bool]
) -> tuple[Manifest, int]:
    """Commit a checkpoint together with the writers of the other ranks; returns when all of it is durable.

    Args:
        content: this rank's part. Nobody may overwrite it meanwhile.
        gone: whether this rank's trainer is.

    Returns:
        The manifest, and the bytes of new chunks of all ranks.

    Raises:
        CheckpointError: a part is missing or failed, on every rank; the store's checkpoints are as before.
        OSError: the disk failed; the store's checkpoints are as before.
    """
    folder = part.folder(store)
    with store.sharing():  # until the manifest names the chunks, nobody may remove them
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if part.rank == 0 and "path" in (told := _told(folder / OUTCOME) or {}):
            return store.read_manifest(store.manifests / told["path"]), int(told["written"])  # asked again
        try:
            _tell(folder / f"{part.rank}.json", _written(store, content))
            if part.rank == 0:
                manifest, written = _together(store, head, folder, part, gone)
                _tell(folder / OUTCOME, {"path": manifest.path.name, "written": written})
        except (OSError, CheckpointError) as error:
            _tell_failure(folder / (f"{part.rank}.json" if part.rank else OUTCOME), error)
            raise
        if part.rank > 0:
            return _outcome(store, folder, part, gone)
    _clear(folder, part)
    return manifest, written


def _written(store: CheckpointStore, content: SlotContent) -> dict[str, Any]:
    """Write this rank's chunks; what the manifest has to say of them. They are durable then."""
    store.check_space(sum(len(tensor.data) for tensor in content.tensors))
    results = [store.write_tensor(tensor, []) for tensor in content.tensors]
    values, more = {}, []
    for name, text in content.document["values"].items():
        raw = text.encode("ascii")
        entry, fresh = store.write_tensor(RawTensor("uint8", (len(raw),), memoryview(raw)), [])
        more.append(fresh)
        values[name] = _fields(entry)
    entries = [entry for entry, _ in results]
    digests = {digest for entry in entries for digest in entry.chunks}
    store.objects.sync(digests | {digest for value in values.values() for digest in value[3]})
    shards = {
        name: [[shard["offsets"], _fields(entries[shard["tensor"]["tensor"]])] for shard in own]
        for name, own in content.document["shards"].items()
    }
    written = sum(fresh for _, fresh in results) + sum(more)
    return {"items": content.document["items"], "values": values, "shards": shards, "written": written}


def _together(
    store: CheckpointStore, head: Head, folder: Path, part: Part, gone: Callable[[], bool]
) -> tuple[Manifest, int]:
    """On rank 0: wait for every part, then commit them as one."""
    found: dict[int, Mapping[str, Any]] = {}
    for _ in _waiting(gone):
        for rank in range(part.size):
            if rank not in found and (told := _told(folder / f"{rank}.json")) is not None:
                if "error" in told:
                    raise CheckpointError(f"rank {rank} could not write its part: {told['error']}")
                found[rank] = told
        if len(found) == part.size:
            break
    else:
        missing = ", ".join(str(rank) for rank in range(part.size) if rank not in found)
        raise CheckpointError(f"the part of rank {missing} did not come in time", "the parts of all ranks")
    document, entries = _document(store, found)
    attributes = {**head.attributes, "format": DISTRIBUTED, "trainer": True, "world_size": part.size}
    whole = Head(
        head.run, head.kind, head.step, head.epoch, head.metrics, head.reason, attributes, head.versions
    )
    with store.writing():
        manifest = store.commit_shared(whole, document, entries)
    return manifest, sum(int(told["written"]) for told in found.values())


def _document(
    store: CheckpointStore, found: Mapping[int, Mapping[str, Any]]
) -> tuple[dict[str, Any], list[TensorEntry]]:
    """The document of all parts, as `dcp_document` reads it, and its entries."""
    entries: list[TensorEntry] = []

    def number(fields: Any) -> int:
        dtype, shape, nbytes, chunks = fields
        entries.append(TensorEntry(dtype, tuple(shape), nbytes, tuple(chunks)))
        return len(entries) - 1

    items: dict[str, Any] = {}
    for name, item in found[0]["items"].items():
        shards = [shard for told in found.values() for shard in told["shards"].get(name, ())]
        have = sum(math.prod(fields[1]) for _, fields in shards)
        if have != math.prod(item["size"]):
            raise CheckpointError(
                f"the parts of {name} have {have} elements", f"{math.prod(item['size'])}, each once"
            )
        items[name] = {
            **item,
            "shards": [
                {"offsets": offsets, "sizes": fields[1], "entry": number(fields)}
                for offsets, fields in shards
            ],
        }
    for told in found.values():
        items |= {name: {"entry": number(fields)} for name, fields in told["values"].items()}
    return {
        "$": DISTRIBUTED,
        "version": DISTRIBUTED_VERSION,
        "chunk_bytes": store.chunk_bytes,
        "items": items,
        # Nothing is nested: each name is its own path, a tuple as `state_tree` writes it.
        "planner_data": {name: {"$": "tuple", "items": [name]} for name in items},
    }, entries


def _outcome(
    store: CheckpointStore, folder: Path, part: Part, gone: Callable[[], bool]
) -> tuple[Manifest, int]:
    """On the others: what rank 0 made of it."""
    try:
        for _ in _waiting(gone):
            if (told := _told(folder / OUTCOME)) is not None:
                if "error" in told:
                    raise CheckpointError(str(told["error"]))
                return store.read_manifest(store.manifests / told["path"]), int(told["written"])
        raise CheckpointError("rank 0 did not commit the parts in time", "a manifest of all of them")
    finally:
        (folder / f"{part.rank}.json").unlink(missing_ok=True)


def _clear(folder: Path, part: Part) -> None:
    """On rank 0, once the others have read the outcome: remove what was left of checkpoints before."""
    limit = time.monotonic() + LEAVE_SECONDS
    while time.monotonic() < limit and any(
        (folder / f"{rank}.json").exists() for rank in range(1, part.size)
    ):
        time.sleep(_PAUSE_SECONDS)
    for other in folder.parent.iterdir():
        launch, _, number = other.name.rpartition("-")
        if launch != part.launch or int(number) < part.number:  # others may be at the next one already
            shutil.rmtree(other, ignore_errors=True)


def _waiting(gone: Callable[[], bool]) -> Iterator[None]:
    """Once in every pause, until it has been long enough."""
    limit = time.monotonic() + PARTS_SECONDS
    while True:
        yield
        if gone():
            limit = min(limit, time.monotonic() + ALONE_SECONDS)
            gone = _never
        if time.monotonic() >= limit:
            return
        time.sleep(_PAUSE_SECONDS)


def _never() -> bool:
    return False


def _tell(path: Path, told: Mapping[str, Any]) -> None:
    """Whole or not at all. Not flushed: after a power cut nobody waits for it any more."""
    with contextlib.suppress(FileNotFoundError):  # given up by rank 0, and removed
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(told), encoding="ascii")
        temporary.rename(path)


def _tell_failure(path: Path, error: Exception) -> None:
    """Also where the disk takes nothing any more: an empty file says that much."""
    try:
        _tell(path, {"error": str(error)})
    except OSError:
        with contextlib.suppress(OSError):
            path.touch()


def _told(path: Path) -> dict[str, Any] | None:
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    told = json.loads(text) if text else {"error": "nothing could be written"}
    assert isinstance(told, dict)
    return told


def _fields(entry: TensorEntry) -> list[Any]:
    return [entry.dtype, list(entry.shape), entry.nbytes, list(entry.chunks)]
