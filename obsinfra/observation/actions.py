"""Carrying out commands: between two steps on the loop's thread, or at once on a thread of their own.

`ObservedRun` tells it what arrived and when a step has ended; what each action does is in `executors`. Every
command gets its acks, its figures and its log line here, whatever becomes of it, and never ends the training.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, cast

from obsinfra.catalog import metrics as catalog
from obsinfra.catalog.actions import ACTIONS, Action
from obsinfra.control.action_plugins import load_action_plugins
from obsinfra.control.command import Command
from obsinfra.errors import CommandError, UserError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.tracing import trace_id_of
from obsinfra.observation.keeper import Committed, Request, Saving

if TYPE_CHECKING:
    from obsinfra.observation.observed_run import ObservedRun

LOOK_SECONDS = 1.0
"""How often a paused loop looks around though nothing woke it: for a checkpoint that is due."""

JOIN_SECONDS = 5.0
"""How long the end of a run waits for actions on threads of their own."""


@dataclass(frozen=True, slots=True)
class Order:
    """A command as an executor gets it.

    Attributes:
        command: who asked, why and when.
        arguments: every argument of the action, the defaults included.
    """

    command: Command
    arguments: Mapping[str, Any]

    @property
    def reason(self) -> str:
        """For people: who asked and why."""
        return f"{self.command.source}: {self.command.reason or self.command.action}"

    @property
    def request(self) -> Request:
        """The same, for a checkpoint."""
        return Request(self.reason, self.command.issued_at, self.command.traceparent)


Steps = Generator[None, None, Mapping[str, Any]]
"""An executor that takes several steps: it yields once per step, and returns its result."""

Executor = Callable[["ObservedRun", Order], Mapping[str, Any] | Steps | Saving]
"""Does one action and returns what it did, as JSON; raises to say that it failed. That of an any-time action
runs on a thread of its own, must not touch the loop's state, and cannot take steps."""


@dataclass(slots=True)
class _Execution:
    """One command under way."""

    command: Command
    action: Action
    step: int
    started_at: float = field(default_factory=time.time)
    started: float = field(default_factory=perf_counter)
    steps: Steps | None = None
    seen_step: int = -1
    exclusive: bool = False


@dataclass(slots=True, eq=False)
class _Visit:
    """Something another thread wants done between two steps."""

    call: Callable[[], object]
    over: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


Holder = Literal["person", "alert"]
"""Whose a pause is: an alert's, by the command's argument `alert`, or anybody else's."""


@dataclass(frozen=True, slots=True)
class Hold:
    """What one holder wants of a pause.

    Attributes:
        reason: for people.
        until: `perf_counter` seconds at which it ends by itself; None: only when told to.
    """

    reason: str
    until: float | None


@dataclass(frozen=True, slots=True)
class Pause:
    """Why and since when the loop is held.

    Attributes:
        since: `perf_counter` seconds.
        state: the run's state before.
        holds: who holds it, the newest last; never empty. The loop goes on when all have let go.
    """

    since: float
    state: str
    holds: Mapping[Holder, Hold]


