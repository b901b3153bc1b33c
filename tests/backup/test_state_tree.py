"""What goes into a checkpoint comes out of it, to the last bit; what cannot is refused by name."""

from __future__ import annotations

import collections
import json
import os
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from faulty_files import QuickFiles
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from same import same
from torch import nn

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.state_tree import decode, encode
from obsinfra.errors import CheckpointError

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
]
VIEWS = {
    "plain": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.permute(tuple(reversed(range(tensor.dim())))),
    "every other": lambda tensor: tensor[..., ::2] if tensor.dim() else tensor,
    "expanded": lambda tensor: tensor.unsqueeze(0).expand(3, *tensor.shape),
    "conjugate": lambda tensor: tensor.conj(),
    "imaginary part": lambda tensor: tensor.conj().imag if tensor.is_complex() else tensor,
    "parameter": lambda tensor: nn.Parameter(tensor) if tensor.dtype.is_floating_point else tensor,
}


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = int(np.prod(shape))
    data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype is torch.bool:
        data = bytes(byte % 2 for byte in data)
    tensor = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    )
    return VIEWS[draw(st.sampled_from(sorted(VIEWS)))](tensor.view(dtype).reshape(shape))


PLAIN_DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(),
    hnp.unsigned_integer_dtypes(),
    hnp.floating_dtypes(sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(sizes=(64, 128)),
)
KEYS = st.one_of(st.text(max_size=5), st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False))
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(2**52, 2**54),
    st.floats(),
    st.text(max_size=10),
    st.binary(max_size=10),
    tensors(),
    hnp.arrays(PLAIN_DTYPES, hnp.array_shapes(min_dims=0, min_side=0, max_side=3)),
    PLAIN_DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, ()).map(lambda array: array[()])),
)
STATES = st.recursive(
    LEAVES,
    lambda inside: st.one_of(
        st.lists(inside, max_size=4),
        st.lists(inside, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=5) | st.just("$"), inside, max_size=4),
        st.dictionaries(KEYS, inside, max_size=4),
    ),
    max_leaves=12,
)


def through_json(state: Any) -> Any:
    document, found = encode(state)
    text = json.dumps(document, allow_nan=False)
    return decode(json.loads(text), [tensor.resolve_conj() for tensor in found])


def test_a_tensor_in_several_places_is_kept_once_and_comes_back_as_one() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    linear = nn.Linear(3, 3)
    state = {"a": weight, "b": [weight, weight.view(2, 3)], "c": linear.weight, "d": linear.weight.data}
    kept = encode(state)[1]
    assert [tuple(tensor.shape) for tensor in kept] == [(2, 3), (3, 3)]
    back = through_json(state)
    assert back["a"] is back["b"][0] and back["a"] is back["b"][1] and back["c"] is back["d"]
    assert same(state["b"], back["b"])


