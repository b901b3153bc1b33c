"""The processes of one run: alone, or one of a group that torchrun started. Made by `join` or `observe`.

Ranks tell each other things through the store that torchrun keeps, as JSON, at the start and the end and when
something is asked for; never during a step.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from obsinfra.backup.rng import seed_step
from obsinfra.control.channel import ControlChannel
from obsinfra.control.command import Command
from obsinfra.errors import (
    ConfigError,
    ObsinfraError,
    PeerLostError,
    RanksDifferError,
    UserError,
    first_line,
)
from obsinfra.observation.agreement import Agreement, Request, Store, say_farewell
from obsinfra.observation.flight_record import start_recording
from obsinfra.observation.shared_channel import Channel, SharedChannel
from obsinfra.optimization.data_order import derived_seed
from obsinfra.run.folder import MemberFolder, RunFolder

OWN_AFFAIR = ("checkpoint", "emergency_checkpoint", "stop", "profile", "free_memory")
"""Actions of which one rank's failure leaves the training state of all as it was."""

START_SECONDS = 300.0
"""How long ranks wait for each other at the start: the slowest may have to read its data first."""


CAUSES = ("killed", "timeout", "error", "membership")
"""Why a group had to form again."""


@dataclass(frozen=True, slots=True)
class Restart:
    """A group that has formed again.

    Attributes:
        cause: `killed` (a rank or its host was gone without a word), `timeout` (one that others waited for),
            `error`, or `membership` (torchrun stopped the ranks, as hosts came or went).
        why: what a rank told.
        silent: ranks of the attempt before that told nothing.
        size_before: how many there were.
        downtime_seconds: from the failure to the first step.
        counts: restarts of this launch so far, by cause.
    """

    cause: str
    why: str
    silent: list[int]
    size_before: int
    downtime_seconds: float
    counts: Mapping[str, int]


def cause_of(notes: Sequence[str | None]) -> str:
    """Why an attempt ended, by what its ranks left behind; None for one that left nothing."""
    told = [note for note in notes if note is not None]
    if any(mark in note for note in told for mark in ("imed out", "imeout", "no step boundary")):
        return "timeout"
    if len(told) < len(notes):
        return "killed"
    return "membership" if all(note.startswith("signal ") for note in told) else "error"