class Actions:
    """Carries out the commands of one run.

    Args:
        run: whose they are.
        executors: what does each action, by name; those of other packages are added by entry point.

    Attributes:
        pause: set while the loop is held between two steps.
        closing: set when the run ends; a long action waits on it instead of sleeping.
    """

    def __init__(self, run: ObservedRun, executors: Mapping[str, Executor]) -> None:
        self._run = run
        self._executors = dict(executors)
        self._taking_steps: list[_Execution] = []
        self._threads: dict[str, threading.Thread] = {}
        self._busy: set[str] = set()
        self._visits: list[_Visit] = []
        self._lock = threading.Lock()
        self._news: SimpleQueue[None] = SimpleQueue()
        self._log = get_logger("system")
        self.pause: Pause | None = None
        self.closing = threading.Event()
        plugins, problems = load_action_plugins()
        self._executors.update({name: plugin.execute for name, plugin in plugins.items()})
        for problem in problems:
            run.monitor.instruments.add(catalog.TELEMETRY_ERRORS, component="actions")
            self._log.error(
                "action_plugin_failed", name=problem.name, target=problem.target, problem=problem.problem
            )

    # ---- what the run tells ------------------------------------------------------------------------------

    def arrived(self) -> None:
        """Something is in the queue: what is safe at any time starts at once; the thread that brought it."""
        self.wake()
        for command in self._run.channel.take(lambda command: _action(command).at == "any_time"):
            self._start(command)

    def wake(self) -> None:
        """A paused loop looks around now. Safe in a signal handler."""
        if self._news.empty():
            self._news.put(None)

    def at_boundary(self) -> None:
        """Everything that waits, and one more step of what takes several; the loop's thread."""
        with self._lock:
            visits, self._visits = self._visits, []
        for visit in visits:
            try:
                visit.call()
            except Exception as error:  # raised where the visit was asked for
                visit.error = error
            visit.over.set()
        for execution in list(self._taking_steps):
            if self._run.step != execution.seen_step:
                self._advance(execution)
        for command in self._run.channel.take(lambda command: _action(command).at == "boundary"):
            self._obey(command)

    def visit(self, call: Callable[[], object], seconds: float) -> bool:
        """Have `call` done between two steps, on the loop's thread; for an action on a thread of its own.

        Returns:
            False when the loop did not come round within `seconds`, or the run ends; `call` is not done then.

        Raises:
            Exception: what `call` raised.
        """
        visit = _Visit(call)
        with self._lock:
            self._visits.append(visit)
        self._run.attend()
        self.wake()
        deadline = time.monotonic() + seconds
        while not visit.over.wait(0.05):
            if time.monotonic() >= deadline or self.closing.is_set():
                with self._lock:
                    if visit in self._visits:
                        self._visits.remove(visit)
                        return False
                # else it is being done now
        if visit.error is not None:
            raise visit.error
        return True

    @property
    def taking_steps(self) -> bool:
        """Whether something wants to be at the next boundary too."""
        return bool(self._taking_steps)

    def wait_while_paused(self) -> None:
        """Until there is news, the pause is over, or it is time to look around; the loop's thread."""
        pause = self.pause
        if pause is None:
            return
        ends = {holder: hold.until for holder, hold in pause.holds.items() if hold.until is not None}
        with self._run.phase("paused"):
            wait = min([LOOK_SECONDS, *(max(0.0, until - perf_counter()) for until in ends.values())])
            with contextlib.suppress(Empty):
                self._news.get(timeout=wait)
        for holder, until in ends.items():
            if perf_counter() >= until:
                pause = replace(
                    pause, holds={**pause.holds, holder: replace(pause.holds[holder], until=None)}
                )
                self.pause = pause
                self._run.ranks.post("pause over", {"why": "max_seconds are over", "holder": holder})

    def hold(self, holder: Holder, reason: str, seconds: float | None) -> None:
        """Hold the loop from this boundary on; the loop's thread."""
        now = perf_counter()
        pause = self.pause or Pause(now, self._run.monitor.state, {})
        timed = seconds is not None and self._run.ranks.first  # which ends it for all
        hold = Hold(reason, now + seconds if seconds and timed else None)
        others = {name: held for name, held in pause.holds.items() if name != holder}
        self.pause = replace(pause, holds={**others, holder: hold})
        self._run.card.show_state("paused", reason)

    def end_pause(self, why: str, holder: Holder | None = None) -> float | None:
        """Let the loop go on, unless another holds it too; seconds it was held, None when it was not or is.

        Args:
            holder: who lets go; None: all do.
        """
        pause = self.pause
        if pause is None:
            return None
        left = {name: hold for name, hold in pause.holds.items() if holder is not None and name != holder}
        if left:
            if left != pause.holds:
                self.pause = replace(pause, holds=left)
                [*_, last] = left.values()
                self._run.card.show_state("paused", last.reason)
                self._log.info("pause_goes_on", let_go=holder, why=why, still=last.reason)
            return None
        self.pause = None
        seconds = perf_counter() - pause.since
        if self._run.stop is None:
            self._run.card.show_state(pause.state, None)
        self._log.info("pause_ended", why=why, seconds=round(seconds, 3), at_step=self._run.step)
        return seconds

    def close(self) -> None:
        """The run ends: what is under way is told to stop, and reported as failed if it does not finish."""
        self.closing.set()
        for execution in list(self._taking_steps):
            assert execution.steps is not None
            self._taking_steps.remove(execution)
            try:
                execution.steps.close()
            except Exception as error:  # of an action that may be somebody else's; it is reported as failed
                self._log.error("action_not_ended", action=execution.action.name, exc_info=error)
            self._fail(execution, "the run ended before it was done")
        deadline = time.monotonic() + JOIN_SECONDS
        for thread in list(self._threads.values()):
            if thread is not threading.current_thread():
                thread.join(timeout=max(0.0, deadline - time.monotonic()))

    # ---- one command -------------------------------------------------------------------------------------

    def _start(self, command: Command) -> None:
        """On a thread of its own; one at a time of each action."""
        execution = _Execution(command, _action(command), self._run.step)
        with self._lock:
            busy = command.action in self._busy
            if not busy:
                self._busy.add(command.action)
                execution.exclusive = True
                thread = threading.Thread(
                    target=self._carry_out,
                    args=(execution,),
                    name=f"obsinfra-{command.action.replace('_', '-')}",
                    daemon=True,
                )
                self._threads[command.action] = thread
        if busy:
            self._fail(
                execution, f"another {command.action} is under way; expected none; fix: try again later"
            )
            return
        thread.start()

    def _obey(self, command: Command) -> None:
        execution = _Execution(command, _action(command), self._run.step)
        if self._run.stop is not None and not execution.action.ends_run:
            self._fail(execution, f"the run is ending ({self._run.stop.reason})")
            return
        self._carry_out(execution)

    def _carry_out(self, execution: _Execution) -> None:
        command = execution.command
        self._run.channel.ack(command.id, "running", step=execution.step)
        try:
            execute = self._executors.get(command.action)
            if execute is None:
                raise CommandError(f"this trainer cannot do {command.action!r}")
            order = Order(command, execution.action.complete(command.args))
            result = execute(self._run, order)
            if inspect.isgenerator(result):
                if execution.action.at == "any_time":
                    result.close()
                    raise TypeError(f"{command.action} is done at any time and cannot take steps")
                execution.steps = cast(Steps, result)
                self._taking_steps.append(execution)
                self._advance(execution)
            elif isinstance(result, Saving):
                result.then(lambda committed: self._saved(execution, committed))
            else:
                self._done(execution, dict(result or {}))  # type: ignore[arg-type]
        except Exception as error:  # whatever an action runs into is the answer to its command
            self._failed(execution, error)

    def _advance(self, execution: _Execution) -> None:
        """One more step of an action that takes several."""
        assert execution.steps is not None
        execution.seen_step = self._run.step
        try:
            next(execution.steps)
        except StopIteration as end:
            self._taking_steps.remove(execution)
            self._done(execution, dict(end.value or {}))
        except Exception as error:  # likewise
            self._taking_steps.remove(execution)
            self._failed(execution, error)

    def _saved(self, execution: _Execution, committed: Committed | None) -> None:
        """A checkpoint is acknowledged when it is durable; the loop went on after the copy."""
        if committed is None:
            self._fail(execution, NOT_COMMITTED)
        else:
            self._done(execution, where(committed), step=execution.step)

    def _release(self, execution: _Execution) -> None:
        """The next of its kind may begin: before the ack, which whoever asks again has waited for."""
        if execution.exclusive:
            with self._lock:
                self._busy.discard(execution.command.action)

    def _done(self, execution: _Execution, result: dict[str, Any], step: int | None = None) -> None:
        seconds = perf_counter() - execution.started
        step = execution.step if step is None else step
        result = {**result, "seconds": round(seconds, 6)}
        self._release(execution)
        self._run.channel.ack(execution.command.id, "done", step=step, result=result)
        self._settled(execution, "done", seconds, result=result)

    def _failed(self, execution: _Execution, error: Exception) -> None:
        plain = isinstance(error, (CommandError, UserError))
        told = str(error) if plain else f"{type(error).__name__}: {error}"
        self._log.error(
            "command_failed",
            action=execution.action.name,
            id=execution.command.id,
            error=told,
            exc_info=None if plain or isinstance(error, OSError) else error,
        )
        self._fail(execution, told)

    def _fail(self, execution: _Execution, error: str) -> None:
        seconds = perf_counter() - execution.started
        self._release(execution)
        self._run.channel.ack(execution.command.id, "failed", step=execution.step, error=error)
        self._settled(execution, "failed", seconds, error=error)

    def _settled(self, execution: _Execution, outcome: str, seconds: float, **facts: Any) -> None:
        self.report(
            execution.command, outcome, execution.step, execution.started_at, seconds=seconds, **facts
        )

    def report(
        self,
        command: Command,
        outcome: str,
        step: int | None,
        started_at: float,
        *,
        seconds: float | None = None,
        **facts: Any,
    ) -> None:
        """Count, trace and log the outcome of a command that was acknowledged.

        Args:
            started_at: epoch seconds.
            seconds: how long it took; None when it was not carried out.
            facts: for the log.
        """
        self._run.monitor.command_finished(
            id=command.id,
            action=command.action if command.action in ACTIONS else "unknown",
            source=command.source,
            reason=command.reason,
            outcome=outcome,
            step=step,
            started_at=started_at,
            traceparent=command.traceparent,
            seconds=seconds,
        )
        trace = trace_id_of(command.traceparent)
        self._log.info(
            "command",
            action=command.action,
            id=command.id,
            source=command.source,
            args=dict(command.args),
            outcome=outcome,
            at_step=step,
            **({} if seconds is None else {"seconds": round(seconds, 6)}),
            **facts,
            **({} if trace is None else {"trace_id": trace}),
        )


NOT_COMMITTED = "the checkpoint was not committed; errors.jsonl says why"


def where(committed: Committed | None) -> dict[str, Any]:
    """A checkpoint as results and log lines tell of it."""
    if committed is None:
        return {"checkpoint": None}
    return {"checkpoint": str(committed.path), "step": committed.step, "from": committed.source}


def _action(command: Command) -> Action:
    """Its row; a command that was checked has one."""
    return ACTIONS.get(command.action) or Action(command.action, "")
