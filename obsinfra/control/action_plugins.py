"""Actions of other packages, found by entry point and added to the table.

Called by the trainer, which carries them out, and by the CLI, which only wants their rows. Knows nothing of
what an executor does; whatever a package does wrong becomes a `PluginProblem`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from obsinfra.catalog.actions import BUILT_IN, Action, register
from obsinfra.errors import ObsinfraError

GROUP = "obsinfra.actions"
"""Entry-point group. Each names an object (a module will do) with `action`, an `Action`, and `execute`."""


@dataclass(frozen=True, slots=True)
class ActionPlugin:
    """What an entry point of `GROUP` leads to; any object with these two attributes will do.

    Attributes:
        action: its row of the table.
        execute: called with the run and the order, as `observation.actions.Executor` says.
    """

    action: Action
    execute: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class PluginProblem:
    """An entry point that could not be used, and why."""

    name: str
    target: str
    problem: str


def load_action_plugins() -> tuple[dict[str, ActionPlugin], list[PluginProblem]]:
    """Import every announced action and register it; those that cannot be are told of and left out."""
    found: dict[str, ActionPlugin] = {}
    problems: list[PluginProblem] = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        try:
            plugin = _plugin(point)
            if plugin.action.name in found or plugin.action.name in (action.name for action in BUILT_IN):
                raise ValueError(f"the name {plugin.action.name!r} is taken; expected a new one")
            register(plugin.action)
        except Exception as error:  # somebody else's package; it must not take the training down
            text = str(error) if isinstance(error, (ObsinfraError, ValueError)) else repr(error)
            problems.append(PluginProblem(point.name, point.value, text[:500]))
            continue
        found[plugin.action.name] = plugin
    return found, problems


def _plugin(point: EntryPoint) -> ActionPlugin:
    loaded = point.load()
    action, execute = getattr(loaded, "action", None), getattr(loaded, "execute", None)
    if not isinstance(action, Action) or not callable(execute):
        raise ValueError(
            f"{point.value} is a {type(loaded).__name__} without 'action' (an "
            "obsinfra.catalog.actions.Action) and 'execute' (a callable)"
        )
    return ActionPlugin(action, execute)
