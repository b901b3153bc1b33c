"""Batches over a data set: the same order everywhere, resumed at the exact batch, workers or none."""

from __future__ import annotations

import os
import signal
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset

from obsinfra.errors import DataError
from obsinfra.optimization.data_order import derived_seed
from obsinfra.workloads.batches import MapBatches
from obsinfra.workloads.protocol import Batches


class Squares(Dataset[Tensor]):
    """Its own index, squared."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index * index)


def batches(samples: int = 23, batch_size: int = 4, seed: int = 0, **others: Any) -> MapBatches:
    return MapBatches(
        Squares(samples), **{"batch_size": batch_size, "seed": seed, "kind": "squares", **others}
    )


def take(source: Batches, count: int) -> list[list[int]]:
    """The next `count` batches, over the ends of epochs."""
    taken: list[list[int]] = []
    while len(taken) < count:
        for batch in source:
            taken.append(batch.tolist())
            if len(taken) == count:
                break
    return taken


def flat(parts: list[list[int]]) -> list[int]:
    return [value for part in parts for value in part]


def test_an_epoch_is_every_sample_once_in_another_order_than_the_last() -> None:
    source = batches()
    assert isinstance(source, Batches) and source.phase == "data" and len(source) == 6
    epochs = [[batch.tolist() for batch in source] for _ in range(3)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [4, 4, 4, 4, 4, 3]
        assert sorted(flat(epoch)) == [index * index for index in range(23)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_smaller_last_batch_can_be_left_out() -> None:
    source = batches(drop_last=True)
    assert len(source) == 5 and [len(batch) for batch in source] == [4] * 5


def test_short_epochs_go_through_one_pass_before_the_next_begins() -> None:
    """Nothing is seen twice before everything was seen once."""
    source = batches(samples=20, batch_size=4, epoch_samples=8)
    assert len(source) == 2
    seen = flat(take(source, 10))
    everything = sorted(index * index for index in range(20))
    assert sorted(seen[:20]) == sorted(seen[20:]) == everything and seen[:20] != seen[20:]


def test_long_epochs_go_on_into_the_next_pass() -> None:
    source = batches(samples=5, batch_size=4, epoch_samples=12)
    seen = flat(take(source, 3))
    assert len(seen) == 12 and len(set(seen[:5])) == len(set(seen[5:10])) == 5


@given(
    samples=st.integers(1, 40), batch_size=st.integers(1, 15), position=st.integers(0, 60),
    epoch_samples=st.none() | st.integers(1, 50), drop_last=st.booleans(), seed=st.integers(0, 2**63),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_resumed_anywhere_the_rest_is_the_same(
    samples: int, batch_size: int, position: int, epoch_samples: int | None, drop_last: bool, seed: int
) -> None:
    def make() -> MapBatches:
        return batches(samples, batch_size, seed, epoch_samples=epoch_samples, drop_last=drop_last)

    if not len(make()):
        return
    whole = take(make(), position + 5)
    interrupted = make()
    taken = take(interrupted, position) if position else []
    resumed = make()
    resumed.load_state_dict(interrupted.state_dict())
    assert taken + take(resumed, 5) == whole


@pytest.mark.parametrize("workers", [(0, 2), (2, 0), (2, 1)])
def test_the_number_of_workers_changes_neither_order_nor_position(workers: tuple[int, int]) -> None:
    """Interrupted under one number and resumed under another; what workers loaded ahead is not lost."""
    whole = take(batches(), 11)
    before, after = workers
    interrupted = batches(num_workers=before)
    taken = take(interrupted, 8)
    assert taken == whole[:8]
    resumed = batches(num_workers=after)
    resumed.load_state_dict(interrupted.state_dict())
    assert taken + take(resumed, 3) == whole


def test_the_rest_of_an_epoch_is_the_rest_and_not_a_whole_one() -> None:
    interrupted = batches()
    take(interrupted, 4)
    resumed = batches()
    resumed.load_state_dict(interrupted.state_dict())
    assert [len(list(resumed)) for _ in range(2)] == [2, 6]


def test_an_epoch_left_early_is_over() -> None:
    source = batches()
    take(source, 2)
    assert len(list(source)) == 6 and source.state_dict()["epoch"] == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_neither_asked_nor_moved(workers: int) -> None:
    torch.manual_seed(1)
    one = take(batches(num_workers=workers), 7)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert take(batches(num_workers=workers), 7) == one
    assert torch.equal(torch.get_rng_state(), before)
    assert take(batches(num_workers=workers, seed=1), 7) != one


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: batches(kind="cubes"), "kind 'cubes', this run 'squares'"),
        (lambda: batches(samples=24), "samples 24, this run 23"),
        (lambda: batches(batch_size=5), "batch_size 5, this run 4"),
        (lambda: batches(seed=1), "seed 1, this run 0"),
        (lambda: batches(epoch_samples=8), "epoch_samples 8, this run 23"),
    ],
)
def test_a_state_of_other_data_is_refused(other: Any, named: str) -> None:
    mine = batches()
    with pytest.raises(DataError) as caught:
        mine.load_state_dict(other().state_dict())
    assert named in caught.value.wrong and "resume with the same" in caught.value.fix
    assert mine.state_dict() == batches().state_dict()


def test_a_state_of_another_workload_is_refused() -> None:
    with pytest.raises(DataError, match="has kind None"):
        batches().load_state_dict({"fingerprint": "0", "epoch": 0, "position": 0})


def test_signals_to_the_process_group_leave_workers_alone() -> None:
    """Each of them, to each worker, while batches are being taken; the epoch comes out whole."""
    ours = psutil.Process()
    before = set(ours.children())
    source = iter(batches(num_workers=2))
    taken = [next(source).tolist()]
    workers = set(ours.children()) - before
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        for worker in workers:
            os.kill(worker.pid, number)
    taken += [batch.tolist() for batch in source]
    assert taken == take(batches(), 6)
    assert psutil.wait_procs(list(workers), timeout=30)[1] == [], "workers outlived their epoch"


def test_a_signal_that_comes_while_workers_start_reaches_the_trainer_alone() -> None:
    """At each fork one to the trainer and one to the worker, which must not run the trainer's handler."""
    trainer = os.getpid()
    forking = [False]

    def send() -> None:
        if forking[0]:
            os.kill(os.getpid(), signal.SIGUSR1)

    heard: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if os.getpid() != trainer:
            os._exit(1)
        heard.append(number)

    os.register_at_fork(before=send, after_in_child=send)
    previous = signal.signal(signal.SIGUSR1, handle)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        source = batches(num_workers=2)
        forking[0] = True
        iterator = iter(source)
        taken = [next(iterator).tolist()]
        forking[0] = False
        assert set(heard) == {signal.SIGUSR1}  # once, or twice where another thread lets them through
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
        assert [*taken, *(batch.tolist() for batch in iterator)] == take(batches(), 6)
    finally:
        forking[0] = False
        signal.signal(signal.SIGUSR1, previous)


