"""What checkpoints cost on disk: since they share chunks, what one needs is not what its removal frees.

Called by `obsinfra checkpoints du`. Knows no tensors and no torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from obsinfra.backup import tags
from obsinfra.backup.manifest import Manifest
from obsinfra.backup.objects import digest_of
from obsinfra.backup.store import CheckpointStore


@dataclass(frozen=True, slots=True)
class CheckpointUsage:
    """One checkpoint's bytes on disk.

    Attributes:
        unique_bytes: of chunks only it needs: what its removal frees.
        shared_bytes: of chunks that others need too.
    """

    manifest: Manifest
    unique_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """A whole store's bytes on disk, manifests left out.

    Attributes:
        checkpoints: oldest first.
        total_bytes: of all chunks.
        unreferenced_bytes: of chunks that no readable manifest names; `collect` removes them.
    """

    checkpoints: tuple[CheckpointUsage, ...]
    total_bytes: int
    unreferenced_bytes: int


def usage(store: CheckpointStore) -> StoreUsage:
    """Measure a store by the sizes of its files; nothing is read but manifests."""
    sizes: Counter[str] = Counter()
    if store.objects.root.is_dir():
        for path in store.objects.all():
            try:
                sizes[digest_of(path.name)] += path.stat().st_size
            except FileNotFoundError:
                continue  # pruned meanwhile
    manifests = tags.readable(store)
    users = Counter(digest for manifest in manifests for digest in manifest.chunks())
    found = []
    for manifest in manifests:
        chunks = manifest.chunks()
        unique = sum(sizes[digest] for digest in chunks if users[digest] == 1)
        shared = sum(sizes[digest] for digest in chunks if users[digest] > 1)
        found.append(CheckpointUsage(manifest, unique, shared))
    unreferenced = sum(size for digest, size in sizes.items() if digest not in users)
    return StoreUsage(tuple(found), sum(sizes.values()), unreferenced)
