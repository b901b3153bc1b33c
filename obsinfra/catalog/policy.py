"""What the sidecar does about a firing alert, as data: steps, cool-downs, limits; and the user's changes.

The sidecar reads it, the settings under `[policy]` change it, docs/sidecar.md explains it. Knows alerts and
actions by their names; no run, no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from obsinfra.catalog import actions
from obsinfra.catalog.alerts import BY_KEY, BY_NAME
from obsinfra.errors import ConfigError

MAX_STEPS = 10
WEEK_MINUTES = 7 * 24 * 60.0


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do about an alert.

    Attributes:
        action: what the run is told.
        args: arguments of the action besides `alert`, which is added where the action takes it.
        after_minutes: taken when the alert still fires so long after the step before; of a first step, 0.
        undo: do what undoes the action (`catalog.actions`: resume after pause) when the alert resolves.
    """

    action: str
    args: Mapping[str, Any] = field(default_factory=dict)
    after_minutes: float = 0.0
    undo: bool = False

    @property
    def after_seconds(self) -> float:
        """`after_minutes` in seconds."""
        return self.after_minutes * 60.0


@dataclass(frozen=True, slots=True)
class Response:
    """What is done about one alert, by its name.

    Attributes:
        first: taken at once; None: the action that the alert's own label `action` names.
        escalate: further steps, in order, while it goes on firing. None of them without a first one.
    """

    first: Step | None = None
    escalate: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """How the sidecar acts.

    Attributes:
        dry_run: journal what would be done, do nothing.
        cool_down_seconds: a run is not told the same action twice within this long, whichever alerts ask for
            it: what was done a moment ago counts for both. Undoing is never held back.
        cool_downs: action → its own cool-down in seconds.
        emergency_checkpoints_per_hour: for one run, at most.
        responses: alert name → what is done; alerts that are not here get the action of their label.
    """

    dry_run: bool = False
    cool_down_seconds: float = 30.0
    cool_downs: Mapping[str, float] = field(default_factory=dict)
    emergency_checkpoints_per_hour: int = 20
    responses: Mapping[str, Response] = field(default_factory=dict)

    def steps(self, alert: str, label: str) -> tuple[Step, ...]:
        """What is done about `alert`, whose label `action` is `label`; empty when it only informs."""
        response = self.responses.get(alert, Response())
        first = response.first or (Step(label) if label else None)
        return () if first is None or first.action == NOTHING else (first, *response.escalate)

    def cool_down(self, action: str) -> float:
        """Seconds between two commands of this action for one run."""
        return self.cool_downs.get(action, self.cool_down_seconds)


NOTHING = "none"
"""As an action in `[policy.alerts.<name>]`: the alert only informs."""

DEFAULT_POLICY = Policy(
    # Stopping, pausing and going on again are wanted at once, however often; looking closely takes its time.
    cool_downs={"stop": 0.0, "pause": 0.0, "resume": 0.0, "profile": 600.0, "memory_snapshot": 600.0,
                "dump_stacks": 60.0, "scale_lr": 600.0, "rollback": 600.0},
    responses={
        # First save, then let it cool: the loop goes on as soon as the alert resolves, at its clearing
        # threshold. A device that stays hot with nothing to do has a fault that training cannot mend.
        "HighGPUTemperature": Response(
            escalate=(Step("pause", after_minutes=5.0, undo=True), Step("stop", after_minutes=15.0))
        ),
        # A hang that outlasts the emergency checkpoint: whoever comes wants to know what each thread does.
        "NoProgress": Response(escalate=(Step("dump_stacks", after_minutes=1.0),)),
    },
)  # fmt: skip


