"""The checkpoint store as a storage of `torch.distributed.checkpoint` (DCP), for any user of DCP.

For `dcp.save(state, storage_writer=ObsinfraWriter(path))` and `dcp.load(state, storage_reader=...)`. Every
rank writes its own shards at the same time, rank 0 commits one manifest for all. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from obsinfra.backup.dcp_document import Stored, document_of, metadata_of
from obsinfra.backup.dcp_values import (
    ObsinfraLoadPlanner,
    ObsinfraSavePlanner,
    load_value,
    resolve_value,
)
from obsinfra.backup.file_layer import FileLayer
from obsinfra.backup.manifest import DISTRIBUTED, Head, Manifest, TensorEntry
from obsinfra.backup.store import CheckpointStore, RawTensor
from obsinfra.backup.tensors import code_versions, named_dtype, raw_tensor
from obsinfra.errors import CheckpointError
from obsinfra.monitoring.logging_config import get_logger

__all__ = ["ObsinfraLoadPlanner", "ObsinfraReader", "ObsinfraSavePlanner", "ObsinfraWriter"]

KINDS = ("regular", "emergency", "best", "final")

LONG_VALUE_BYTES = 64 * 2**10
"""A longer value goes into chunks; a shorter one into the manifest, which spares a file and its fsync."""


class ObsinfraWriter(StorageWriter):
    """Saves one checkpoint, of however many ranks, into a checkpoint store that all of them reach.

    A save that fails on any rank, or whose process dies, leaves the store's checkpoints as they were; chunks
    that it wrote are reused by the next save or removed by a later `collect`. While a save is under way,
    others may save into the same store and prune it; the chunks of what they prune go at a later prune.

    Args:
        path: the store's folder; created when needed. A `checkpoint_id` given to `dcp.save` replaces it.
        kind: `regular`, `emergency`, `best` or `final`.
        step, epoch: where training is.
        metrics: numbers known now.
        reason: why it is made.
        run: run id.
        attributes: further JSON facts for the manifest.
        resumable: for states by `dcp_state.flat_state`: whether a run goes on from it without being asked to
            by name. None: a state of your own.
        files: how writes reach the disk; for fault injection.

    Attributes:
        saved: on the coordinator after a save, its manifest. Every rank finds the path in what `dcp.save`
            returns, as `storage_meta.checkpoint_id`.

    Raises:
        CheckpointError: the attributes are not JSON.
        ValueError: an unknown kind.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        kind: str = "regular",
        step: int = 0,
        epoch: int = 0,
        metrics: Mapping[str, float] | None = None,
        reason: str | None = None,
        run: str = "",
        attributes: Mapping[str, Any] | None = None,
        resumable: bool | None = None,
        files: FileLayer | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}; expected one of {', '.join(KINDS)}")
        # `BackupSystem.load` passes over what is not resumable: the state is then the user's own.
        facts = {**(attributes or {}), "format": DISTRIBUTED, "resumable": bool(resumable)}
        if resumable is not None:
            facts["trainer"] = True
        self._head = Head(run, kind, step, epoch, metrics or {}, reason, facts, code_versions())
        self._files = files
        self._store = CheckpointStore(Path(path), files)
        self._sharing: AbstractContextManager[None] | None = None
        self.saved: Manifest | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another checkpoint; `checkpoint_id` is the store's folder."""
        self._end_sharing()
        if checkpoint_id is not None:
            self._store = CheckpointStore(Path(checkpoint_id), self._files)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin a save.

        Raises:
            CheckpointError: `use_collectives=False`, with which nobody knows when all ranks are done.
        """
        self._end_sharing()
        self.saved = None
        if not kwargs.get("use_collectives", True):
            raise CheckpointError(
                "use_collectives=False", "use_collectives=True: one manifest is committed for all ranks"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is.

        Raises:
            CheckpointError: a tensor is sparse.
        """
        for item in plan.items:
            if item.tensor_data is not None and item.tensor_data.properties.layout != torch.strided:
                raise CheckpointError(
                    f"{item.index.fqn} is a {item.tensor_data.properties.layout} tensor", "a dense one"
                )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator, before any rank writes: from here on no chunk is removed.

        Raises:
            CheckpointError: too little free space for all ranks together.
        """
        with self._store.writing():
            pass  # it removes what a save that died has left half done, unless another is under way
        self._sharing = self._store.sharing()
        self._sharing.__enter__()
        try:
            self._store.check_space(sum(_planned_bytes(item) for plan in plans for item in plan.items))
        except BaseException:
            self._end_sharing()
            raise
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items; when this returns they are durable.

        Raises:
            CheckpointError: a value that cannot be stored, named. Values come first: nothing is written then.
            OSError: the disk failed.
        """
        values = [item for item in plan.items if item.type == WriteItemType.BYTE_IO]
        tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        try:
            # The coordinator alone shares until the commit; a rank of its own, so that no one tidies its
            # temporary files away should the coordinator die.
            with self._store.sharing():
                texts = [resolve_value(planner, item) for item in values]
                results = [
                    *(self._write_value(item, text) for item, text in zip(values, texts, strict=True)),
                    *(self._write_tensor(item, planner) for item in tensors),
                ]
                entries = [result.storage_data.entry for result in results if result.storage_data.entry]
                self._store.objects.sync({digest for entry in entries for digest in entry.chunks})
        except BaseException:
            self._end_sharing()  # `finish` will not be called
            raise
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_tensor(self, item: WriteItem, planner: SavePlanner) -> WriteResult:
        tensor = planner.resolve_data(item)
        planned = tuple(item.tensor_data.chunk.sizes) if item.tensor_data else None
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != planned:
            raise CheckpointError(
                f"{item.index.fqn} is not the planned tensor of shape {planned}", "what was planned"
            )
        if tensor.is_quantized or tensor.layout != torch.strided:
            raise CheckpointError(f"{item.index.fqn} is quantized or sparse", "a dense tensor")
        return self._write(item, raw_tensor(tensor))

    def _write_value(self, item: WriteItem, text: bytes) -> WriteResult:
        if len(text) < LONG_VALUE_BYTES:
            kept = Stored(None, text.decode("ascii"), self._store.chunk_bytes)
            return WriteResult(item.index, len(text), kept)
        return self._write(item, RawTensor("uint8", (len(text),), memoryview(text)))

    def _write(self, item: WriteItem, raw: RawTensor) -> WriteResult:
        # A rank that fails does not take its chunks back: others may have found them and count on them.
        entry, _ = self._store.write_tensor(raw, [])
        return WriteResult(item.index, entry.nbytes, Stored(entry, None, self._store.chunk_bytes))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, once every rank's items are durable: commit. `metadata` gets the path and id.

        Raises:
            CheckpointError: a chunk or an item is missing; the store is as it was.
            OSError: the disk failed; the store is as it was.
        """
        try:
            stored = {result.index: result.storage_data for rank in results for result in rank}
            document, entries = document_of(metadata, stored, self._store.chunk_bytes)
            attributes = {**self._head.attributes, "world_size": len(results)}
            head = dataclasses.replace(self._head, attributes=attributes)
            with self._store.writing():
                self.saved = self._store.commit_shared(head, document, entries)
        finally:
            self._end_sharing()
        metadata.storage_data = stored
        metadata.storage_meta = StorageMeta(checkpoint_id=str(self.saved.path), save_id=self.saved.id)

    def _end_sharing(self) -> None:
        """Let chunks be removed again. When another rank fails nobody tells us: then the next save through
        this object does it, or its end; until then only garbage stays."""
        if self._sharing is not None:
            sharing, self._sharing = self._sharing, None
            sharing.__exit__(None, None, None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it can be a folder."""
        return "://" not in os.fspath(checkpoint_id)


