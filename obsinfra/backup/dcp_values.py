"""Values of a distributed checkpoint that are not tensors, as JSON, and planners that give and take them so.

DCP's own planners would pickle them; `dcp`'s writer and reader go through here instead. Knows no files.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import (
    LoadPlanner,
    ReadItem,
    SavePlanner,
    WriteItem,
    WriteItemType,
)

from obsinfra.backup.state_tree import decode, encode
from obsinfra.backup.tensors import named_dtype, raw_tensor
from obsinfra.errors import CheckpointError


class ObsinfraSavePlanner(DefaultSavePlanner):
    """DCP's default planner with JSON in place of pickles, for any storage; the one to derive planners from.

    With `ObsinfraWriter` the plain default planner does as well.
    """

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """The tensor, or a `BytesIO` with the value's JSON.

        Raises:
            CheckpointError: the value is of a type that `state_tree.encode` refuses; it is named.
        """
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(value_text(write_item.index.fqn, object))
        return object


class ObsinfraLoadPlanner(DefaultLoadPlanner):
    """The other end of `ObsinfraSavePlanner`; tensors inside of values come back on the CPU."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put the value where it belongs in the state.

        Raises:
            CheckpointError: it is not the JSON that `ObsinfraSavePlanner` makes.
        """
        _place(self, read_item.dest_index.fqn, value_of(value.getvalue()))


def resolve_value(planner: SavePlanner, item: WriteItem) -> bytes:
    """The JSON of a value that is not a tensor; whatever the planner, nothing is pickled.

    Raises:
        CheckpointError: the planner would make its own bytes of it, or it has no JSON; the item is named.
    """
    fqn = item.index.fqn
    if isinstance(planner, ObsinfraSavePlanner):
        data = planner.resolve_data(item)
        text = data.getvalue() if isinstance(data, io.BytesIO) else b""
        value_of(text)  # a subclass may do as it likes, but not bring a pickle in
        return text
    if isinstance(planner, DefaultSavePlanner) and _inherits(
        planner, DefaultSavePlanner, "resolve_data", "transform_object"
    ):
        return value_text(fqn, planner.lookup_object(item.index))
    raise CheckpointError(
        f"{fqn} is not a tensor, and {type(planner).__name__} makes bytes of it that may be a pickle",
        "JSON",
        "derive the planner from obsinfra.backup.dcp.ObsinfraSavePlanner",
    )


def load_value(planner: LoadPlanner, item: ReadItem, text: bytes) -> None:
    """Have the planner take a value; whatever the planner, nothing is unpickled.

    Raises:
        CheckpointError: the planner would read it in its own way, or the text is malformed.
    """
    fqn = item.dest_index.fqn
    if isinstance(planner, ObsinfraLoadPlanner):
        planner.load_bytes(item, io.BytesIO(text))
    elif isinstance(planner, DefaultLoadPlanner) and _inherits(planner, DefaultLoadPlanner, "load_bytes"):
        _place(planner, fqn, value_of(text))
    else:
        raise CheckpointError(
            f"{fqn} is not a tensor, and {type(planner).__name__} may take its bytes for a pickle",
            "a planner that reads JSON",
            "derive the planner from obsinfra.backup.dcp.ObsinfraLoadPlanner",
        )


def value_text(fqn: str, value: Any) -> bytes:
    """The JSON of one value: `{"value": {fqn: document}, "tensors": [{dtype, shape, base64}]}`.

    Raises:
        CheckpointError: a part of it is of a type that `state_tree.encode` refuses; it is named.
    """
    document, tensors = encode({fqn: value})
    parts = [raw_tensor(tensor) for tensor in tensors]
    kept = [
        {"dtype": part.dtype, "shape": part.shape, "base64": base64.b64encode(part.data).decode("ascii")}
        for part in parts
    ]
    return json.dumps({"value": document, "tensors": kept}, allow_nan=False).encode("ascii")


def value_of(text: bytes) -> Any:
    """The inverse of `value_text`.

    Raises:
        CheckpointError: the text is not one that `value_text` makes.
    """
    try:
        body = json.loads(text)
        tensors = [_tensor(part) for part in body["tensors"]]
        (value,) = decode(body["value"], tensors).values()
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(
            f"a value is not as stored: {error!r}", "the JSON of an ObsinfraSavePlanner"
        ) from error
    return value


def _tensor(part: Mapping[str, Any]) -> Tensor:
    dtype = named_dtype(part["dtype"])
    data = bytearray(base64.b64decode(part["base64"], validate=True))
    if not data:
        return torch.empty(part["shape"], dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(part["shape"])


def _place(planner: DefaultLoadPlanner, fqn: str, value: Any) -> None:
    """As `DefaultLoadPlanner.load_bytes` does once it has the value."""
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[fqn], value)
    else:
        planner.state_dict[fqn] = value


def _inherits(planner: object, parent: type, *methods: str) -> bool:
    return all(getattr(type(planner), name) is getattr(parent, name) for name in methods)
