"""What the sidecar makes of alerts: decides by the policy, journals, delivers, escalates, undoes.

Behind the HTTP face (`sidecar`). Every decision is taken inside a transaction of the journal, so that a
sidecar killed at any moment neither forgets a command nor gives one twice. Knows no HTTP.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from obsinfra.catalog import metrics as catalog
from obsinfra.catalog.actions import ACTIONS, EMERGENCY_CHECKPOINT, PAUSE
from obsinfra.catalog.policy import DEFAULT_POLICY, Policy, Step
from obsinfra.control.command import (
    CLOCK_SKEW_SECONDS,
    MAX_COMMAND_BYTES,
    Ack,
    Command,
    new_command,
)
from obsinfra.control.delivery import OUTCOMES, Deliverer
from obsinfra.control.journal import AlertEntry, CommandEntry, Firing, Journal, Pages
from obsinfra.control.outcomes import Outcomes
from obsinfra.control.run_watch import RunWatch, SeenRun
from obsinfra.control.webhook import STALE_SECONDS, Webhook, WebhookAlert, age_seconds, command_id
from obsinfra.errors import CommandError, ConfigError
from obsinfra.monitoring.instruments import Instruments
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.sample import Sample
from obsinfra.monitoring.tracing import Tracer, create_tracer

COMMAND_SECONDS = 300.0
"""A command that an alert caused is worth executing for this long."""

HOUR = 3_600.0
ESCALATE_EVERY_SECONDS = 1.0
RESTART_GRACE_SECONDS = 15.0
"""After its start the sidecar waits so long for word of what resolved meanwhile, before it takes a step."""

UNSURE_SECONDS = 15.0
"""A step waits so long when it cannot be known whether its alert still fires."""

LATE_SECONDS = 60.0
"""With no Alertmanager to be asked: what is heard so soon after its alert's end was sent before it."""

WATCH_SECONDS = 60.0
"""An alert with no step left, but something to undo, is asked about so often: its end may go unheard."""

UNUSABLE_DECISIONS = ("no_run", "unknown_run", "run_ended", "unknown_action", "expired")
"""An action was asked for that cannot be done; worth a warning."""

QUIET_DECISIONS = ("duplicate", "again", "informed", "resolved")
"""Nothing was done and nothing was wrong."""

HELD_BACK = ("cool_down", "hourly_limit", "dry_run")
"""Why the policy may hold a command back; also what is decided then."""

ALERT_DECISIONS = (
    "accepted",
    "duplicate",
    "again",
    "informed",
    "resolved",
    "escalated",
    "undone",
    *HELD_BACK,
    *UNUSABLE_DECISIONS,
)
"""What becomes of an alert, when it is heard of and later."""

WEBHOOK_OUTCOMES = (
    "accepted",
    "unauthorized",
    "malformed",
    "too_large",
    "journal_failed",
    "too_slow",
    "too_many",
)

StillFiring = Callable[[Firing], bool | None]
"""Whether an alert fires and nobody silenced it; None: that cannot be known now."""


@dataclass(slots=True)
class Round:
    """What one transaction decided; told and delivered after its commit."""

    alerts: list[AlertEntry] = field(default_factory=list)
    commands: list[CommandEntry] = field(default_factory=list)

    def decisions(self) -> dict[str, int]:
        """Number of alerts by decision (`ALERT_DECISIONS`)."""
        return dict(Counter(entry.decision for entry in self.alerts))


