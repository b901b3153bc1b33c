"""The content-addressed checkpoint store: chunks under `objects/`, one manifest per checkpoint.

A chunk is named by the hash of its content, so unchanged data is written once and every read is verified.
The rename of the manifest is the commit. Knows tensors and files, not models or loops.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obsinfra.backup.file_layer import FileLayer, OperatingSystemFiles
from obsinfra.backup.state_tree import decode, encode
from obsinfra.errors import CheckpointError

SCHEMA = 1
CHUNK_BYTES = 16 * 2**20
"""Largest chunk; a tensor's last chunk is shorter."""

SPACE_MARGIN_BYTES = 8 * 2**20
"""Left free beyond what a checkpoint needs, for manifests and logs."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in a manifest: dtype name (as `torch.<name>`), shape, size in bytes, chunk hashes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about one checkpoint but its bytes.

    Attributes:
        path: its file.
        id: unique within the store.
        run: run id, may be empty.
        kind: `regular`, `emergency`, `best` or `final`.
        step, epoch: where training was.
        created_at: ISO 8601, UTC.
        metrics: numbers known at that time.
        reason: why it was made.
        attributes: further JSON facts, e.g. `resumable`.
        parent: id of the checkpoint committed before it.
        versions: obsinfra, torch and Python that wrote it.
        state: the JSON document of `state_tree`.
        tensors: what the document refers to.
    """

    path: Path
    id: str
    run: str
    kind: str
    step: int
    epoch: int
    created_at: str
    metrics: Mapping[str, float]
    reason: str | None
    attributes: Mapping[str, Any]
    parent: str | None
    versions: Mapping[str, str]
    state: Any = field(repr=False)
    tensors: tuple[TensorEntry, ...] = field(repr=False)

    @property
    def bytes_total(self) -> int:
        """Size of all its tensors."""
        return sum(entry.nbytes for entry in self.tensors)

    def chunks(self) -> set[str]:
        """Hashes of every chunk it needs."""
        return {chunk for entry in self.tensors for chunk in entry.chunks}


