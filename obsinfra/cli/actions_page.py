"""docs/actions.md, rendered from the table of actions. Called by `obsinfra docs`."""

from __future__ import annotations

import json

from obsinfra.catalog.actions import ALERT, BUILT_IN, Action

_HEAD = """# Actions

Generated from `obsinfra/catalog/actions.py` by `obsinfra docs write`; do not edit by hand.

What a run can be told to do: by hand, by an alert through the sidecar, or by the trainer's own
evaluator.

    obsinfra actions                        # all of them
    obsinfra actions profile                # one, with its arguments
    obsinfra command latest profile steps=10
    obsinfra command my-run rollback before_step=41000 skip=true --reason "loss spike"

Each command is acknowledged: `accepted`, `running`, then `done`, `failed`, `rejected` (an unknown
action, an argument that is unknown or out of bounds; the message says which, what was expected, and what
to do) or `expired`. A `done` carries what was done, and `seconds`, how long it took; both are logged in
`logs/system.jsonl`, and the time is in `obsinfra_control_action_seconds`. An action that fails never
ends the training.

Most actions are carried out between two steps, on the loop's thread. Those marked *at once* are safe at
any moment and are carried out on a thread of their own, even while the loop hangs or is paused; one of
each kind at a time.

Every action also takes `alert`, the name of the alert that asked for it.

Of several ranks, rank 0 hears, and all act at the same step: docs/distributed.md. What an executor gets
and gives is made for that: plain arguments in, a plain result out.
"""

_TAIL = """
## Adding an action

A package announces one by an entry point of the group `obsinfra.actions`:

    [project.entry-points."obsinfra.actions"]
    greet = "my_package.actions:greet"

It leads to an object with `action`, its row of the table, and `execute`, what does it:

    from obsinfra.catalog.actions import Action, Argument
    from obsinfra.control.action_plugins import ActionPlugin

    def execute(run, order):
        return {"greeting": f"hello {order.arguments['name']}", "step": run.step}

    name = Argument("name", "str", "Whom.", default="world")
    greet = ActionPlugin(Action("greet", "Say hello.", (name,)), execute)

`execute` is called between two steps with the `ObservedRun` and the order: its `arguments`, defaults
filled in and bounds checked, and the `command`. It returns what it did, as JSON, or raises to say that
it failed. One that takes several steps is a generator: it yields once per step and returns its result.
With `at="any_time"` it is called on a thread of its own instead, and must not touch the model or
anything else that a step changes; `run.actions.visit(call, seconds)` has something done between two
steps.

A package that cannot be imported, or an action whose name is taken, is logged (`action_plugin_failed`),
counted (`obsinfra_telemetry_errors_total{component="actions"}`) and left out; training goes on without
it.
"""


def render_actions_page() -> str:
    """The whole page."""
    return _HEAD + "".join(_section(action) for action in BUILT_IN) + _TAIL


def _section(action: Action) -> str:
    lines = ["", f"## {action.name}", "", action.summary + (" *At once.*" if action.at == "any_time" else "")]
    if arguments := [argument for argument in action.arguments if argument != ALERT]:
        lines += ["", "| argument | expected | default | meaning |", "|---|---|---|---|"]
        for argument in arguments:
            default = "required" if argument.required else "–"
            if argument.default is not None:
                default = f"`{json.dumps(argument.default)}`"
            lines.append(f"| `{argument.name}` | {argument.expected} | {default} | {argument.help} |")
    if action.details:
        lines += ["", action.details]
    if action.undo is not None:
        given = "".join(f" {name}={json.dumps(value)}" for name, value in action.undo_arguments.items())
        lines += ["", f"Undone by `{action.undo}{given}`."]
    return "\n".join(lines) + "\n"
