"""How the batches of a step are cut into shares, one forward and backward pass each, and how large they are.

The trainer splits every step here, `oom_recovery` makes the shares smaller and larger. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from obsinfra.errors import CheckpointError, ConfigError
from obsinfra.optimization.arguments import whole_number

GROW_AFTER_STEPS = 200
"""Steps without a failure before twice the rows are tried: a failed try costs one step."""

LONGEST_WAIT_STEPS = 64 * GROW_AFTER_STEPS
"""A size that keeps failing is tried again at ever longer intervals, up to this."""


class Share(NamedTuple):
    """What one forward and backward pass works on.

    Attributes:
        batch: rows of a batch, or a whole one.
        weight: factor of its loss. Those of a step add up to 1, so that means over rows make that over all.
        rows: how many rows; 0 where nobody had to know.
    """

    batch: Any
    weight: float
    rows: int


class MicroBatching:
    """The size of micro-batches in force, part of every checkpoint so that a resumed run splits alike.

    Args:
        limit: rows of one forward pass at most; None: batches as the loader gives them.
        grow_after: steps without a failure before a size that was halved is doubled.
        splittable: False where a batch means something else than its rows (a contrastive loss).

    Attributes:
        limit: rows at most now.
    """

    def __init__(
        self, limit: int | None = None, *, grow_after: int = GROW_AFTER_STEPS, splittable: bool = True
    ) -> None:
        self.limit = limit
        self.splittable = splittable
        self._asked = limit
        self._grow_after = grow_after
        self._whole = 0
        self._clean_steps = 0
        self._wait_steps = grow_after
        self._grown = False

    def split(self, batches: Sequence[Any]) -> Sequence[Share]:
        """The shares of one step over `batches`, in their order.

        Each row weighs the same, also where batches or their last pieces are of different sizes. Batches
        whose rows cannot be told (`rows_of`) are not cut, and weigh the same among each other.
        """
        limit = self.limit
        if limit is None and len(batches) == 1:
            return (Share(batches[0], 1.0, 0),)
        counted = [rows_of(batch) if self.splittable else None for batch in batches]
        total = sum(rows for rows in counted if rows is not None)
        even = None in counted or total == 0
        shares = []
        for batch, rows in zip(batches, counted, strict=True):
            whole = 1.0 / len(batches)
            if rows is None or limit is None or rows <= limit:
                weight = whole if even or rows is None else rows / total
                shares.append(Share(batch, weight, rows or 0))
                continue
            for piece, size in pieces(batch, rows, limit):
                shares.append(Share(piece, whole * size / rows if even else size / total, size))
        return shares

    def can_halve(self, shares: Sequence[Share]) -> bool:
        """Whether shares smaller than these can be made."""
        return (
            self.splittable
            and all(rows_of_share(share) is not None for share in shares)
            and largest_share(shares) > 1
        )

    def halve(self, largest: int) -> int:
        """Shares of so many rows did not fit: half of them from now on. Returns the new limit."""
        if self.limit is None:
            self._whole = max(self._whole, largest)
        self._wait_steps = min(self._wait_steps * 2, LONGEST_WAIT_STEPS) if self._grown else self._grow_after
        self.limit, self._clean_steps, self._grown = -(-largest // 2), 0, False
        return self.limit

    def due_to_grow(self) -> bool:
        """A step went well; whether the waiting time for a larger size is over."""
        if self.limit == self._asked:
            return False
        self._clean_steps += 1
        return self._clean_steps >= self._wait_steps

    def grow(self) -> int | None:
        """Twice the rows, up to what was asked for. Returns the new limit."""
        assert self.limit is not None
        doubled = 2 * self.limit
        if self._asked is not None:
            self.limit = min(doubled, self._asked)
        else:
            self.limit = None if doubled >= self._whole else doubled
        self._clean_steps, self._grown = 0, True
        return self.limit

    def put_off(self) -> None:
        """There is no room to grow now: wait as long again."""
        self._clean_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """The size in force and what it takes to change it."""
        return {
            "asked": self._asked,
            "limit": self.limit,
            "whole": self._whole,
            "clean_steps": self._clean_steps,
            "wait_steps": self._wait_steps,
            "grown": self._grown,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the saved size, unless another one is asked for now than was then.

        Raises:
            CheckpointError: it is no such state.
        """
        try:
            asked, limit = state["asked"], state["limit"]
            numbers = [
                whole_number(name, state[name], least=0) for name in ("whole", "clean_steps", "wait_steps")
            ]
            grown = bool(state["grown"])
            limit = None if limit is None else whole_number("limit", limit, least=1)
        except (KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(
                f"the saved micro-batch size {state!r:.300}: {error!r}", "what state_dict() returned"
            ) from error
        if asked != self._asked:
            return
        self.limit = limit
        self._whole, self._clean_steps, self._wait_steps = numbers
        self._grown = grown


def rows_of(batch: Any) -> int | None:
    """Rows of a nested batch (tensors in tuples, lists, dicts): the first dimension all its tensors share.

    None when there is no tensor with a dimension, or they disagree: then nobody can tell what a row is.
    """
    sizes = {len(tensor) for tensor in batch_tensors(batch) if tensor.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def pieces(batch: Any, rows: int, limit: int) -> Iterator[tuple[Any, int]]:
    """A batch of `rows` rows as batches of `limit` and perhaps a smaller last one, with the rows of each.

    Tensors become views. Lists of `rows` things that hold no tensor, such as file names, are cut too;
    anything else goes into every piece.
    """
    for first in range(0, rows, limit):
        last = min(first + limit, rows)
        yield _cut(batch, rows, first, last), last - first


def batch_tensors(batch: Any) -> Iterator[Tensor]:
    """Every tensor of a nested batch."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from batch_tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from batch_tensors(value)


def _cut(batch: Any, rows: int, first: int, last: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[first:last] if batch.dim() else batch
    if isinstance(batch, dict):
        return {key: _cut(value, rows, first, last) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_cut(value, rows, first, last) for value in batch))
    if isinstance(batch, (list, tuple)):
        if len(batch) == rows and not any(tensor.dim() for tensor in batch_tensors(batch)):
            return batch[first:last]
        return type(batch)(_cut(value, rows, first, last) for value in batch)
    return batch


def rows_of_share(share: Share) -> int | None:
    """Its rows, counted now where nobody had to know before; None where they cannot be told."""
    return share.rows or rows_of(share.batch)


def largest_share(shares: Sequence[Share]) -> int:
    """Rows of the largest one."""
    return max((rows_of_share(share) or 0 for share in shares), default=0)


def has_batch_norm(model: torch.nn.Module) -> bool:
    """Whether a layer's output depends on the other rows of a micro-batch."""
    return any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())