class CheckpointStore:
    """A folder of checkpoints. Any number of readers; one writer at a time, which the caller ensures.

    Args:
        root: the folder; created when first written.
        files: how writes reach the disk.
    """

    def __init__(self, root: Path, files: FileLayer | None = None) -> None:
        self.root = root
        self.objects = root / "objects"
        self.manifests = root / "manifests"
        self._files = files or OperatingSystemFiles()

    def prepare(self) -> None:
        """Make the folders and remove what a crashed writer left half done. The writer calls it first."""
        for folder in (self.objects, self.manifests):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.manifest_paths():  # a manifest stands only in folders that are durable
            for folder in (self.root.parent, self.root):
                self._files.sync_folder(folder)
        for leftover in [*self.objects.glob("*.tmp"), *self.manifests.glob("*.tmp")]:
            self._files.remove(leftover)

    # ---- writing -----------------------------------------------------------------------------------

    def write(
        self,
        state: Mapping[str, Any],
        *,
        run: str,
        kind: str,
        step: int,
        epoch: int,
        metrics: Mapping[str, float],
        reason: str | None,
        attributes: Mapping[str, Any],
    ) -> tuple[Manifest, int]:
        """Commit `state`; when this returns it is durable, when it raises the store is as before.

        Returns:
            The manifest and the bytes of new chunks.

        Raises:
            CheckpointError: too little free space, or the state has something that cannot be stored.
            OSError: the disk failed.
        """
        document, tensors = encode(state)
        head = {
            "schema": SCHEMA,
            "id": secrets.token_hex(4),
            "run": run,
            "kind": kind,
            "step": step,
            "epoch": epoch,
            "created_at": datetime.now(UTC).isoformat(timespec="microseconds"),
            "metrics": encode({name: float(value) for name, value in metrics.items()})[0],
            "reason": reason,
            "attributes": _json_facts(attributes),
            "parent": self._latest_id(),
            "versions": {
                "obsinfra": version("obsinfra"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        cpu = [tensor.to("cpu") for tensor in tensors]
        self._check_space(sum(tensor.numel() * tensor.element_size() for tensor in cpu))
        made: list[Path] = []
        try:
            return self._commit(head, document, cpu, made)
        except BaseException:
            with contextlib.suppress(OSError):  # then the rest stays: harmless, and `collect` finds it
                for path in reversed(made):  # the manifest before the chunks it names
                    self._files.remove(path)
            raise

    def _commit(
        self, head: Mapping[str, Any], document: Any, tensors: list[Tensor], made: list[Path]
    ) -> tuple[Manifest, int]:
        """Write chunks, then the manifest; `made` gets every file that was not there before."""
        written = 0
        folders: set[Path] = set()
        entries = []
        for tensor in tensors:
            data = tensor_bytes(tensor)
            chunks = []
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start : start + CHUNK_BYTES]
                digest = hashlib.sha256(chunk).hexdigest()
                chunks.append(digest)
                folders.add(self._object(digest).parent)
                written += self._write_object(digest, chunk, made)
            entries.append(
                {
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape),
                    "nbytes": len(data),
                    "chunks": chunks,
                }
            )
        # Those of chunks found there too: their writer may have died before it came to this.
        for folder in (*sorted(folders), self.objects):
            self._files.sync_folder(folder)
        body = {**head, "tensors": entries, "state": document}
        path = self.manifests / f"{head['step']:012d}-{head['kind']}-{head['id']}.json"
        self._write_whole(path.with_suffix(".tmp"), path, memoryview(_sealed(body)), made)
        self._files.sync_folder(self.manifests)
        return _manifest(path, body), written

    def _write_object(self, digest: str, chunk: memoryview, made: list[Path]) -> int:
        """Write one chunk unless it is there whole; returns the bytes written."""
        target = self._object(digest)
        if self._object_is_sound(target, digest, len(chunk)):
            return 0
        target.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = self.objects / f"{digest[:16]}-{secrets.token_hex(4)}.tmp"
        self._write_whole(temporary, target, chunk, made)
        return len(chunk)

    def _write_whole(self, temporary: Path, target: Path, data: memoryview, made: list[Path]) -> None:
        made.append(temporary)
        if not target.exists():
            made.append(target)
        self._files.write(temporary, data)
        self._files.rename(temporary, target)

    def _latest_id(self) -> str | None:
        """Id of the checkpoint committed last, which need not be the one with the highest step."""
        paths = sorted(self.manifest_paths(), key=lambda path: path.stat().st_mtime_ns)
        return paths[-1].stem.rpartition("-")[2] if paths else None

    @staticmethod
    def _object_is_sound(path: Path, digest: str, size: int) -> bool:
        """Whether the chunk is there already. A damaged one is written anew, so it is read, not trusted."""
        try:
            if path.stat().st_size != size:
                return False
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError:
            return False

    def _check_space(self, needed: int) -> None:
        found = os.statvfs(self.root)
        free = found.f_bavail * found.f_frsize
        if free < needed + SPACE_MARGIN_BYTES:
            raise CheckpointError(
                f"{free / 1e6:.0f} MB free in {self.root}",
                f"{(needed + SPACE_MARGIN_BYTES) / 1e6:.0f} MB for this checkpoint",
                "free space, or keep fewer checkpoints",
            )

    # ---- reading -----------------------------------------------------------------------------------

    def manifest_paths(self) -> list[Path]:
        """Committed manifests, by step and name; nothing is read."""
        return sorted(self.manifests.glob("*.json")) if self.manifests.is_dir() else []

    def read_manifest(self, path: Path) -> Manifest:
        """Read and check one manifest.

        Raises:
            CheckpointError: absent, damaged, or of a newer schema.
        """
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}", "a checkpoint manifest") from error
        body = _unsealed(raw, path)
        if body.get("schema") != SCHEMA:
            raise CheckpointError(
                f"{path.name} has schema {body.get('schema')}",
                f"schema {SCHEMA}",
                "use the version of obsinfra that wrote it, or a newer one",
            )
        try:
            return _manifest(path, body)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path.name} is malformed: {error!r}", "a checkpoint manifest") from error

    def read(self, manifest: Manifest) -> Any:
        """The whole state, with CPU tensors, every chunk verified.

        Raises:
            CheckpointError: a chunk is absent or damaged; it names the chunk.
        """
        return decode(manifest.state, [self._read_tensor(entry, manifest) for entry in manifest.tensors])

    def verify(self, manifest: Manifest, *, only_touched: bool = False) -> None:
        """Read chunks and compare their hashes, without building tensors.

        Args:
            only_touched: leave out chunks not written to since the manifest was, when they were sound.

        Raises:
            CheckpointError: as `read`.
        """
        for digest in sorted(manifest.chunks()):
            if only_touched:
                with contextlib.suppress(OSError):
                    committed = manifest.path.stat().st_mtime_ns
                    if self._object(digest).stat().st_mtime_ns < committed:
                        continue
            self._read_object(digest, manifest)

    def _read_tensor(self, entry: TensorEntry, manifest: Manifest) -> Tensor:
        dtype = getattr(torch, entry.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{manifest.path.name} has dtype {entry.dtype!r}", "a dtype of this torch")
        if math.prod(entry.shape) * dtype.itemsize != entry.nbytes:
            raise CheckpointError(
                f"a tensor of {manifest.path.name} has {entry.nbytes} bytes",
                f"what {dtype} of shape {entry.shape} takes",
            )
        data = bytearray()
        for digest in entry.chunks:
            data += self._read_object(digest, manifest)
        if len(data) != entry.nbytes:
            raise CheckpointError(
                f"a tensor of {manifest.path.name} has {len(data)} bytes", f"{entry.nbytes} bytes"
            )
        if not data:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(entry.shape)

    def _read_object(self, digest: str, manifest: Manifest) -> bytes:
        path = self._object(digest)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{manifest.path.name}: chunk {digest[:12]} cannot be read: {error.strerror}", "a whole store"
            ) from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(f"{manifest.path.name}: chunk {digest[:12]} is damaged", "its own content")
        return data

    # ---- removing ----------------------------------------------------------------------------------

    def remove(self, path: Path) -> None:
        """Remove one checkpoint; its chunks stay until `collect`."""
        self._files.remove(path)
        self._files.sync_folder(self.manifests)

    def collect(self) -> int:
        """Remove chunks that no manifest names; the writer calls it, never beside a running `write`.

        A manifest that cannot be read keeps every chunk, since nobody knows what it names.

        Returns:
            How many chunks were removed.
        """
        wanted: set[str] = set()
        for path in self.manifest_paths():
            try:
                wanted |= self.read_manifest(path).chunks()
            except CheckpointError:
                return 0
        removed = 0
        for path in self._all_objects():
            if path.name not in wanted:
                self._files.remove(path)
                removed += 1
        return removed

    def _all_objects(self) -> Iterator[Path]:
        for folder in self.objects.iterdir():
            if folder.is_dir():
                yield from folder.iterdir()

    def _object(self, digest: str) -> Path:
        return self.objects / digest[:2] / digest


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in row-major order, without a copy where it is contiguous on the CPU."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # the stride of a single element may be anything
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _sealed(body: Mapping[str, Any]) -> bytes:
    """The manifest's text: one line of JSON, then one line with its sha256."""
    text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")
    return text + b"\nsha256:" + hashlib.sha256(text).hexdigest().encode() + b"\n"


