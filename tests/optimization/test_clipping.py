"""Clipping does to gradients what torch's own does, to the last bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from obsinfra.optimization.clipping import clip_gradients

SHAPES = st.lists(st.sampled_from([(), (1,), (7,), (3, 5), (64, 33), (0,)]), min_size=1, max_size=6)
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCALES = st.sampled_from([0.0, 1e-8, 0.01, 1.0, 1e4, math.inf, math.nan])


def parameters_of(shapes: list[tuple[int, ...]], kinds: list[torch.dtype], seed: int) -> list[nn.Parameter]:
    chance = torch.Generator().manual_seed(seed)
    made = []
    for number, shape in enumerate(shapes):
        kind = kinds[number % len(kinds)]
        parameter = nn.Parameter(torch.zeros(shape, dtype=kind))
        parameter.grad = torch.randn(shape, generator=chance).to(kind)
        made.append(parameter)
    return made


def bits(tensor: Tensor | None) -> bytes | None:
    if tensor is None:
        return None
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@given(
    shapes=SHAPES,
    kinds=st.lists(st.sampled_from(TYPES), min_size=1, max_size=2),
    limit=st.sampled_from([1e-3, 1.0, 50.0, math.inf]),
    scale=SCALES,
    without=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_the_same_bits_as_torchs_own(
    shapes: list[tuple[int, ...]],
    kinds: list[torch.dtype],
    limit: float,
    scale: float,
    without: bool,
    seed: int,
) -> None:
    ours, theirs = (parameters_of(shapes, kinds, seed) for _ in range(2))
    for parameters in (ours, theirs):
        assert parameters[0].grad is not None
        parameters[0].grad *= scale
        if without:
            parameters[-1].grad = None
    norm, wanted = clip_gradients(ours, limit), clip_grad_norm_(theirs, limit)
    assert (bits(norm), norm.dtype) == (bits(wanted), wanted.dtype)
    assert [bits(p.grad) for p in ours] == [bits(p.grad) for p in theirs]


def test_gradients_below_the_limit_are_not_written_to() -> None:
    [parameter] = parameters_of([(4,)], [torch.float32], 0)
    assert parameter.grad is not None
    before = parameter.grad._version
    clip_gradients([parameter], 100.0)
    assert parameter.grad._version == before
    clip_gradients([parameter], 0.01)
    assert parameter.grad._version > before


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_that_have_a_graph_of_their_own_are_clipped_without_entering_it() -> None:
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    (parameter**3).sum().backward(create_graph=True)
    norm = clip_gradients([parameter], 1.0)
    assert not norm.requires_grad
    assert parameter.grad is not None
    assert torch.linalg.vector_norm(parameter.grad.detach()) == pytest.approx(1.0, abs=1e-4)


def test_nothing_to_clip() -> None:
    assert clip_gradients([nn.Parameter(torch.zeros(3))], 1.0) == 0.0