class Sidecar:
    """Journal, deliveries, policy and the watch over runs, without the HTTP in front.

    Args:
        output_dir: the folder of runs.
        state_dir: journal, logs and traces; made when missing, 0700.
        policy: what is done about alerts.
        still_firing: asked before a step that is due; default: an alert fires until its end is heard.
        alerts_come: whether Alertmanager is there to tell of alerts; while not, trainers act for themselves.
        loopback_host, page: as `RunWatch` takes them.

    Raises:
        ConfigError: the state folder or the journal cannot be used.
    """

    def __init__(
        self,
        output_dir: Path,
        state_dir: Path,
        policy: Policy = DEFAULT_POLICY,
        still_firing: StillFiring | None = None,
        alerts_come: Callable[[], bool] = lambda: True,
        loopback_host: str | None = None,
        page: str | None = None,
    ) -> None:
        self.output_dir, self.state_dir, self.policy = output_dir, state_dir, policy
        self._still_firing = still_firing
        self._watches = WATCH_SECONDS if still_firing is not None else None
        self.instruments = Instruments()
        self._log = get_logger("system")
        try:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            state_dir.chmod(0o700)
            self.journal = Journal(state_dir / "journal.sqlite")
            self.journal.prune()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"cannot keep the journal in {state_dir}: {error}",
                "a writable folder with a sound journal.sqlite",
                "free space, or move the damaged journal.sqlite away",
            ) from error
        self.watch = RunWatch(output_dir, self._scanned, alerts_come, loopback_host, page)
        self._outcomes = Outcomes(self.journal, self.watch)
        self.deliverer = Deliverer(output_dir, self.journal, self._settled)
        self.tracer: Tracer = create_tracer(
            run_id="sidecar", model="sidecar", trace_file=state_dir / "traces" / "spans.jsonl", probe=True
        )
        self._known_states: set[str] = set()
        self._ending = threading.Event()
        self._escalator = threading.Thread(target=self._escalate, name="obsinfra-escalation", daemon=True)
        for outcome in WEBHOOK_OUTCOMES:
            self.instruments.add(catalog.SIDECAR_WEBHOOKS, 0, outcome=outcome)
        for action in ACTIONS:
            for outcome in OUTCOMES:
                self.instruments.add(catalog.SIDECAR_COMMANDS, 0, action=action, outcome=outcome)
        for decision in ALERT_DECISIONS:
            self.instruments.add(catalog.SIDECAR_ALERTS, 0, decision=decision)
        for reason in HELD_BACK:
            self.instruments.add(catalog.SIDECAR_HELD_BACK, 0, reason=reason)
        for alert, response in policy.responses.items():
            for step in response.escalate:
                self.instruments.add(catalog.SIDECAR_ESCALATIONS, 0, alert=alert, action=step.action)

    def start(self) -> None:
        """Watch the runs, deliver what an earlier process left, and take the steps that come due."""
        self.watch.start()
        for entry in self.journal.waiting():
            self._log.info("delivering_again", id=entry.command.id, run=entry.command.run)
            self.deliverer.deliver(entry)
        until = time.time() + RESTART_GRACE_SECONDS

        def plan(pages: Pages) -> None:
            for firing in pages.open_firings():
                self._plan_anew(pages, firing)
            pages.postpone(until)

        self.journal.submit(plan).result()
        self._escalator.start()

    def stop(self) -> None:
        """End the watch and the escalation; deliveries under way stay in the journal."""
        self._ending.set()
        if self._escalator.is_alive():
            self._escalator.join(timeout=10)
        self.watch.stop()
        self.deliverer.stop()
        self.tracer.close(timeout=2.0)
        self.journal.close()

    def samples(self) -> list[Sample]:
        """Every gauge and counter, as of now."""
        return [*self.instruments.samples(), *self.watch.run_up(), *self._outcomes.samples()]

    # ---- notifications ---------------------------------------------------------------------------------

    def receive(self, webhook: Webhook) -> Future[Round]:
        """Take on a notification: journal it, begin to deliver what it asks for.

        Returns:
            What was decided, once it is durable; or the `sqlite3.Error` with which that failed, and nothing
            was begun.
        """
        received_at = time.time()
        # Looked up outside the transaction, which nothing shall hold up: each may mean a look at the disk.
        runs = {alert.run: self.watch.find(alert.run) for alert in webhook.alerts if alert.run}
        here = [run for run in self.watch.runs() if run.live] if _any_host(webhook) else []
        traces: dict[str, str | None] = {}

        def decide(pages: Pages) -> Round:
            round_ = Round()
            for alert in webhook.alerts:
                if alert.status == "resolved":
                    self._resolve(pages, alert, received_at, round_)
                else:
                    self._consider(pages, alert, received_at, runs, here, traces, round_)
            return round_

        return self.journal.submit(decide, self._tell)

    def _consider(
        self,
        pages: Pages,
        alert: WebhookAlert,
        now: float,
        runs: Mapping[str, SeenRun | None],
        here: list[SeenRun],
        traces: dict[str, str | None],
        round_: Round,
    ) -> None:
        """Decide about one alert that fires, for each run it speaks of."""
        steps = self.policy.steps(alert.name, alert.action)
        targets: Mapping[str, SeenRun | None] = {alert.run: runs.get(alert.run)}
        if alert.speaks_of_host:
            host = alert.labels.get("host")
            targets = {run.folder.id: run for run in here if host in (None, run.info.host)}
        unusable = None
        if not steps:
            unusable = "informed"
        elif steps[0].action not in ACTIONS:
            unusable = "unknown_action"
        elif not targets or "" in targets:
            unusable = "no_run"
        if unusable is not None:
            _note(pages, round_, _entry(alert, alert.run, now, unusable))
            return
        for run, seen in targets.items():
            _note(pages, round_, self._respond(pages, alert, run, seen, steps, now, traces, round_))

    def _respond(
        self,
        pages: Pages,
        alert: WebhookAlert,
        run: str,
        seen: SeenRun | None,
        steps: tuple[Step, ...],
        now: float,
        traces: dict[str, str | None],
        round_: Round,
    ) -> AlertEntry:
        """Take the first step about an alert for one run, unless there is a reason not to."""
        step = steps[0]
        id = command_id(run, alert.fingerprint, alert.starts_at, step.action)

        def decided(decision: str) -> AlertEntry:
            return _entry(alert, run, now, decision, step.action)

        firing = pages.firing(run, alert.fingerprint, alert.starts_at)
        over = firing or pages.firing("", alert.fingerprint, alert.starts_at)
        ended_at = over.resolved_at if over is not None else None
        if ended_at is None and (pages.known(id) or (firing is not None and firing.taken == 0)):
            return decided("duplicate")
        if age_seconds(alert, datetime.fromtimestamp(now, UTC)) > STALE_SECONDS:
            return decided("expired")
        if seen is None:
            return decided("unknown_run")
        if not seen.live:
            return decided("run_ended")
        if over is not None and ended_at is not None:
            # Sent before the end and heard after it; or it fires again, as after a silence, or when
            # Prometheus is back with an Alertmanager that had given it up. Alertmanager knows which.
            if self._still_firing is None and now - ended_at < LATE_SECONDS:
                return decided("duplicate")
            undo = self._taken_over(pages, alert, run, now)
            pages.put(replace(_firing(alert, run), next_at=now, undo=undo, again=over.again + 1))
            return decided("again")
        if firing is None:
            firing = replace(_firing(alert, run), undo=self._taken_over(pages, alert, run, now))
            pages.put(self._after(firing, step, steps, now))
        if (reason := self._held_back(pages, run, step.action, now)) is not None:
            return decided(reason)
        if id not in traces:
            traces[id] = self._trace(firing, step.action, now)
        entry = self._command(firing, step, id, now, traces[id])
        if pages.add_command(entry):
            round_.commands.append(entry)
        return decided("accepted")

    @staticmethod
    def _taken_over(pages: Pages, alert: WebhookAlert, run: str, now: float) -> tuple[str, ...]:
        """End earlier firings of the same alert, whose resolution was never heard; what they have to undo."""
        undo: tuple[str, ...] = ()
        for earlier in pages.runs_of(alert.fingerprint, alert.starts_at):
            if earlier.run == run:
                undo = tuple(dict.fromkeys((*undo, *earlier.undo)))
                pages.put(replace(earlier, resolved_at=now, next_at=None, undo=()))
        return undo

    def _held_back(self, pages: Pages, run: str, action: str, now: float) -> str | None:
        """Why the policy lets this action wait for this run now; None when it does not."""
        if self.policy.dry_run:
            return "dry_run"
        until = now + CLOCK_SKEW_SECONDS  # what lies beyond is from before the clock was set back
        if pages.count(run, action, now - self.policy.cool_down(action), until):
            return "cool_down"
        most = self.policy.emergency_checkpoints_per_hour
        if action == EMERGENCY_CHECKPOINT.name and pages.count(run, action, now - HOUR, until) >= most:
            return "hourly_limit"
        return None

    def _resolve(self, pages: Pages, alert: WebhookAlert, now: float, round_: Round) -> None:
        _note(pages, round_, _entry(alert, alert.run, now, "resolved"))
        unknown = pages.firing(alert.run, alert.fingerprint, alert.starts_at) is None
        if unknown and self.policy.steps(alert.name, alert.action):  # its beginning may come later than this
            pages.put(replace(_firing(alert, alert.run), resolved_at=now))
        for firing in pages.runs_of(alert.fingerprint, alert.starts_at):
            if alert.run in ("", firing.run):
                self._end(pages, firing, now, round_)

    def _end(self, pages: Pages, firing: Firing, now: float, round_: Round) -> None:
        """An alert resolved: no further step, and what was done is undone, unless another still wants it."""
        pages.put(replace(firing, resolved_at=now, next_at=None))
        still_wanted = {
            name for other in pages.open_firings(firing.run) for name in (*other.undo, *self._done_for(other))
        }
        for name in reversed(firing.undo):
            action = ACTIONS.get(name)
            if action is None or action.undo is None or name in still_wanted:
                continue
            seen = self.watch.find(firing.run)
            if seen is None or not seen.live:
                continue
            step = Step(action.undo, dict(action.undo_arguments))
            decision = "dry_run" if self.policy.dry_run else "undone"
            if decision == "undone":
                id = _id(firing, f"undo {name}")
                entry = self._command(
                    firing, step, id, now, self._trace(firing, step.action, now), "resolved"
                )
                if pages.add_command(entry):
                    round_.commands.append(entry)
            _note(pages, round_, _firing_entry(firing, now, decision, step.action, status="resolved"))

    def _done_for(self, firing: Firing) -> set[str]:
        """Actions of the steps taken about an alert, to be undone or not."""
        return {step.action for step in self.policy.steps(firing.name, firing.label)[: firing.taken]}

    # ---- steps that come due -----------------------------------------------------------------------------

    def _escalate(self) -> None:
        while not self._ending.wait(ESCALATE_EVERY_SECONDS):
            try:
                self.take_due_steps(time.time())
            except Exception as error:  # tried again at the next turn
                self._log.error("escalation_error", exc_info=error)

    def take_due_steps(self, now: float) -> None:
        """Take the next step about every alert that has fired long enough since the one before.

        Raises:
            sqlite3.Error: the journal failed; it is done at the next call.
        """
        failed: Exception | None = None
        for firing in self.journal.due(now):
            fires = self._still_firing is None or self._still_firing(firing)
            seen = self.watch.find(firing.run)

            def step(
                pages: Pages, firing: Firing = firing, fires: bool | None = fires, seen: SeenRun | None = seen
            ) -> Round:
                round_ = Round()
                present = pages.firing(firing.run, firing.fingerprint, firing.starts_at)
                if present != firing:  # resolved, or taken, since it was looked up
                    return round_
                if fires is None:
                    pages.put(replace(firing, next_at=now + UNSURE_SECONDS))
                elif not fires:
                    self._end(pages, firing, now, round_)
                elif seen is None or not seen.live:
                    pages.put(replace(firing, resolved_at=now, next_at=None))  # with nobody to undo it for
                else:
                    self._take_next(pages, firing, now, round_)
                return round_

            try:
                self.journal.submit(step, self._tell).result()
            except Exception as error:  # the others must not wait for this one
                failed = failed or error
        if failed is not None:
            raise failed

    def _take_next(self, pages: Pages, firing: Firing, now: float, round_: Round) -> None:
        steps = self.policy.steps(firing.name, firing.label)
        if firing.taken >= len(steps):  # the policy is another one since a restart
            again_at = now + self._watches if firing.undo and self._watches is not None else None
            pages.put(replace(firing, next_at=again_at))
            return
        step = steps[firing.taken]
        pages.put(self._after(firing, step, steps, now))
        taken = "escalated" if firing.taken else "accepted"
        unknown = None if step.action in ACTIONS else "unknown_action"
        decision = unknown or self._held_back(pages, firing.run, step.action, now) or taken
        if decision == taken:
            id = _id(firing, f"{step.action} {firing.taken}")
            why = f"still firing, step {firing.taken + 1}" if firing.taken else "firing again"
            entry = self._command(firing, step, id, now, self._trace(firing, step.action, now), why)
            if pages.add_command(entry):
                round_.commands.append(entry)
        _note(pages, round_, _firing_entry(firing, now, decision, step.action))

    def _plan_anew(self, pages: Pages, firing: Firing) -> None:
        """When its next step is due by the present policy, which may be another one than that of the last."""
        steps = self.policy.steps(firing.name, firing.label)
        if not 0 < firing.taken < len(steps):
            return
        since = pages.last_step_at(firing) or firing.starts_at
        pages.put(replace(firing, next_at=since + steps[firing.taken].after_seconds))

    def _after(self, firing: Firing, step: Step, steps: tuple[Step, ...], now: float) -> Firing:
        """`firing` once `step`, its next one, was taken or held back."""
        taken = firing.taken + 1
        undo = tuple(dict.fromkeys((*firing.undo, step.action))) if step.undo else firing.undo
        next_at = now + steps[taken].after_seconds if taken < len(steps) else None
        if next_at is None and undo and self._watches is not None:
            next_at = now + self._watches
        return replace(firing, taken=taken, next_at=next_at, undo=undo)

    # ---- commands ----------------------------------------------------------------------------------------

    def give(
        self, run: str, action: str, args: Mapping[str, Any], *, reason: str, source: str, id: str | None
    ) -> tuple[Future[bool], Command]:
        """Take on a command that a person or a program gives through the sidecar.

        Returns:
            Whether it is new, once it is durable, and the command.

        Raises:
            CommandError: the run is not live, the command is too big, or this is a dry run.
        """
        if self.policy.dry_run:
            raise CommandError("a dry run; expected a sidecar without dry_run")
        seen = self.watch.find(run)
        if seen is None or not seen.live:
            raise CommandError(f"run {run} is {seen.state if seen else 'unknown'}; expected a live one")
        id = id or f"api-{time.time_ns() // 1_000_000}-{secrets.token_hex(4)}"
        command = new_command(run, action, source=source, reason=reason, args=args, id=id)
        if len(command.to_json().encode()) > MAX_COMMAND_BYTES:
            raise CommandError(f"args and reason; expected {MAX_COMMAND_BYTES} bytes at most")
        entry = CommandEntry(command, "", command.issued_at, command.issued_at)

        def deliver(fresh: bool) -> None:
            if fresh:
                self.deliverer.deliver(entry)

        return self.journal.submit(lambda pages: pages.add_command(entry), deliver), command

    @staticmethod
    def _command(
        firing: Firing, step: Step, id: str, now: float, traceparent: str | None, why: str = ""
    ) -> CommandEntry:
        args = dict(step.args)
        if "alert" in ACTIONS[step.action].argument_names and (step.undo or step.action != PAUSE.name):
            args.setdefault("alert", firing.name)  # what ends with no alert is none of theirs
        about = f"alert {firing.name}: {firing.summary}".rstrip(": ")
        command = new_command(
            firing.run,
            step.action,
            source="sidecar",
            reason=f"{about} ({why})" if why else about,
            args=args,
            id=id,
            lifetime_seconds=COMMAND_SECONDS,
            traceparent=traceparent,
        )
        return CommandEntry(command, firing.name, firing.starts_at, now)

    def _trace(self, firing: Firing, action: str, now: float) -> str | None:
        traceparent = self.tracer.emit(
            f"alert {firing.name}",
            int(min(firing.starts_at, now) * 1e9),
            int(now * 1e9),
            {
                "obsinfra.run": firing.run,
                "obsinfra.alert": firing.name,
                "obsinfra.fingerprint": firing.fingerprint,
                "obsinfra.action": action,
            },
        )
        return traceparent or None

    def _tell(self, round_: Round) -> None:
        """After the commit: deliver, count, log."""
        for entry in round_.commands:
            self.deliverer.deliver(entry)
        for seen in round_.alerts:
            self.instruments.add(catalog.SIDECAR_ALERTS, decision=seen.decision)
            if seen.decision in HELD_BACK:
                self.instruments.add(catalog.SIDECAR_HELD_BACK, reason=seen.decision)
            if seen.decision in ("escalated", "undone"):
                self.instruments.add(catalog.SIDECAR_ESCALATIONS, alert=seen.name, action=seen.action)
            if seen.decision in QUIET_DECISIONS:
                continue  # there may be hundreds a second; the journal has them
            log = self._log.warning if seen.decision in UNUSABLE_DECISIONS else self._log.info
            log(
                "alert",
                alert=seen.name,
                label_run=seen.run,
                severity=seen.severity,
                status=seen.status,
                decision=seen.decision,
                action=seen.action,
            )

    def _settled(self, entry: CommandEntry, outcome: str, ack: Ack | None) -> None:
        now = time.time()
        command = entry.command
        self.instruments.add(catalog.SIDECAR_COMMANDS, action=command.action, outcome=outcome)
        self.instruments.observe(
            catalog.SIDECAR_DELIVERY_SECONDS, now - entry.received_at, action=command.action
        )
        self.tracer.emit(
            f"delivery {command.action}",
            int(entry.received_at * 1e9),
            int(now * 1e9),
            {"obsinfra.run": command.run, "obsinfra.command.id": command.id, "obsinfra.outcome": outcome},
            parent_traceparent=command.traceparent,
        )
        self._log.info(
            "command_settled",
            id=command.id,
            label_run=command.run,
            action=command.action,
            alert=entry.alert,
            outcome=outcome,
            seconds_from_webhook=round(now - entry.received_at, 4),
            ack=ack.to_json() if ack else None,
        )

    def _scanned(self, states: dict[str, int]) -> None:
        self._known_states |= states.keys()
        for state in self._known_states:
            self.instruments.set(catalog.SIDECAR_RUNS, states.get(state, 0), state=state)