def _unsealed(raw: bytes, path: Path) -> dict[str, Any]:
    text, _, seal = raw.partition(b"\n")
    if seal != b"sha256:" + hashlib.sha256(text).hexdigest().encode() + b"\n":
        raise CheckpointError(f"manifest {path.name} is damaged", "the text its own sha256 names")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise CheckpointError(f"manifest {path.name} is not a JSON object", "a checkpoint manifest")
    return body


def _json_facts(attributes: Mapping[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(facts := dict(attributes), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"attributes {attributes!r} are not JSON: {error}", "plain JSON values"
        ) from error
    return facts


def _manifest(path: Path, body: Mapping[str, Any]) -> Manifest:
    return Manifest(
        path=path,
        id=str(body["id"]),
        run=str(body["run"]),
        kind=str(body["kind"]),
        step=int(body["step"]),
        epoch=int(body["epoch"]),
        created_at=str(body["created_at"]),
        metrics=decode(body["metrics"], []),
        reason=body["reason"],
        attributes=dict(body["attributes"]),
        parent=body["parent"],
        versions=dict(body["versions"]),
        state=body["state"],
        tensors=tuple(
            TensorEntry(
                str(e["dtype"]), tuple(map(int, e["shape"])), int(e["nbytes"]), tuple(map(str, e["chunks"]))
            )
            for e in body["tensors"]
        ),
    )