def test_derived_seeds_differ_and_stay_the_same_for_good() -> None:
    """The number is pinned: another one would change the order of every run that is resumed."""
    assert derived_seed(0, "order", 0) == 7847784135914606429
    seeds = {derived_seed(seed, word, epoch) for seed in range(20) for word in "ab" for epoch in range(20)}
    assert len(seeds) == 800 and max(seeds) < 2**63
    assert derived_seed(1, 11) != derived_seed(11, 1)


def test_a_data_set_without_a_length_is_a_programming_error() -> None:
    class Endless(Dataset[int]):
        def __getitem__(self, index: int) -> int:
            return index

    with pytest.raises(TypeError, match="__len__"):
        MapBatches(Endless(), batch_size=1, seed=0, kind="endless")


@given(
    samples=st.integers(1, 60),
    batch_size=st.integers(1, 13),
    ranks=st.integers(1, 5),
    seed=st.integers(0, 3),
    drop_last=st.booleans(),
)
def test_ranks_divide_each_batch_without_overlap_or_loss(
    samples: int, batch_size: int, ranks: int, seed: int, drop_last: bool
) -> None:
    """The parts put together are the batch of one process, and each sample counts alike in the mean."""
    options = {"samples": samples, "batch_size": batch_size, "seed": seed, "drop_last": drop_last}
    whole = [batch.tolist() for batch in batches(**options)]
    divided = [batches(**options) for _ in range(ranks)]
    for rank, part in enumerate(divided):
        part.divide(rank, ranks)
    for batch, *portions in zip(whole, *divided, strict=True):
        used = [portion for portion in portions if portion.rows]
        assert [sample for portion in used for sample in portion.batch.tolist()] == batch
        assert all(portion.rows == len(portion.batch) for portion in used)
        assert all(portion.of == len(batch) for portion in portions)
        assert all(len(portion.batch) == 1 for portion in portions if not portion.rows)


def test_a_position_is_the_same_for_any_number_of_ranks() -> None:
    """Saved on two ranks, taken up by three: the next batch is the next batch."""
    whole = batches(20, 5)
    before = iter(whole)
    next(before)
    two = batches(20, 5)
    two.divide(0, 2)
    next(iter(two))
    assert two.state_dict() == whole.state_dict()
    three = [batches(20, 5) for _ in range(3)]
    for rank, part in enumerate(three):
        part.divide(rank, 3)
        part.load_state_dict(two.state_dict())
    found = [sample for part in three for sample in next(iter(part)).batch.tolist()]
    assert found == next(before).tolist()