class Ranks(Protocol):
    """What a run needs to know of its fellow processes.

    Attributes:
        rank, size: this one and how many there are.
        draws_as: ranks of the same number here draw the same random numbers in a step.
    """

    rank: int
    size: int
    draws_as: int

    @property
    def first(self) -> bool:
        """Whether this one does what must be done once."""
        ...

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with: then every moment between two steps is as good."""
        ...

    def folder(self, root: Path) -> RunFolder:
        """The run's folder as this rank may use it."""
        ...

    def channel(self, folder: RunFolder, **callbacks: Any) -> Channel:
        """Where commands come from."""
        ...

    def begin(
        self, *, seed: int, step: Callable[[], int], on_notice: Callable[[], None], patience: float
    ) -> None:
        """The loop is about to begin."""
        ...

    def began(self, noted_at: float | None) -> Restart | None:
        """The first step begins; what it took to get here when an earlier attempt of this launch ended.

        Args:
            noted_at: epoch seconds of the last sign of life of that attempt, where nobody told more.
        """
        ...

    def begin_step(self, step: int) -> None:
        """A step begins: its random numbers are this rank's own."""
        ...

    def share(self, what: str, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, on every rank; JSON. An error there is one on every rank."""
        ...

    def gather(self, what: str, value: Any) -> list[Any]:
        """What every rank gives, by rank; JSON."""
        ...

    def remember(self, name: str, value: str) -> None:
        """Keep something for later attempts of this launch."""
        ...

    def recall(self, name: str) -> str | None:
        """What an earlier attempt, or this one, kept."""
        ...

    def post(self, kind: str, body: Mapping[str, Any]) -> None:
        """Have every rank do something at one boundary."""
        ...

    def due(self, boundary: int) -> list[Request]:
        """What is to be done at this one."""
        ...

    def compare(self) -> None:
        """Hold what became of the boundary's commands against what became of them on the other ranks."""
        ...

    @property
    def pending(self) -> bool:
        """Whether something is to be done at a boundary to come."""
        ...

    def hold(self, boundary: int) -> None:
        """The loop is held here."""
        ...

    def let_go(self) -> bool:
        """Whether the loop may go on; else something is to be looked at first."""
        ...

    def leave(self, why: str) -> None:
        """This rank takes part no more. May be called twice."""
        ...


class Alone:
    """One process: what is asked for is due at once."""

    rank, size, first, alone = 0, 1, True, True

    def __init__(self) -> None:
        self.draws_as = 0
        self._posted: list[Request] = []

    def folder(self, root: Path) -> RunFolder:
        return RunFolder(root)

    def channel(self, folder: RunFolder, **callbacks: Any) -> Channel:
        return ControlChannel(folder, **callbacks)

    def begin(self, **loop: Any) -> None:
        pass

    def began(self, noted_at: float | None) -> Restart | None:
        return None

    def begin_step(self, step: int) -> None:
        pass

    def share(self, what: str, make: Callable[[], Any]) -> Any:
        return make()

    def gather(self, what: str, value: Any) -> list[Any]:
        return [value]

    def remember(self, name: str, value: str) -> None:
        pass

    def recall(self, name: str) -> str | None:
        return None

    def post(self, kind: str, body: Mapping[str, Any]) -> None:
        self._posted.append(Request(len(self._posted) + 1, kind, body, 0))

    def due(self, boundary: int) -> list[Request]:
        posted, self._posted = self._posted, []
        return posted

    pending = False

    def compare(self) -> None:
        pass

    def hold(self, boundary: int) -> None:
        pass

    def let_go(self) -> bool:
        return True

    def leave(self, why: str) -> None:
        pass


class Group:
    """One of several processes.

    Args:
        store: shared by all of them, this attempt's keys alone.
        launch: the same, for all attempts of this launch.
        attempt: how many groups this launch has formed, this one included.
    """

    alone = False

    def __init__(self, store: Store, launch: Store, rank: int, size: int, attempt: int) -> None:
        self._store, self._launch = store, launch
        self.rank, self.size, self.attempt = rank, size, attempt
        self.draws_as = rank
        if rank == 0:
            store.set("size", str(size))
        self._agreement: Agreement | None = None
        self._channel: SharedChannel | None = None
        self._seed = 0
        self._left = False
        self._shared: dict[str, int] = {}
        self._to_compare: list[tuple[int, Command]] = []

    @property
    def first(self) -> bool:
        return self.rank == 0

    def folder(self, root: Path) -> RunFolder:
        return RunFolder(root) if self.first else MemberFolder(root)

    def channel(self, folder: RunFolder, **callbacks: Any) -> Channel:
        self._channel = SharedChannel(
            folder, self.rank, lambda command: self.post("command", asdict(command)), **callbacks
        )
        return self._channel

    def begin(
        self, *, seed: int, step: Callable[[], int], on_notice: Callable[[], None], patience: float
    ) -> None:
        self._seed = seed
        self._agreement = Agreement(
            self._store,
            self.rank,
            self.size,
            step=step,
            on_notice=on_notice,
            at_once=self._at_once,
            patience=patience,
        )
        self._agreement.start()

    def began(self, noted_at: float | None) -> Restart | None:
        if not self.first or self.attempt < 2:
            return None
        size = int(self._of_last_attempt("size") or 0)
        notes = [json.loads(self._of_last_attempt(f"left/{rank}") or "null") for rank in range(size)]
        cause = cause_of([note and note["why"] for note in notes])
        # Who saw a rank go noted it at once; the rank itself may have had no time to.
        failed_at = min([note["at"] for note in notes if note] or [noted_at or time.time()])
        self._launch.add(f"restarts/{cause}", 1)
        counts = {one: self._launch.add(f"restarts/{one}", 0) for one in CAUSES}
        missing = [rank for rank, note in enumerate(notes) if note is None]
        why = next((note["why"] for note in notes if note), "no rank could tell")
        return Restart(cause, why, missing, size, max(0.0, time.time() - failed_at), counts)

    def begin_step(self, step: int) -> None:
        # A function of seed, step and rank, so that a checkpoint need not hold what every rank had: the
        # ranks that resume, however many, draw what they would have drawn.
        seed_step(derived_seed(self._seed, "step", step, self.draws_as))

    def share(self, what: str, make: Callable[[], Any]) -> Any:
        key = self._key(what)
        if self.first:
            try:
                made = make()
            except Exception as error:
                told = {"error": str(error), "user": isinstance(error, UserError)}
                self._store.set(key, json.dumps(told))
                raise
            self._store.set(key, json.dumps({"value": made}))
            return made
        self._wait_for([key], what)
        found = json.loads(self._store.get(key))
        if "error" in found:
            raise (ConfigError if found["user"] else ObsinfraError)(f"rank 0: {found['error']}")
        return found["value"]

    def gather(self, what: str, value: Any) -> list[Any]:
        key = self._key(what)
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        self._wait_for(keys, what)
        return [json.loads(self._store.get(one)) for one in keys]

    def remember(self, name: str, value: str) -> None:
        self._launch.set(name, value)

    def recall(self, name: str) -> str | None:
        return self._launch.get(name).decode() if self._launch.check([name]) else None

    def post(self, kind: str, body: Mapping[str, Any]) -> None:
        assert self._agreement is not None
        self._agreement.post(kind, body)

    def due(self, boundary: int) -> list[Request]:
        if self._agreement is None:
            return []
        found = self._agreement.due(boundary)
        for request in found:
            if request.kind == "command" and self._channel is not None:
                command = _command(request)
                self._channel.agreed(command)
                if command.action not in OWN_AFFAIR:
                    self._to_compare.append((request.number, command))
        return [request for request in found if request.kind != "command"]

    def compare(self) -> None:
        compared, self._to_compare = self._to_compare, []
        for number, command in compared:
            assert self._channel is not None
            state, error = self._channel.outcomes.pop(command.id, ("unknown", None))
            mine = "failed" if state == "failed" else "done"
            found = self.gather(f"outcome/{number}", [mine, error])
            if len({outcome for outcome, _ in found}) > 1:
                told = "; ".join(f"rank {rank}: {why or what}" for rank, (what, why) in enumerate(found))
                raise RanksDifferError(
                    f"the ranks disagree about the command {command.action}: {told}",
                    "the same outcome on every rank",
                    "go on from the last checkpoint with --resume",
                )

    @property
    def pending(self) -> bool:
        return self._agreement is not None and self._agreement.pending

    def hold(self, boundary: int) -> None:
        assert self._agreement is not None
        self._agreement.hold(boundary)

    def let_go(self) -> bool:
        assert self._agreement is not None
        return self._agreement.let_go()

    def leave(self, why: str) -> None:
        if self._left:
            return
        self._left = True
        if self._agreement is not None:
            self._agreement.leave(why)
        else:
            say_farewell(self._store, self.rank, why)

    # ---- inside ----------------------------------------------------------------------------------------

    def _at_once(self, request: Request) -> bool:
        if request.kind != "command" or self._channel is None:
            return False
        return self._channel.at_once(_command(request), request.rank)

    def _of_last_attempt(self, name: str) -> str | None:
        return self.recall(f"attempt/{self.attempt - 1}/{name}")

    def _key(self, what: str) -> str:
        """A name of its own for each time; all ranks ask for the same things in the same order."""
        self._shared[what] = self._shared.get(what, 0) + 1
        return f"{what}/{self._shared[what]}"

    def _wait_for(self, keys: list[str], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        pause = 0.001
        while not self._store.check(keys):
            gone = [rank for rank in range(self.size) if self._store.check([f"left/{rank}"])]
            if gone and not self._store.check(keys):
                why = json.loads(self._store.get(f"left/{gone[0]}"))["why"]
                raise PeerLostError(f"rank {gone[0]} has left the run before {what}: {why}")
            if time.monotonic() >= deadline:
                raise PeerLostError(f"not every rank came to {what!r} within {START_SECONDS:.0f} s")
            time.sleep(pause)  # the stores' own wait would not see in between that a rank has left
            pause = min(0.05, 2 * pause)


@dataclass(frozen=True, slots=True)
class Launch:
    """What torchrun tells a process it starts."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    run_id: str

    @classmethod
    def from_environment(cls) -> Launch | None:
        """None when this process was started alone."""
        try:
            return cls(
                int(os.environ["RANK"]),
                int(os.environ["WORLD_SIZE"]),
                int(os.environ.get("LOCAL_RANK", "0")),
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                os.environ.get("TORCHELASTIC_RUN_ID", "none"),
            )
        except (KeyError, ValueError):
            return None


def join(timeout_seconds: float) -> Ranks:
    """Meet the other processes torchrun started, or be alone.

    Args:
        timeout_seconds: how long a collective may take before the rank that waits gives up.

    Raises:
        PeerLostError: they did not meet.
    """
    launch = Launch.from_environment()
    if launch is None:
        return Alone()
    start_recording()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        kept_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        launches = _store_of(launch, serve=launch.rank == 0 and not kept_by_agent)
        with _met(launches, launch) as attempt:
            own = PrefixStore(f"attempt/{attempt}", launches)
            # Not under torch's own keys: those may be of the attempt before and lead to processes that are
            # gone (torchrun hands all attempts the same store, without a prefix). And by a connection of its
            # own: torch waits for keys on it, and nobody else gets through meanwhile.
            dist.init_process_group(
                backend,
                store=PrefixStore(f"attempt/{attempt}/process group", _store_of(launch)),
                rank=launch.rank,
                world_size=launch.size,
                timeout=timedelta(seconds=timeout_seconds),
            )
    except (RuntimeError, ValueError) as error:  # what c10d raises when an address or a peer is not there
        raise PeerLostError(
            f"rank {launch.rank} of {launch.size} cannot join the others at {launch.address}:{launch.port}: "
            f"{first_line(error, 300)}"
        ) from error
    return Group(own, launches, launch.rank, launch.size, attempt)


def _store_of(launch: Launch, *, serve: bool = False) -> PrefixStore:
    """A connection to what all attempts of a launch share."""
    store = TCPStore(
        launch.address,
        launch.port,
        is_master=serve,
        wait_for_workers=False,
        timeout=timedelta(seconds=START_SECONDS),
    )
    return PrefixStore(f"obsinfra/{launch.run_id}", store)


@contextlib.contextmanager
def _met(launches: Store, launch: Launch) -> Iterator[int]:
    """The number of this attempt, from rank 0, which goes on telling it to whoever comes within the block.

    Ranks count restarts differently after a host has joined late, so that torchrun's count is no help; and
    what lies in the store may be of an attempt before. So each rank asks under a name nobody has used yet.
    """
    if launch.rank > 0:
        name = secrets.token_hex(8)
        launches.set(f"hello/{launch.rank}", name)
        deadline = time.monotonic() + START_SECONDS
        while not launches.check([f"welcome/{name}"]):
            if time.monotonic() >= deadline:
                raise PeerLostError(f"rank 0 did not answer rank {launch.rank} for {START_SECONDS:.0f} s")
            time.sleep(0.01)  # the store's own wait ends in an error of torch's kind, and a page on stderr
        yield int(launches.get(f"welcome/{name}"))
        return
    attempt = launches.add("attempts", 1)
    over = threading.Event()

    def welcome() -> None:
        answered: set[str] = set()
        with contextlib.suppress(RuntimeError):  # the store is gone; `join` will say so
            while not over.wait(0.01):
                for rank in range(1, launch.size):
                    if launches.check([f"hello/{rank}"]):
                        name = launches.get(f"hello/{rank}").decode()
                        if name not in answered:
                            launches.set(f"welcome/{name}", str(attempt))
                            answered.add(name)

    thread = threading.Thread(target=welcome, name="obsinfra-welcome", daemon=True)
    thread.start()
    try:
        yield attempt
    finally:
        over.set()
        thread.join()


def present_ranks() -> Ranks:
    """The group this process belongs to, if a process group was made; else alone. For a plain loop."""
    launch = Launch.from_environment()
    if launch is None or not dist.is_available() or not dist.is_initialized():
        return Alone()
    launches = _store_of(launch)
    attempt = torch.zeros(1, dtype=torch.int64)
    if launch.rank == 0:
        attempt[0] = launches.add("attempts", 1)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    attempt = attempt.to(device)
    dist.broadcast(attempt, 0)
    number = int(attempt.item())
    return Group(PrefixStore(f"attempt/{number}", launches), launches, launch.rank, launch.size, number)


def _command(request: Request) -> Command:
    return Command(**request.body)
