"""The manifest of a checkpoint: everything about it but its bytes, as one sealed JSON file.

Text on disk: one line of JSON, then one line with its sha256. Knows no files, no tensors and no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from obsinfra.errors import CheckpointError

SCHEMA = 1
"""Of a checkpoint none of whose chunks is compressed: any version of obsinfra reads it."""

COMPRESSED_SCHEMA = 2
"""Of a checkpoint some of whose chunks may lie compressed. The text is the same; the number makes versions
that know of no compression say so, instead of missing the chunks, and keeps them from removing any."""

DISTRIBUTED = "dcp"
"""The type mark `$` of a distributed checkpoint's document, which `state_tree` does not know."""

DISTRIBUTED_VERSION = 1
"""Of that document's format."""


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
        schema: `SCHEMA` or `COMPRESSED_SCHEMA`.
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
    schema: int = SCHEMA

    @property
    def bytes_total(self) -> int:
        """Size of all its tensors."""
        return sum(entry.nbytes for entry in self.tensors)

    @property
    def distributed(self) -> bool:
        """Whether its state is one of `torch.distributed.checkpoint`, for `dcp` to read."""
        return isinstance(self.state, dict) and self.state.get("$") == DISTRIBUTED

    @property
    def in_parts(self) -> bool:
        """Whether it is distributed, and of a trainer: `read_state` reads it as any other."""
        return self.distributed and bool(self.attributes.get("trainer", False))

    @property
    def resumable(self) -> bool:
        """Whether a run goes on from it without being asked to by name; true unless it says otherwise."""
        return bool(self.attributes.get("resumable", True))

    def chunks(self) -> set[str]:
        """Hashes of every chunk it needs."""
        return {chunk for entry in self.tensors for chunk in entry.chunks}


@dataclass(frozen=True, slots=True)
class Head:
    """What the maker of a checkpoint knows of it before anything is written.

    Attributes:
        run, kind, step, epoch, metrics, reason, attributes, versions: as in `Manifest`.
    """

    run: str
    kind: str
    step: int
    epoch: int
    metrics: Mapping[str, float]
    reason: str | None
    attributes: Mapping[str, Any]
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        try:
            json.dumps(dict(self.attributes), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"attributes {self.attributes!r} are not JSON: {error}", "plain JSON values"
            ) from error

    def body(
        self, parent: str | None, document: Any, tensors: Sequence[TensorEntry], *, compressed: bool = False
    ) -> dict[str, Any]:
        """The manifest's JSON object, with an id and the present time.

        Args:
            compressed: whether one of the chunks is.
        """
        return {
            "schema": COMPRESSED_SCHEMA if compressed else SCHEMA,
            "id": secrets.token_hex(4),
            "run": self.run,
            "kind": self.kind,
            "step": self.step,
            "epoch": self.epoch,
            "created_at": datetime.now(UTC).isoformat(timespec="microseconds"),
            "metrics": {name: _number(float(value)) for name, value in self.metrics.items()},
            "reason": self.reason,
            "attributes": dict(self.attributes),
            "parent": parent,
            "versions": dict(self.versions),
            "tensors": [
                {
                    "dtype": entry.dtype,
                    "shape": list(entry.shape),
                    "nbytes": entry.nbytes,
                    "chunks": list(entry.chunks),
                }
                for entry in tensors
            ],
            "state": document,
        }


def file_name(body: Mapping[str, Any]) -> str:
    """Name of a manifest's file: sorts by step."""
    return f"{body['step']:012d}-{body['kind']}-{body['id']}.json"


def sealed(body: Mapping[str, Any]) -> bytes:
    """The text of a manifest's file."""
    text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")
    return text + b"\nsha256:" + hashlib.sha256(text).hexdigest().encode() + b"\n"


def unsealed(raw: bytes) -> bytes:
    """The JSON text that `sealed` made `raw` of.

    Raises:
        ValueError: it is not what its seal says.
    """
    text, _, seal = raw.partition(b"\n")
    if seal != b"sha256:" + hashlib.sha256(text).hexdigest().encode() + b"\n":
        raise ValueError("the text does not fit its seal")
    return text


def parse_manifest(raw: bytes, path: Path) -> Manifest:
    """Read and check a manifest's text.

    Raises:
        CheckpointError: damaged, malformed, of another schema, or of another checkpoint than its file is.
    """
    try:
        text = unsealed(raw)
    except ValueError as error:
        raise CheckpointError(f"manifest {path.name} is damaged", "the text its own sha256 names") from error
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise CheckpointError(f"manifest {path.name} is not a JSON object", "a checkpoint manifest")
    if body.get("schema") not in (SCHEMA, COMPRESSED_SCHEMA):
        raise CheckpointError(
            f"{path.name} has schema {body.get('schema')}",
            f"schema {SCHEMA} or {COMPRESSED_SCHEMA}",
            "use the version of obsinfra that wrote it, or a newer one",
        )
    try:
        manifest = manifest_of(path, body)
        name = file_name(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path.name} is malformed: {error!r}", "a checkpoint manifest") from error
    if path.name != name:
        raise CheckpointError(
            f"manifest {path.name} is that of {name}", "a file with its own name", "give it its name back"
        )
    return manifest


def manifest_of(path: Path, body: Mapping[str, Any]) -> Manifest:
    """The manifest whose JSON object is `body`."""
    return Manifest(
        path=path,
        id=str(body["id"]),
        run=str(body["run"]),
        kind=str(body["kind"]),
        step=int(body["step"]),
        epoch=int(body["epoch"]),
        created_at=str(body["created_at"]),
        metrics={name: _from_number(value) for name, value in body["metrics"].items()},
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
        schema=int(body["schema"]),
    )


def _number(value: float) -> Any:
    """JSON has no NaN and no infinities: they go as text, marked as `state_tree` marks them."""
    return value if math.isfinite(value) else {"$": "float", "text": repr(value)}


def _from_number(value: Any) -> float:
    return float(value["text"]) if isinstance(value, dict) else float(value)
