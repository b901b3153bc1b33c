"""Cutting a step's batches: no row lost, every row the same weight, and a size that shrinks and grows."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from obsinfra.errors import CheckpointError
from obsinfra.optimization.micro_batching import MicroBatching, pieces, rows_of


class Pair(NamedTuple):
    inputs: Tensor
    labels: Tensor


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 50))
def test_every_row_is_in_one_share_and_weighs_the_same(sizes: list[int], limit: int) -> None:
    rows = torch.arange(sum(sizes), dtype=torch.float64)
    batches = [(piece, {"same": piece}) for piece in rows.split(sizes)]
    shares = MicroBatching(limit).split(batches)
    assert torch.equal(torch.cat([share.batch[0] for share in shares]), rows)
    assert all(torch.equal(share.batch[0], share.batch[1]["same"]) for share in shares)
    assert all(len(share.batch[0]) == share.rows <= limit for share in shares)
    mean = sum(share.batch[0].mean() * share.weight for share in shares)
    torch.testing.assert_close(mean, rows.mean())
    assert sum(share.weight for share in shares) == pytest.approx(1.0)


def test_nested_batches_are_cut_with_what_goes_along() -> None:
    names = [f"image-{index}" for index in range(5)]
    batch: Any = {
        "pair": Pair(torch.arange(10).view(5, 2), torch.arange(5)),
        "names": names,
        "scale": torch.tensor(2.0),
        "kind": "digits",
    }
    assert rows_of(batch) == 5
    cut = list(pieces(batch, 5, 2))
    assert [rows for _, rows in cut] == [2, 2, 1]
    first, *_, last = (piece for piece, _ in cut)
    assert isinstance(first["pair"], Pair) and first["pair"].inputs.tolist() == [[0, 1], [2, 3]]
    assert first["names"] == names[:2] and last["names"] == names[4:]
    assert last["pair"].labels.tolist() == [4] and last["scale"] == 2.0 and last["kind"] == "digits"


@pytest.mark.parametrize(
    "batch", [torch.tensor(1.0), "text", (torch.ones(4, 2), torch.ones(3, 3)), {"number": 3}]
)
def test_what_has_no_rows_is_left_whole(batch: Any) -> None:
    assert rows_of(batch) is None
    micro_batching = MicroBatching(2)
    shares = micro_batching.split([batch, batch])
    assert [(share.batch is batch, share.weight) for share in shares] == [(True, 0.5)] * 2
    assert not micro_batching.can_halve(shares)


def test_a_loss_that_compares_rows_is_never_computed_in_pieces() -> None:
    micro_batching = MicroBatching(2, splittable=False)
    shares = micro_batching.split([torch.ones(8, 1)])
    assert len(shares) == 1 and not micro_batching.can_halve(shares)


def test_a_mean_over_tokens_is_kept_by_the_weights_docs_memory_md_has_and_not_by_rows() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 5, dtype=torch.float64)
    labels = torch.randint(5, (4, 6))
    labels[0, 1:] = labels[1, 2:] = -100  # padding: the first rows have few tokens
    whole = cross_entropy(logits.flatten(0, 1), labels.flatten())
    shares = MicroBatching(2).split([(logits, labels)])
    by_rows = sum(
        cross_entropy(some.flatten(0, 1), wanted.flatten()) * weight for (some, wanted), weight, _ in shares
    )
    terms = sum(int((labels != -100).sum()) for (_, labels), _, _ in shares)
    by_terms = sum(
        cross_entropy(some.flatten(0, 1), wanted.flatten(), reduction="sum") / terms
        for (some, wanted), _, _ in shares
    )
    torch.testing.assert_close(by_terms, whole)
    assert not torch.allclose(torch.as_tensor(by_rows), whole, rtol=1e-3)


def simulate(micro_batching: MicroBatching, room: list[int], rows: int = 64) -> list[int]:
    """Rows of the largest share that fitted, step by step, where `room` is what fits in each step."""
    sizes = []
    for fits in room:
        while True:
            shares = micro_batching.split([torch.empty(rows, 1)])
            largest = max(share.rows or rows for share in shares)
            if largest <= fits:
                break
            micro_batching.halve(largest)
        sizes.append(largest)
        if micro_batching.due_to_grow():
            micro_batching.grow()
    return sizes


def test_it_shrinks_at_once_and_grows_after_a_wait_that_doubles_with_every_failure() -> None:
    sizes = simulate(MicroBatching(grow_after=2), [20] * 20)
    # 64 and 32 do not fit. 32 is tried again after 2, 4 and 8 steps, and never done.
    assert sizes == [16] * 20
    micro_batching = MicroBatching(grow_after=2)
    assert simulate(micro_batching, [20] * 3 + [100] * 12) == [16] * 6 + [32] * 4 + [64] * 5
    assert micro_batching.limit is None


def test_it_never_grows_beyond_what_was_asked_for() -> None:
    micro_batching = MicroBatching(24, grow_after=1)
    assert simulate(micro_batching, [30, 13, 30, 30, 30]) == [24, 12, 24, 24, 24]
    assert micro_batching.limit == 24


def test_the_size_in_force_goes_with_the_checkpoint_unless_another_is_asked_for() -> None:
    one = MicroBatching(grow_after=2)
    simulate(one, [20] * 6)
    same, other = MicroBatching(grow_after=2), MicroBatching(8, grow_after=2)
    same.load_state_dict(one.state_dict())
    other.load_state_dict(one.state_dict())
    assert same.state_dict() == one.state_dict() and other.limit == 8
    room = [100] * 30
    assert simulate(same, room) == simulate(one, room)
    with pytest.raises(CheckpointError, match="micro-batch size"):
        same.load_state_dict({"limit": 3})