def policy_with(changes: Mapping[str, Any], *, known_actions_only: bool = True) -> Policy:
    """The default policy with the user's `[policy]` table applied.

    Args:
        changes: `dry_run`, `cool_down_seconds`, `emergency_checkpoints_per_hour`, `cool_down` (action →
            seconds) and `alerts` (alert name → table with `action`, `args`, `undo` and the list `escalate` of
            tables with `action`, `args`, `undo` and `after_minutes`). What an alert's table does not name
            stays as it is.
        known_actions_only: whether an action that nobody registered in this process is a mistake.

    Raises:
        ConfigError: an unknown name, or a value that does not fit; names it, and what would.
    """
    policy = DEFAULT_POLICY
    _only(
        changes,
        ("dry_run", "cool_down_seconds", "emergency_checkpoints_per_hour", "cool_down", "alerts"),
        "policy",
    )
    if "dry_run" in changes:
        policy = replace(policy, dry_run=_truth(changes["dry_run"], "policy.dry_run"))
    if "cool_down_seconds" in changes:
        seconds = _number(changes["cool_down_seconds"], "policy.cool_down_seconds", 86_400.0)
        policy = replace(policy, cool_down_seconds=seconds)
    if "emergency_checkpoints_per_hour" in changes:
        most = changes["emergency_checkpoints_per_hour"]
        if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= 3_600:
            raise _wrong("policy.emergency_checkpoints_per_hour", most, "a whole number from 1 to 3600")
        policy = replace(policy, emergency_checkpoints_per_hour=most)
    cool_downs = dict(policy.cool_downs)
    for action, seconds in _table(changes.get("cool_down", {}), "policy.cool_down").items():
        where = f"policy.cool_down.{action}"
        cool_downs[_action(action, where, known_actions_only)] = _number(seconds, where, 86_400.0)
    responses = dict(policy.responses)
    for alert, response in _table(changes.get("alerts", {}), "policy.alerts").items():
        where = f"policy.alerts.{alert}"
        if alert in BY_KEY:
            name = BY_KEY[alert].name
            raise ConfigError(f"[{where}]", f"the alert's name, [policy.alerts.{name}]", "correct it there")
        responses[alert] = _response(
            _table(response, where), where, responses.get(alert, Response()), known_actions_only
        )
        row = BY_NAME.get(alert)
        if row is not None and row.action is None and responses[alert].first is None:
            raise ConfigError(
                f"[{where}] without action, and the alert has none of its own",
                "a first step for the further ones to follow",
                f"add {where}.action",
            )
    return replace(policy, cool_downs=cool_downs, responses=responses)


def _response(table: Mapping[str, Any], where: str, before: Response, known_only: bool) -> Response:
    _only(table, ("action", "args", "undo", "escalate"), where)
    first = before.first
    if "action" in table:
        if table["action"] == NOTHING:
            if more := sorted(set(table) - {"action"}):
                raise ConfigError(f"{where}.{more[0]} with action none", "action alone", "remove one of them")
            return Response(Step(NOTHING))
        first = _step({key: value for key, value in table.items() if key != "escalate"}, where, known_only)
    elif "args" in table or "undo" in table:
        raise ConfigError(
            f"{where} has args or undo but no action", "an action they belong to", f"add {where}.action"
        )
    escalate = before.escalate
    if "escalate" in table:
        steps = table["escalate"]
        if not isinstance(steps, (list, tuple)) or len(steps) > MAX_STEPS:
            raise _wrong(f"{where}.escalate", steps, f"a list of at most {MAX_STEPS} tables")
        escalate = tuple(
            _step(
                _table(step, f"{where}.escalate[{number}]"),
                f"{where}.escalate[{number}]",
                known_only,
                later=True,
            )
            for number, step in enumerate(steps)
        )
    return Response(first, escalate)


def _step(table: Mapping[str, Any], where: str, known_only: bool, *, later: bool = False) -> Step:
    _only(table, ("action", "args", "undo", *(("after_minutes",) if later else ())), where)
    if "action" not in table:
        raise ConfigError(
            f"{where} without action", f"one of {', '.join(actions.ACTIONS)}", f"add {where}.action"
        )
    name = _action(table["action"], f"{where}.action", known_only)
    args = dict(_table(table.get("args", {}), f"{where}.args"))
    row = actions.ACTIONS.get(name)
    if row is not None and (problem := row.problem(args)) is not None:
        raise ConfigError(f"{where}.args: {problem}")
    undo = _truth(table.get("undo", False), f"{where}.undo")
    if undo and row is not None and row.undo is None:
        undoable = ", ".join(action.name for action in actions.ACTIONS.values() if action.undo)
        raise ConfigError(f"{where}.undo with action {name}", f"an action that can be undone: {undoable}")
    minutes = 0.0
    if later:
        if "after_minutes" not in table:
            raise ConfigError(
                f"{where} without after_minutes",
                "minutes after the step before",
                f"add {where}.after_minutes",
            )
        minutes = _number(table["after_minutes"], f"{where}.after_minutes", WEEK_MINUTES)
    return Step(name, args, minutes, undo)


def _only(table: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    if unknown := sorted(set(table) - set(allowed)):
        raise ConfigError(
            f"unknown name {unknown[0]!r} under [{where}]", f"one of {', '.join(allowed)}", "correct it there"
        )


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(where, value, f"a table, as [{where}]")
    return value


def _action(value: Any, where: str, known_only: bool) -> str:
    if not isinstance(value, str) or not (
        value in actions.ACTIONS or (not known_only and value.isidentifier())
    ):
        raise _wrong(where, value, f"one of {', '.join(actions.ACTIONS)}")
    return value


def _truth(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(where, value, "true or false")
    return value


def _number(value: Any, where: str, most: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
        raise _wrong(where, value, f"a number from 0 to {most:g}")
    return float(value)


def _wrong(where: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(
        f"{where} = {actions.shown(value)}", expected, f"correct it under [{where.rpartition('.')[0]}]"
    )