class ObsinfraReader(StorageReader):
    """Loads a checkpoint that `ObsinfraWriter` saved, into however many ranks. Each reads only the chunks it
    needs, every one verified.

    Args:
        path: the store's folder. A `checkpoint_id` given to `dcp.load` replaces it, or names a manifest.
        checkpoint: a manifest's path; None takes the newest sound distributed checkpoint.
        verify: to be sound, every chunk of the newest must have the content its name says, which each rank
            reads in full; False trusts it, and a damaged chunk fails the load when it is come upon.

    Attributes:
        loaded: the manifest that was chosen, once there is one.
    """

    def __init__(
        self, path: Path | str, checkpoint: Path | str | None = None, *, verify: bool = True
    ) -> None:
        self._store = CheckpointStore(Path(path))
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._verify = verify
        self._items: dict[Any, Stored] = {}
        self._log = get_logger("system")
        self.loaded: Manifest | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another load; `checkpoint_id` is the store's folder or a manifest's path."""
        self.loaded = None
        if checkpoint_id is not None and (given := Path(checkpoint_id)).is_file():
            self._store, self._checkpoint = CheckpointStore(given.parent.parent), given
        elif checkpoint_id is not None:
            self._store, self._checkpoint = CheckpointStore(given), None

    # Not `**kwargs`: DCP would take that for metadata kept by each rank, and ask again when there is none.
    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Choose the checkpoint and read its metadata.

        Raises:
            CheckpointError: the named one is damaged or of another format, or there is no sound one.
        """
        if self._checkpoint is not None:
            self.loaded = self._store.read_manifest(self._checkpoint)
            return metadata_of(self.loaded)
        seen: set[Path] = set()
        problems: dict[Path, str] = {}
        # A writer may prune what was listed while it is being read; what it saved instead is there then.
        while fresh := [path for path in self._store.manifest_paths() if path not in seen]:
            seen.update(fresh)
            for manifest in reversed(self._distributed(fresh, problems)):
                try:
                    metadata = metadata_of(manifest)
                    if self._verify:
                        self._store.verify(manifest)
                except CheckpointError as error:
                    problems[manifest.path] = str(error)
                    continue
                for path, problem in problems.items():
                    if path.name >= f"{manifest.step:012d}" and path.exists():
                        self._log.warning("damaged_checkpoint_skipped", path=str(path), problem=problem)
                self.loaded = manifest
                return metadata
        damaged = [problem for path, problem in problems.items() if path.exists()]
        raise CheckpointError(
            f"no sound distributed checkpoint in {self._store.root}"
            + (f" ({len(damaged)} damaged: {damaged[0]})" if damaged else ""),
            "at least one, saved with ObsinfraWriter",
        )

    def _distributed(self, paths: list[Path], problems: dict[Path, str]) -> list[Manifest]:
        """The distributed ones, oldest first; why others cannot be read goes into `problems`."""
        found = []
        for path in paths:
            try:
                manifest = self._store.read_manifest(path)
            except CheckpointError as error:
                problems[path] = str(error)
                continue
            if manifest.distributed:
                found.append(manifest)
        return sorted(found, key=lambda manifest: (manifest.step, manifest.created_at))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Begin reading."""
        self._items = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan, marked with the checkpoint it is for."""
        return dataclasses.replace(plan, storage_data=self._manifest().path.name)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are.

        Raises:
            CheckpointError: ranks chose differently, as one was committed or damaged meanwhile.
        """
        if len(chosen := {str(plan.storage_data) for plan in plans}) > 1:
            raise CheckpointError(
                f"the ranks chose different checkpoints: {', '.join(sorted(chosen))}",
                "the same one on every rank",
                "load again, or name one: ObsinfraReader(path, checkpoint=...)",
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for into the planner's tensors.

        Raises:
            CheckpointError: a chunk is absent or damaged, or a value is not for this planner; it is named.
        """
        for item in sorted(plan.items, key=lambda item: item.type != LoadItemType.BYTE_IO):
            stored = self._items[item.storage_index]
            if item.type == LoadItemType.BYTE_IO:
                load_value(planner, item, self._text(item, stored))
                continue
            target = planner.resolve_tensor(item).detach()
            if target.shape != item.lengths:
                raise CheckpointError(
                    f"{item.dest_index.fqn} takes {tuple(target.shape)}", f"{tuple(item.lengths)}, as planned"
                )
            target.copy_(self._part(item, stored, item.storage_offsets, item.lengths))
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _text(self, item: ReadItem, stored: Stored) -> bytes:
        if stored.text is not None:
            return stored.text.encode("ascii")
        length = stored.entry.shape if stored.entry else ()
        return bytes(self._part(item, stored, torch.Size([0]), torch.Size(length)).numpy())

    def _part(self, item: ReadItem, stored: Stored, offsets: torch.Size, lengths: torch.Size) -> Tensor:
        """A box of a shard, from the chunks between its first and its last element. CPU, strided."""
        entry = stored.entry
        if entry is None:
            raise CheckpointError(f"{item.storage_index.fqn} is not a tensor", "one")
        dtype = named_dtype(entry.dtype)
        if 0 in lengths:
            return torch.empty(lengths, dtype=dtype)
        strides = [math.prod(entry.shape[dim + 1 :]) for dim in range(len(entry.shape))]
        first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
        last = first + sum((length - 1) * stride for length, stride in zip(lengths, strides, strict=True))
        data = self._bytes(
            item, entry, stored.chunk_bytes, first * dtype.itemsize, (last + 1) * dtype.itemsize
        )
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).as_strided(lengths, strides)

    def _bytes(self, item: ReadItem, entry: TensorEntry, chunk_bytes: int, begin: int, end: int) -> bytearray:
        """Bytes `begin` to `end` of an entry; only the chunks they are in are read."""
        name = f"{self._manifest().path.name}: {item.storage_index.fqn}"
        data = bytearray()
        for number in range(begin // chunk_bytes, math.ceil(end / chunk_bytes)):
            start = number * chunk_bytes
            chunk = self._store.objects.read(entry.chunks[number], name)
            if len(chunk) != min(chunk_bytes, entry.nbytes - start):
                raise CheckpointError(
                    f"{name}: chunk {number} has {len(chunk)} bytes", "what its place takes"
                )
            data += memoryview(chunk)[max(0, begin - start) : end - start]
        return data

    def _manifest(self) -> Manifest:
        if self.loaded is None:
            raise CheckpointError("nothing is being loaded", "read_metadata called before")
        return self.loaded

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it can be a folder or a file."""
        return "://" not in os.fspath(checkpoint_id)


def _planned_bytes(item: WriteItem) -> int:
    """Size of one planned shard; values count as nothing."""
    if item.tensor_data is None:
        return 0
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
