"""What registers to give memory back is asked in order, and forgotten with its owner."""

from __future__ import annotations

import gc

from obsinfra.optimization.reclaimable import (
    DATASET_CACHE_ORDER,
    PREFETCH_ORDER,
    reclaimables,
    register_reclaimable,
)


class Cache:
    def __init__(self, size: int) -> None:
        self.size = size

    def give_back(self) -> int:
        freed, self.size = self.size, 0
        return freed


def mine() -> list[str]:
    return [entry.name for entry in reclaimables() if entry.name.startswith("test ")]


def test_order_counts_then_age_and_each_says_what_it_let_go_of() -> None:
    first, second, third = Cache(5), Cache(7), Cache(9)
    register_reclaimable("test cache", DATASET_CACHE_ORDER, first.give_back)
    register_reclaimable("test later cache", DATASET_CACHE_ORDER, second.give_back)
    register_reclaimable("test prefetch", PREFETCH_ORDER, third.give_back)
    assert mine() == ["test prefetch", "test cache", "test later cache"]
    freed = [entry.reclaim() for entry in reclaimables() if entry.name.startswith("test ")]
    assert freed == [9, 5, 7]
    assert (first.size, second.size, third.size) == (0, 0, 0)


def test_an_entry_goes_with_its_owner_or_when_withdrawn() -> None:
    cache = Cache(1)
    register_reclaimable("test owned", 1, cache.give_back)
    withdraw = register_reclaimable("test function", 2, lambda: 0)
    assert mine() == ["test owned", "test function"]
    del cache
    gc.collect()
    assert mine() == ["test function"]
    withdraw()
    withdraw()
    assert mine() == []
