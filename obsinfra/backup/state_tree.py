"""The codec between a nested training state and (a JSON document, a list of tensors). Nothing is pickled.

Plain JSON values stand for themselves; everything else is an object with the key `$` that names its type.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from obsinfra.errors import CheckpointError

_JSON_INT = 2**53
"""Larger integers go as text, so that any JSON reader keeps them exact."""


def encode(state: Any) -> tuple[Any, list[Tensor]]:
    """Turn `state` into a JSON-able document and the tensors it refers to by index.

    Takes nested dicts (keys: str, int, bool, None, float), lists, tuples, None, bool, int of any size, float
    (NaN and infinities too), str, bytes, dense tensors, and NumPy arrays and scalars of plain types. A tensor
    that is in several places, as tied weights are, is kept once, and `decode` puts one tensor in all of them.

    Raises:
        CheckpointError: a value of another type; it names the place.
    """
    tensors = _Tensors()
    return _encode(state, "state", tensors), tensors.kept


def decode(document: Any, tensors: list[Tensor]) -> Any:
    """The inverse of `encode`; dict subclasses come back as dict, tuple subclasses as tuple.

    Raises:
        CheckpointError: the document is not one that `encode` makes.
    """
    try:
        return _decode(document, tensors)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"state document is malformed: {error!r}", "one written by this store"
        ) from error


class _Tensors:
    """The tensors met so far, each once. All are kept alive, so that none comes to lie where another was."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def keep(self, tensor: Tensor) -> int:
        """Its number."""
        number = len(self.kept)
        first = self._numbers.setdefault(tensor.data_ptr(), number)
        if first != number and _same_elements(tensor, self.kept[first]):
            return first
        self.kept.append(tensor)
        return number


def _same_elements(one: Tensor, other: Tensor) -> bool:
    """Whether tensors that begin at the same address are the same part of it, seen in the same way."""

    def view(tensor: Tensor) -> tuple[Any, ...]:
        marks = tensor.is_conj(), tensor.is_neg()
        return tensor.device, tensor.dtype, tensor.shape, tensor.stride(), *marks

    # One without memory of its own, as a subclass that wraps others may be, is at address 0.
    return one.data_ptr() != 0 and one.numel() > 0 and view(one) == view(other)


def _encode(value: Any, path: str, tensors: _Tensors) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.generic):
        return {"$": "numpy_scalar", "tensor": tensors.keep(_as_tensor(np.array(value), path))}
    if isinstance(value, int):
        return value if -_JSON_INT <= value <= _JSON_INT else {"$": "int", "text": hex(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$": "float", "text": repr(value)}
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta:
            raise CheckpointError(
                f"{path} is a {value.layout} tensor of {value.dtype} on {value.device}",
                "a dense tensor, not quantized, with its data",
            )
        return {"$": "tensor", "tensor": tensors.keep(value.detach())}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and "$" not in value:
            return {key: _encode(item, f"{path}.{key}", tensors) for key, item in value.items()}
        pairs = [
            [_encode_key(key, path), _encode(item, f"{path}[{key!r}]", tensors)]
            for key, item in value.items()
        ]
        return {"$": "map", "items": pairs}
    if isinstance(value, list):
        return [_encode(item, f"{path}[{i}]", tensors) for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {
            "$": "tuple",
            "items": [_encode(item, f"{path}[{i}]", tensors) for i, item in enumerate(value)],
        }
    if isinstance(value, (bytes, bytearray)):
        return {"$": "bytes", "base64": base64.b64encode(bytes(value)).decode("ascii")}
    if isinstance(value, np.ndarray):
        return {"$": "ndarray", "tensor": tensors.keep(_as_tensor(value, path))}
    raise CheckpointError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}",
        "tensors, arrays, numbers, text, bytes, and dicts, lists or tuples of them",
        "leave it out of the state, or turn it into one of these in state_dict()",
    )


def _as_tensor(array: np.ndarray[Any, Any], path: str) -> Tensor:
    """The array in row-major and native byte order; a copy where it is read-only, as tensors are not."""
    try:
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    except TypeError as error:
        raise CheckpointError(
            f"{path} is of the NumPy dtype {array.dtype}", "a numeric or boolean array or scalar"
        ) from error


def _encode_key(key: Any, path: str) -> Any:
    if isinstance(key, np.generic):
        key = key.item()  # equal, with an equal hash
    if key is None or isinstance(key, (str, int, float)):
        return _encode(key, path, _Tensors())
    raise CheckpointError(f"{path} has a key {key!r} of type {type(key).__name__}", "text or a number")


def _decode(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("$")
    if kind is None:
        return {key: _decode(item, tensors) for key, item in value.items()}
    if kind == "tensor":
        return tensors[value["tensor"]]
    if kind == "map":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in value["items"]}
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in value["items"])
    if kind == "int":
        return int(value["text"], 0)
    if kind == "float":
        return float(value["text"])
    if kind == "bytes":
        return base64.b64decode(value["base64"], validate=True)
    if kind == "ndarray":
        return tensors[value["tensor"]].numpy()
    if kind == "numpy_scalar":
        return tensors[value["tensor"]].numpy()[()]
    raise ValueError(f"unknown type mark {kind!r}")