@pytest.mark.parametrize(
    "other",
    [
        lambda tensor: tensor[:1],
        lambda tensor: tensor.t(),
        lambda tensor: tensor.reshape(1, 4),
        lambda tensor: tensor.conj(),
        lambda tensor: tensor.clone(),
        lambda tensor: tensor.real,
        lambda tensor: tensor[:0],
    ],
)
def test_other_views_of_a_tensor_are_kept_apart(other: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = torch.randn(2, 2, dtype=torch.complex64)
    assert len(encode([tensor, other(tensor)])[1]) == 2


@settings(max_examples=300, deadline=None)
@given(STATES)
@example(2**53)
@example(2**53 + 1)
@example(-(2**53) - 1)
@example(1 << 20_000)
@example(float("nan"))
@example(-0.0)
@example({"$": "tensor", "tensor": 7})
@example({"$": None})
@example(torch.arange(2, dtype=torch.int16)[::2])
@example(os.fsdecode(b"runs/\xff"))
@example({1: "one", "True": "text", None: [], 0.5: float("-inf"), 2**70: ()})
def test_any_state_comes_back_exactly_through_the_store(state: Any) -> None:
    with TemporaryDirectory() as folder:
        backup = create_backup_system(folder, files=QuickFiles())
        backup.save({"it": state}, step=1, epoch=0)
        assert same({"it": state}, backup.load().state)


@settings(max_examples=100, deadline=None)
@given(STATES)
def test_the_document_is_strict_json(state: Any) -> None:
    assert same(state, through_json(state))


def test_subclasses_come_back_as_the_plain_type() -> None:
    class Point(NamedTuple):
        x: int
        y: float

    state = {
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": collections.defaultdict(list, x=[1]),
        "point": Point(1, 2.0),
        "array": bytearray(b"ab"),
        "text": np.str_("np"),
    }
    assert same(
        {"ordered": {"b": 1, "a": 2}, "default": {"x": [1]}, "point": (1, 2.0), "array": b"ab", "text": "np"},
        through_json(state),
    )


def test_a_numpy_key_is_its_number() -> None:
    state = {"first": torch.zeros(2), np.int64(3): "a", np.float64(0.5): "b", np.bool_(True): "c"}
    found = through_json(state)
    assert list(found) == ["first", 3, 0.5, True]
    assert [type(key) for key in found] == [str, int, float, bool]


def test_arrays_of_another_byte_order_keep_their_numbers() -> None:
    found = through_json(np.array([1.5, -2.0], ">f4"))
    assert found.dtype == np.float32 and found.tolist() == [1.5, -2.0]


def test_a_read_only_array_is_saved_without_a_warning() -> None:
    array = np.arange(4)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert through_json(array).tolist() == [0, 1, 2, 3]


class Thing:
    """Of no plain type."""


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (Thing(), "Thing"),
        ({1, 2}, "set"),
        (1j, "complex"),
        (len, "builtin"),
        (datetime(2025, 1, 1), "datetime"),
        (np.array(["text"]), "<U4"),
        (np.array([None]), "object"),
        (np.datetime64("2025-01-01"), "datetime64"),
        (np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), "'a'"),
        (np.bytes_(b"x"), "S1"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(3, device="meta"), "meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_stored_is_named_with_its_place(tmp_path: Path, value: object, what: str) -> None:
    backup = create_backup_system(tmp_path / "store")
    state = {"model": torch.ones(3), "optimizer": {"groups": [0, ({2: value},)]}}
    with pytest.raises(CheckpointError) as caught:
        backup.save(state, step=1, epoch=0)
    assert "state.optimizer.groups[1][0][2]" in str(caught.value)
    assert what in str(caught.value)
    assert backup.list() == [] and backup.verify() == []
    assert not [path for path in (tmp_path / "store" / "objects").rglob("*") if path.is_file()]


@pytest.mark.parametrize("key", [(0, 1), b"x", Thing, np.datetime64("2025-01-01")])
def test_a_key_that_cannot_be_stored_is_named_with_its_place(key: Any) -> None:
    with pytest.raises(CheckpointError, match=r"state\.groups\[0\] has a key"):
        encode({"groups": [{key: 1}]})


@pytest.mark.parametrize(
    "document",
    [
        {"$": "tensor", "tensor": 1},
        {"$": "tensor"},
        {"$": "unheard of"},
        {"$": "int", "text": "twelve"},
        {"$": "bytes", "base64": "not base64!"},
        {"$": "map", "items": [[[], 1]]},
        {"$": "map", "items": [1]},
        {"$": ["tensor"]},
    ],
)
def test_a_malformed_document_is_refused(document: Any) -> None:
    with pytest.raises(CheckpointError, match="malformed"):
        decode({"deep": [document]}, [torch.zeros(1)])


def test_an_integer_saved_in_decimal_is_still_read() -> None:
    assert decode({"$": "int", "text": "-36893488147419103232"}, []) == -(2**65)
