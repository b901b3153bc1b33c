"""A distributed checkpoint as one nested state in this process, its shards put together: for export and diff.

Called by `export` and the CLI. A training loads with `dcp.load` instead, each rank only what it needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from obsinfra.backup.dcp_document import Stored, metadata_of
from obsinfra.backup.dcp_values import value_of
from obsinfra.backup.manifest import Manifest
from obsinfra.backup.store import CheckpointStore
from obsinfra.backup.tensors import read_state, read_tensor
from obsinfra.errors import CheckpointError


def read_any_state(store: CheckpointStore, manifest: Manifest) -> Any:
    """The whole state of a checkpoint of either kind, with CPU tensors, every chunk verified.

    That of a distributed one is nested as it was given to `dcp.save`; sharded tensors come back whole. Of a
    dict whose keys are integers DCP's metadata knows no more than of a list: it comes back as a list.

    Raises:
        CheckpointError: a chunk is absent or damaged, or the manifest contradicts itself.
    """
    own = manifest.distributed and not manifest.in_parts
    return read_whole(store, manifest) if own else read_state(store, manifest)


def read_whole(store: CheckpointStore, manifest: Manifest) -> dict[str, Any]:
    """The state of a distributed checkpoint; as `read_any_state`."""
    metadata = metadata_of(manifest)
    flat: dict[str, Any] = {}
    for fqn, kept in metadata.state_dict_metadata.items():
        if isinstance(kept, TensorStorageMetadata):
            flat[fqn] = _assembled(store, manifest, metadata, fqn, kept)
        else:
            flat[fqn] = value_of(_text(store, manifest, metadata.storage_data[MetadataIndex(fqn)]))
    if not metadata.planner_data:  # saved by a planner that does not flatten
        return flat
    try:
        return dict(unflatten_state_dict(flat, metadata.planner_data))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{manifest.path.name} is malformed: {error!r}", "names that fit its items"
        ) from error


def _assembled(
    store: CheckpointStore, manifest: Manifest, metadata: Metadata, fqn: str, kept: TensorStorageMetadata
) -> Tensor:
    """A tensor of all its shards."""
    shards = [
        (shard, read_tensor(store, metadata.storage_data[MetadataIndex(fqn, shard.offsets)].entry, manifest))
        for shard in kept.chunks
    ]
    if len(shards) == 1 and shards[0][1].shape == kept.size:
        return shards[0][1]
    whole = torch.empty(kept.size, dtype=kept.properties.dtype)
    for shard, part in shards:
        target = whole
        for dim, (offset, size) in enumerate(zip(shard.offsets, shard.sizes, strict=True)):
            target = target.narrow(dim, offset, size)
        target.copy_(part)
    if sum(part.numel() for _, part in shards) != whole.numel():
        raise CheckpointError(
            f"{manifest.path.name}: the shards of {fqn} do not make up its shape {tuple(kept.size)}",
            "every element once",
        )
    return whole


def _text(store: CheckpointStore, manifest: Manifest, stored: Stored) -> bytes:
    """The JSON of a value: short ones are in the manifest, long ones in chunks."""
    if stored.entry is None:
        return (stored.text or "").encode("ascii")
    return bytes(store.read_tensor(stored.entry, manifest))
