"""Ranks that agree on the step something is done at: nobody misses it, whoever asks and whenever."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from waiting import wait_for

from obsinfra.errors import PeerLostError
from obsinfra.observation.agreement import Agreement, Request

STEPS = 40


class Shelf:
    """A store in one process, as torch's are between several."""

    def __init__(self) -> None:
        self.gone = False
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        with self._lock:
            self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        with self._lock:
            return self._values[key]

    def add(self, key: str, amount: int) -> int:
        if self.gone:
            raise ConnectionError("Broken pipe")
        with self._lock:
            number = int(self._values.get(key, b"0")) + amount
            self._values[key] = str(number).encode()
            return number

    def check(self, keys: list[str]) -> bool:
        if self.gone:
            raise ConnectionError("Broken pipe")
        with self._lock:
            return all(key in self._values for key in keys)


class Loop:
    """A rank's loop: a step is a collective with the others; between two it does what was agreed on.

    Attributes:
        done: (boundary, number, kind) of everything obeyed.
    """

    def __init__(
        self, rank: int, size: int, shelf: Shelf, collective: threading.Barrier, asks: dict[int, str]
    ) -> None:
        self.step, self.attention, self.paused = 0, False, False
        self.done: list[tuple[int, int, str]] = []
        self.error: BaseException | None = None
        self._collective, self._asks = collective, asks
        self._chance = random.Random(rank)
        self.agreement = Agreement(
            shelf, rank, size, step=lambda: self.step, on_notice=self._notice, patience=30.0
        )
        self.agreement.start()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _notice(self) -> None:
        self.attention = True

    def _run(self) -> None:
        try:
            while self.step < STEPS:
                self._collective.wait(timeout=60)
                self.step += 1
                if kind := self._asks.get(self.step):
                    self.agreement.post(kind, {})
                if self.attention:
                    self._boundary()
        except BaseException as error:
            self.error = error
        self.agreement.leave("finished")

    def _boundary(self) -> None:
        self._look()
        while True:
            if self.paused:
                self.agreement.hold(self.step)
            elif self.agreement.let_go():
                return
            self._look()

    def _look(self) -> None:
        self.attention = False
        for request in self.agreement.due(self.step):
            self.done.append((self.step, request.number, request.kind))
            if request.kind == "pause":
                self.paused = True
                if request.rank == 0:  # whoever paused ends it, while all are held
                    threading.Timer(
                        0.01 * self._chance.random(), lambda: self.agreement.post("resume", {})
                    ).start()
            elif request.kind == "resume":
                self.paused = False
        self.attention = self.attention or self.agreement.pending


asked = st.dictionaries(
    st.integers(1, STEPS - 10), st.sampled_from(["checkpoint", "pause", "scale_lr"]), max_size=5
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(asked, st.dictionaries(st.integers(1, STEPS - 10), st.just("signal"), max_size=2), st.integers(2, 4))
def test_all_ranks_do_the_same_at_the_same_boundary(
    first: dict[int, str], last: dict[int, str], size: int
) -> None:
    """Whichever ranks ask, at whatever step, and whether the loops are held or run."""
    shelf, collective = Shelf(), threading.Barrier(size)
    asks = [first, *({} for _ in range(size - 2)), last]
    loops = [Loop(rank, size, shelf, collective, asks[rank]) for rank in range(size)]
    for loop in loops:
        loop.thread.start()
    for loop in loops:
        loop.thread.join(timeout=60)
    assert [loop.error for loop in loops] == [None] * size
    assert [loop.step for loop in loops] == [STEPS] * size
    assert all(loop.done == loops[0].done for loop in loops)
    numbers = [number for _, number, _ in loops[0].done]
    assert numbers == sorted(numbers)


def test_a_request_is_done_within_a_few_steps_of_a_running_loop() -> None:
    """One that is asked for early in the run is not left for its end."""
    shelf, collective = Shelf(), threading.Barrier(2)
    loops = [Loop(rank, 2, shelf, collective, {1: "checkpoint"} if rank == 1 else {}) for rank in range(2)]
    loops[0].agreement.post("scale_lr", {})  # noticed before the first step
    wait_for(lambda: all(loop.attention for loop in loops), "both were told")
    for loop in loops:
        loop.thread.start()
    for loop in loops:
        loop.thread.join(timeout=60)
    assert loops[0].done[0] == (1, 1, "scale_lr")
    assert loops[0].done == loops[1].done


def test_a_rank_that_does_not_answer_is_named() -> None:
    """The loop that waits for it does not wait for ever."""
    shelf = Shelf()
    told = threading.Event()
    agreement = Agreement(shelf, 0, 2, step=lambda: 7, on_notice=told.set, patience=0.2)
    agreement.start()
    agreement.post("checkpoint", {})
    assert told.wait(30)
    with pytest.raises(PeerLostError, match=r"rank 1 did not answer for 0 s .*checkpoint"):
        agreement.due(7)
    agreement.leave("failed")


def test_a_store_that_went_with_its_launcher_ends_the_loop_at_its_next_boundary() -> None:
    shelf, noticed = Shelf(), threading.Event()
    agreement = Agreement(shelf, 0, 2, step=lambda: 7, on_notice=noticed.set, lost_seconds=0.2)
    agreement.start()
    try:
        assert agreement.due(7) == [] and not agreement.pending
        shelf.gone = True
        with pytest.raises(PeerLostError, match="does not answer: Broken pipe"):
            agreement.post("checkpoint", {})
        wait_for(noticed.is_set, "the loop's flag is raised")
        assert agreement.pending
        with pytest.raises(PeerLostError, match=r"Broken pipe.*launcher"):
            agreement.due(8)
    finally:
        agreement.leave("over")


def test_what_nobody_will_come_to_is_void() -> None:
    """A rank that has left makes no promise, and is not waited for."""
    shelf = Shelf()
    told = threading.Event()
    agreement = Agreement(shelf, 0, 2, step=lambda: 7, on_notice=told.set)
    agreement.start()
    shelf.set("left/1", "finished")
    agreement.post("checkpoint", {})
    assert told.wait(30)
    assert agreement.due(8) == []
    assert not agreement.pending
    agreement.leave("finished")


def test_what_needs_no_boundary_is_handed_over_at_once() -> None:
    """On the listener's thread, while the loop hangs."""
    shelf = Shelf()
    taken: list[Request] = []

    def take(request: Request) -> bool:
        taken.append(request)
        return True

    def never() -> Any:
        raise AssertionError("the loop was told")

    agreement = Agreement(shelf, 0, 1, step=never, on_notice=never, at_once=take)
    agreement.start()
    agreement.post("command", {"action": "dump_stacks"})
    found = wait_for(lambda: taken, "it was handed over")
    assert found[0].body == {"action": "dump_stacks"} and not agreement.pending
    agreement.leave("finished")
    agreement.leave("finished")  # twice is no harm
