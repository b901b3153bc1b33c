"""How ranks agree on the step at which something is done, without a collective on the step path.

A request is written to the store that torchrun keeps; a thread of every rank sees it, raises its loop's flag
and promises a step boundary. The latest promise is when it is done, on every rank: see docs/distributed.md.
Used by `ranks.Group`; knows neither torch nor what the requests mean.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from obsinfra.errors import PeerLostError
from obsinfra.monitoring.logging_config import get_logger

POLL_SECONDS = 0.05
"""How often a rank looks for a new request: some 60 µs of its processor each."""

PROMISE_POLL_SECONDS = 0.002
"""How often a loop that waits at a boundary looks for the others' promises. The stores' own `wait` would not
see in between that a rank has left, nor let a signal's handler run."""

LOST_SECONDS = 10.0
"""A store that fails for so long went with the launcher that kept it: nobody would start the ranks again, and
they could be told nothing any more."""

FAREWELL_SECONDS = 5.0
"""How long a rank that leaves tries to tell the others why."""


class Store(Protocol):
    """What is used of `torch.distributed`'s stores; `get` is only called for keys that exist."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def add(self, key: str, amount: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True, slots=True)
class Request:
    """Something all ranks shall do at one boundary.

    Attributes:
        number: its place in the order of all requests, from 1.
        kind: what it is about, for whoever obeys it.
        body: JSON.
        rank: who asked.
    """

    number: int
    kind: str
    body: Mapping[str, Any]
    rank: int


def say_farewell(store: Store, rank: int, why: str) -> None:
    """Leave behind under `left/<rank>` why a rank takes part no more.

    Not for long: where the store went with its host, or the link to it is cut, nobody is left to be told, and
    a call of it would last as long as the store's own time-out.
    """
    note = json.dumps({"why": why[:1000], "at": time.time()})
    problem = [f"no answer for {FAREWELL_SECONDS:.0f} s"]

    def tell() -> None:
        try:
            store.set(f"left/{rank}", note)
            problem.clear()
        except Exception as error:  # torch's stores raise errors of their own kinds
            problem[0] = str(error)[:200]

    teller = threading.Thread(target=tell, name="obsinfra-farewell", daemon=True)
    teller.start()
    teller.join(FAREWELL_SECONDS)
    if problem:
        get_logger("system").warning("store_gone", error=problem[0])


class Agreement:
    """One rank's part in it; the loop's thread calls `due`, `hold` and `let_go`, any thread `post`.

    Args:
        store: shared by the ranks, this attempt's keys alone.
        rank, size: this rank and how many there are.
        step: the loop's global step: the one under way, or the next one between two.
        on_notice: raises the loop's flag; must be safe on any thread.
        at_once: kinds that no boundary is needed for, and who takes them, on the listener's thread.
        patience: seconds a loop waits for another rank's promise.
        lost_seconds: how long the store may fail before the rank gives up.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        step: Callable[[], int],
        on_notice: Callable[[], None],
        at_once: Callable[[Request], bool] = lambda request: False,
        patience: float = 30.0,
        lost_seconds: float = LOST_SECONDS,
    ) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._step, self._on_notice, self._at_once = step, on_notice, at_once
        self._patience, self._lost_seconds = patience, lost_seconds
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._noticed: list[Request] = []
        self._decided: list[tuple[int, Request]] = []
        self._latest = 0
        self._held_at: int | None = None
        self._leaving = False
        self._next = 1
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._log = get_logger("system")
        self._thread = threading.Thread(target=self._listen, name="obsinfra-agreement", daemon=True)

    def start(self) -> None:
        """Listen from here on."""
        self._thread.start()

    def post(self, kind: str, body: Mapping[str, Any]) -> None:
        """Ask all ranks, this one included, to do something at a boundary that they will agree on.

        Raises:
            PeerLostError: the store does not take it.
        """
        document = {"kind": kind, "body": dict(body), "rank": self._rank}
        try:
            number = self._store.add("requests", 1)
            self._store.set(f"request/{number}", json.dumps(document))
        except Exception as error:  # torch's stores raise errors of their own kinds
            raise PeerLostError(
                f"the store where the ranks meet does not answer: {str(error)[:300]}"
            ) from error
        self._wake.set()

    @property
    def pending(self) -> bool:
        """Whether something was noticed here that is not due yet; the loop's flag must stay up then."""
        return bool(self._noticed or self._decided or self._lost)

    def due(self, boundary: int) -> list[Request]:
        """What is to be done at this boundary, in the order all ranks do it.

        Raises:
            PeerLostError: a rank made no promise in time, or the store is gone.
        """
        if self._lost is not None:
            raise PeerLostError(
                f"the store where the ranks meet has not answered for {self._lost_seconds:.0f} s "
                f"({self._lost}): the launcher that kept it, or its host, is gone"
            )
        if not self._noticed and not self._decided:
            return []
        while True:
            with self._lock:
                request = self._noticed[0] if self._noticed else None
            if request is None:
                break
            at = self._decide(request)
            with self._lock:
                self._noticed.pop(0)
            if at is not None:
                self._latest = max(self._latest, at)
                self._decided.append((self._latest, request))
        # All ranks are held at the same boundary: what was promised for the next one just before is done
        # here, and one by one, since the first may be what lets the loop go on.
        holding = self._held_at is not None and not self._leaving
        ready = []
        while self._decided and self._decided[0][0] <= boundary + holding:
            ready.append(self._decided.pop(0)[1])
            if holding:
                break
        return ready

    def hold(self, boundary: int) -> None:
        """The loop stays at this boundary, as all do, and looks at what arrives: it promises this one."""
        with self._lock:
            self._held_at, self._leaving = boundary, False

    def let_go(self) -> bool:
        """The loop wants to leave the boundary it was held at; False: there is something to look at first."""
        with self._lock:
            held = self._held_at
            self._leaving = True
            if held is not None and (self._noticed or any(at <= held for at, _ in self._decided)):
                return False
            self._held_at = None
            return True

    def leave(self, why: str) -> None:
        """This rank takes part no more; who waits for its promise waits no longer. May be called twice."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._wake.set()
            if threading.current_thread() is not self._thread and self._thread.is_alive():
                self._thread.join(FAREWELL_SECONDS)
            say_farewell(self._store, self._rank, why)

    # ---- inside ----------------------------------------------------------------------------------------

    def _listen(self) -> None:
        failing_since: float | None = None
        while not self._stopping.is_set():
            try:
                while not self._stopping.is_set() and self._store.check([f"request/{self._next}"]):
                    self._notice(self._next)
                    self._next += 1
                failing_since = None
            except Exception as error:  # torch's stores raise errors of their own kinds
                if not self._stopping.is_set():
                    if failing_since is None:
                        failing_since = time.monotonic()
                        self._log.error("agreement_store_lost", error=str(error)[:300])
                    if time.monotonic() - failing_since >= self._lost_seconds:
                        self._lost = str(error)[:300]
                        self._on_notice()
                        return
                    self._stopping.wait(self._lost_seconds / 2)  # each failure fills a page of stderr
            self._wake.wait(POLL_SECONDS)
            self._wake.clear()

    def _notice(self, number: int) -> None:
        document = json.loads(self._store.get(f"request/{number}"))
        request = Request(number, document["kind"], document["body"], document["rank"])
        if self._at_once(request):
            return
        with self._lock:
            self._noticed.append(request)
            # The flag first, then the step: the loop cannot pass the boundary after that step without
            # having seen the flag.
            self._on_notice()
            promise = self._step() + 1 if self._held_at is None else self._held_at
        self._store.set(f"promise/{number}/{self._rank}", str(promise))

    def _decide(self, request: Request) -> int | None:
        """The boundary all ranks do it at; None when a rank has left and so nobody will come to it."""
        keys = [f"promise/{request.number}/{rank}" for rank in range(self._size)]
        deadline = time.monotonic() + self._patience
        look = 0
        while not self._store.check(keys):
            look += 1
            if look % 20 == 0 and (gone := self._gone()):
                self._log.warning("request_void", kind=request.kind, left=gone)
                return None
            if time.monotonic() >= deadline:
                silent = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                raise PeerLostError(
                    f"rank {', '.join(map(str, silent))} did not answer for {self._patience:.0f} s "
                    f"when all ranks were asked for: {request.kind}"
                )
            time.sleep(PROMISE_POLL_SECONDS)
        return max(int(self._store.get(key)) for key in keys)

    def _gone(self) -> Sequence[int]:
        return [rank for rank in range(self._size) if self._store.check([f"left/{rank}"])]
