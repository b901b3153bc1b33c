"""Between DCP's `Metadata` and the JSON document in a manifest that stands for it.

Called by `dcp`'s writer and reader. Knows no files; what it refers to are the manifest's tensor entries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from obsinfra.backup.manifest import DISTRIBUTED, DISTRIBUTED_VERSION, Manifest, TensorEntry
from obsinfra.backup.state_tree import decode, encode
from obsinfra.backup.tensors import dtype_name, named_dtype
from obsinfra.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one item of a plan is: exactly one of the two is given.

    Attributes:
        entry: chunks of a tensor's shard, or of a long value's JSON text.
        text: the JSON text of a short value, kept in the manifest itself.
        chunk_bytes: size of each chunk of `entry` but the last.
    """

    entry: TensorEntry | None
    text: str | None
    chunk_bytes: int


def document_of(
    metadata: Metadata, stored: Mapping[MetadataIndex, Stored], chunk_bytes: int
) -> tuple[dict[str, Any], list[TensorEntry]]:
    """The JSON document of a checkpoint and the entries it refers to by number.

    Args:
        metadata: what the planner made of all ranks' plans.
        stored: what all ranks wrote.
        chunk_bytes: how large they cut chunks.

    Raises:
        CheckpointError: an item was not written, or the planner's data is not plain.
    """
    entries: list[TensorEntry] = []

    def number(index: MetadataIndex) -> int:
        entry = found(index).entry
        if entry is None:
            raise CheckpointError(f"{index.fqn} was written as a value", "a tensor, as planned")
        entries.append(entry)
        return len(entries) - 1

    def found(index: MetadataIndex) -> Stored:
        if index not in stored:
            raise CheckpointError(
                f"no rank wrote {index.fqn} at {tuple(index.offset or ())}", "every item of the plan"
            )
        return stored[index]

    items: dict[str, Any] = {}
    for fqn, kept in metadata.state_dict_metadata.items():
        if isinstance(kept, TensorStorageMetadata):
            items[fqn] = {
                "dtype": dtype_name(kept.properties.dtype),
                "size": list(kept.size),
                "requires_grad": kept.properties.requires_grad,
                "shards": [
                    {
                        "offsets": list(shard.offsets),
                        "sizes": list(shard.sizes),
                        "entry": number(MetadataIndex(fqn, shard.offsets)),
                    }
                    for shard in kept.chunks
                ],
            }
        else:
            text = found(MetadataIndex(fqn)).text
            items[fqn] = (
                {"value": json.loads(text)} if text is not None else {"entry": number(MetadataIndex(fqn))}
            )
    planner_data, tensors = encode({"planner_data": metadata.planner_data})
    if tensors:
        raise CheckpointError("the planner's own data has tensors in it", "plain values")
    document = {
        "$": DISTRIBUTED,
        "version": DISTRIBUTED_VERSION,
        "chunk_bytes": chunk_bytes,
        "items": items,
        **planner_data,
    }
    return document, entries


def metadata_of(manifest: Manifest) -> Metadata:
    """DCP's metadata of a checkpoint; its `storage_data` maps each index to a `Stored`.

    Raises:
        CheckpointError: it is not a distributed checkpoint, of a newer version, or it contradicts itself.
    """
    name = manifest.path.name
    if not manifest.distributed:
        raise CheckpointError(
            f"{name} is not a distributed checkpoint",
            "one saved with ObsinfraWriter",
            "load it with BackupSystem.load",
        )
    try:
        document = manifest.state
        if document["version"] != DISTRIBUTED_VERSION:
            raise CheckpointError(
                f"{name} has distributed format {document['version']}",
                f"format {DISTRIBUTED_VERSION}",
                "use the version of obsinfra that wrote it, or a newer one",
            )
        metadata = Metadata({}, storage_data={})
        for fqn, item in document["items"].items():
            _add(metadata, manifest.tensors, int(document["chunk_bytes"]), fqn, item)
        metadata.planner_data = decode(document["planner_data"], [])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise CheckpointError(f"{name} is malformed: {error!r}", "a distributed checkpoint") from error
    metadata.storage_meta = StorageMeta(checkpoint_id=str(manifest.path), save_id=manifest.id)
    return metadata


def _add(
    metadata: Metadata, entries: tuple[TensorEntry, ...], chunk_bytes: int, fqn: str, item: Mapping[str, Any]
) -> None:
    """Add one item of the document."""

    def stored(number: int) -> Stored:
        entry = entries[number]
        if len(entry.chunks) != math.ceil(entry.nbytes / chunk_bytes):
            raise ValueError(f"{fqn} has {len(entry.chunks)} chunks for {entry.nbytes} bytes")
        if math.prod(entry.shape) * named_dtype(entry.dtype).itemsize != entry.nbytes:
            raise ValueError(f"{fqn} has {entry.nbytes} bytes for {entry.dtype} of shape {entry.shape}")
        return Stored(entry, None, chunk_bytes)

    if "shards" not in item:
        metadata.state_dict_metadata[fqn] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(fqn)] = (
            stored(item["entry"]) if "entry" in item else Stored(None, json.dumps(item["value"]), chunk_bytes)
        )
        return
    shards = []
    for shard in item["shards"]:
        offsets, sizes = torch.Size(shard["offsets"]), torch.Size(shard["sizes"])
        found = stored(shard["entry"])
        if found.entry is None or found.entry.shape != tuple(sizes):
            raise ValueError(f"{fqn} at {tuple(offsets)} is not of shape {tuple(sizes)}")
        shards.append(ChunkStorageMetadata(offsets, sizes))
        metadata.storage_data[MetadataIndex(fqn, offsets)] = found
    properties = TensorProperties(named_dtype(item["dtype"]), requires_grad=bool(item["requires_grad"]))
    metadata.state_dict_metadata[fqn] = TensorStorageMetadata(properties, torch.Size(item["size"]), shards)