def _firing(alert: WebhookAlert, run: str) -> Firing:
    """The alert as it begins to fire for a run."""
    return Firing(
        run=run,
        fingerprint=alert.fingerprint,
        starts_at=alert.starts_at,
        name=alert.name,
        severity=alert.severity,
        summary=alert.annotations.get("summary", ""),
        label=alert.action,
        taken=0,
        next_at=None,
    )


def _id(firing: Firing, what: str) -> str:
    """Of a later command about `firing`."""
    again = f" again {firing.again}" if firing.again else ""
    return command_id(firing.run, firing.fingerprint, firing.starts_at, what + again)


def _note(pages: Pages, round_: Round, entry: AlertEntry) -> None:
    pages.add_alert(entry)
    round_.alerts.append(entry)


def _any_host(webhook: Webhook) -> bool:
    return any(alert.speaks_of_host for alert in webhook.alerts)


def _entry(alert: WebhookAlert, run: str, now: float, decision: str, action: str = "") -> AlertEntry:
    return AlertEntry(
        received_at=now,
        name=alert.name,
        run=run,
        severity=alert.severity,
        status=alert.status,
        fingerprint=alert.fingerprint,
        starts_at=alert.starts_at,
        decision=decision,
        action=action,
    )


def _firing_entry(
    firing: Firing,
    now: float,
    decision: str,
    action: str,
    status: Literal["firing", "resolved"] = "firing",
) -> AlertEntry:
    return AlertEntry(
        received_at=now,
        name=firing.name,
        run=firing.run,
        severity=firing.severity,
        status=status,
        fingerprint=firing.fingerprint,
        starts_at=firing.starts_at,
        decision=decision,
        action=action,
    )
