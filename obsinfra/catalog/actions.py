"""Every action the trainer can be told to do, once. Read by the control channel, the sidecar and the CLI."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Action:
    """One thing a command may ask of a trainer.

    Attributes:
        name: the word on the wire.
        summary: one sentence for `--help` and the docs.
        arguments: name → meaning of each optional argument (all are JSON scalars).
        ends_run: whether training stops after it.
    """

    name: str
    summary: str
    arguments: dict[str, str]
    ends_run: bool = False


CHECKPOINT = Action(
    "checkpoint",
    "Commit a regular checkpoint at the next step boundary.",
    {},
)
EMERGENCY_CHECKPOINT = Action(
    "emergency_checkpoint",
    "Commit an emergency checkpoint: the current state when it is sound, else the last good snapshot.",
    {"alert": "name of the alert that asked for it"},
)
STOP = Action(
    "stop",
    "Commit a checkpoint, then end the run cleanly.",
    {"grace_seconds": "how long the loop may take to reach a step boundary (default: the run's setting)"},
    ends_run=True,
)

ACTIONS: dict[str, Action] = {action.name: action for action in (CHECKPOINT, EMERGENCY_CHECKPOINT, STOP)}
