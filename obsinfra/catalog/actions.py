"""Every action a trainer can be told to do, once: its arguments, their bounds, when it is safe.

Read by the control channel, the sidecar, the CLI and docs/actions.md; `observation.actions` carries them out.
Plain data: knows no trainer and no channel. Packages add rows through `register`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from obsinfra.errors import ConfigError

ArgumentKind = Literal["int", "float", "bool", "str", "choice"]

MAX_TEXT = 2_000
"""Characters of an argument."""

_EXPECTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of an action; a JSON scalar on the wire.

    Attributes:
        name: the key on the wire.
        kind: `int`, `float`, `bool`, `str` or `choice`.
        help: what it does, in one sentence; units included.
        default: what holds when it is not given; None: nothing.
        minimum, maximum: bounds of a number, both allowed themselves.
        choices: what a `choice` may be.
        required: whether it must be given.
    """

    name: str
    kind: ArgumentKind
    help: str
    default: Any = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    required: bool = False

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.kind == "choice":
            return "one of " + ", ".join(self.choices)
        if self.kind == "str":
            return f"text of at most {MAX_TEXT} characters"
        bounds = ""
        if self.minimum is not None and self.maximum is not None:
            bounds = f" from {self.minimum:.10g} to {self.maximum:.10g}"
        elif self.minimum is not None:
            bounds = f" from {self.minimum:.10g} on"
        elif self.maximum is not None:
            bounds = f" up to {self.maximum:.10g}"
        return _EXPECTED[self.kind] + bounds

    def accepts(self, value: Any) -> bool:
        """Whether `value` is of the kind and within the bounds."""
        if self.kind == "bool":
            return isinstance(value, bool)
        if self.kind == "choice":
            return isinstance(value, str) and value in self.choices
        if self.kind == "str":
            return isinstance(value, str) and len(value) <= MAX_TEXT
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "int" else (int, float)):
            return False
        try:
            number = float(value)
        except OverflowError:
            return False
        above = self.minimum is None or number >= self.minimum
        below = self.maximum is None or number <= self.maximum
        return math.isfinite(number) and above and below

    def parse(self, text: str) -> Any:
        """The value that `text`, as a person types it, means; `text` itself where it means none."""
        try:
            if self.kind == "int":
                return int(text)
            if self.kind == "float":
                return float(text)
        except ValueError:
            return text
        return _WORDS.get(text.lower(), text) if self.kind == "bool" else text


@dataclass(frozen=True, slots=True)
class Action:
    """One thing a command may ask of a trainer.

    Attributes:
        name: the word on the wire.
        summary: one sentence for `--help` and the docs.
        arguments: what may be given with it.
        at: `boundary`: carried out between two steps; `any_time`: safe at any moment and carried out at once,
            on a thread of its own, even while the loop hangs.
        ends_run: whether training stops after it.
        undo: name of the action that undoes it.
        undo_arguments: and what to give with that one.
        details: what it leaves and what to know of it, for the docs; paragraphs.
    """

    name: str
    summary: str
    arguments: tuple[Argument, ...] = ()
    at: Literal["boundary", "any_time"] = "boundary"
    ends_run: bool = False
    undo: str | None = None
    undo_arguments: Mapping[str, Any] = field(default_factory=dict)
    details: str = ""

    @property
    def argument_names(self) -> tuple[str, ...]:
        """Names of all arguments, in the order of the table."""
        return tuple(argument.name for argument in self.arguments)

    def problem(self, given: Mapping[str, Any]) -> str | None:
        """What is wrong with these arguments, what was expected and how to mend it; None when nothing is.

        A value of None counts as not given.
        """
        known = {argument.name: argument for argument in self.arguments}
        for name, value in given.items():
            if (argument := known.get(name)) is None:
                return (
                    f"unknown argument {shown(name)} of {self.name}; expected one of: "
                    f"{', '.join(known) or 'none'}; fix: leave it out or correct its name"
                )
            if value is not None and not argument.accepts(value):
                return (
                    f"argument {name} of {self.name} is {shown(value)}; expected {argument.expected}; "
                    f"fix: give {name} such a value, or leave it out"
                )
        for argument in self.arguments:
            if argument.required and given.get(argument.name) is None:
                return (
                    f"{self.name} without {argument.name}; expected {argument.expected}; "
                    f"fix: add {argument.name}=…"
                )
        return None

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name, with the defaults of those not given."""
        present = {name: value for name, value in given.items() if value is not None}
        return {argument.name: present.get(argument.name, argument.default) for argument in self.arguments}


def shown(value: Any) -> str:
    """`value` as a message shows it: short, and nested values by their kind alone.

    They may lie deeper than repr can follow.
    """
    text = f"of type {type(value).__name__}" if isinstance(value, (dict, list)) else _repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # an integer of more digits than Python turns into text
        return f"of type {type(value).__name__}"


ALERT = Argument("alert", "str", "Name of the alert that asked for it.")
"""Accepted by every built-in action, so that any of them can follow an alert."""

CHECKPOINT = Action(
    "checkpoint",
    "Commit a regular checkpoint at the next step boundary.",
    (ALERT,),
    details="The loop waits for a copy in memory only; the outcome is told once the checkpoint is "
    "durable. Where the loop does not come to a boundary within the grace, its last snapshot "
    "is committed without it, and `stacks` in the result tells what it was doing. The same "
    "holds for `emergency_checkpoint` and `stop`.",
)
EMERGENCY_CHECKPOINT = Action(
    "emergency_checkpoint",
    "Commit an emergency checkpoint: the current state when it is sound, else the last good snapshot.",
    (ALERT,),
)
STOP = Action(
    "stop",
    "Commit a checkpoint, then end the run cleanly.",
    (
        Argument(
            "grace_seconds",
            "float",
            "How long the loop may take to a step boundary, in seconds; after that the last snapshot is "
            "committed without it. Default: the run's setting.",
            minimum=1.0,
            maximum=3_600.0,
        ),
        ALERT,
    ),
    ends_run=True,
)
PAUSE = Action(
    "pause",
    "Hold the loop at the next step boundary; metrics and commands go on being served.",
    (
        Argument(
            "max_seconds",
            "float",
            "Go on by itself after so many seconds. Default: only when told to.",
            minimum=1.0,
            maximum=604_800.0,
        ),
        ALERT,
    ),
    undo="resume",
    details="The run's state is `paused` in run.json, `obsinfra_run_state` and on the page. The time counts "
    'as lost (`obsinfra_lost_seconds_total{cause="paused"}`), and neither the watchdog nor an alert takes it '
    "for a hang. A pause that ends with its alert (`alert` is given) and one that a person ends, because a "
    "person ordered it or a step of the policy without `undo`, are two: the loop goes on when both have "
    "ended, and `resume` with `alert` ends that of alerts alone. "
    "`checkpoint`, `stop`, a signal, and everything else here work meanwhile; regular checkpoints stay due.",
)
RESUME = Action(
    "resume",
    "Let a paused loop go on.",
    (ALERT,),
    undo="pause",
    details="Whoever paused it. With `alert`, as the sidecar gives it when an alert resolves, a pause that a "
    "person is to end stays, and `paused` is true.",
)
PROFILE = Action(
    "profile",
    "Record the next steps with torch.profiler: a Chrome trace and the top operators, to profiles/.",
    (
        Argument("steps", "int", "Steps recorded.", default=5, minimum=1, maximum=1_000),
        Argument(
            "warmup", "int", "Steps before them that are not, so that none is of a cold profiler.",
            default=1, minimum=0, maximum=100,
        ),
        Argument("top", "int", "Operators in the summary.", default=25, minimum=1, maximum=1_000),
        Argument("memory", "bool", "Also record allocations.", default=False),
        Argument("shapes", "bool", "Tell operators apart by the shapes of their inputs.", default=False),
        Argument("stacks", "bool", "Also record Python source lines; slow.", default=False),
        ALERT,
    ),
    details="Leaves `profiles/step<first step>-<time>.trace.json` for https://ui.perfetto.dev, "
    "`.summary.json` and `.summary.txt` with the operators that took most time of their own: "
    "on the device where there is one, else on the CPU. One profile at a time; while the loop "
    "records one of its own it is refused. Written between two steps, which takes the longer "
    "the more was recorded.",
)  # fmt: skip
DUMP_STACKS = Action(
    "dump_stacks",
    "Write what every thread is doing to logs/, Python and (with py-spy installed) native frames.",
    (
        Argument("native", "bool", "Also ask py-spy, which halts the process for a moment.", default=True),
        ALERT,
    ),
    at="any_time",
    details="Leaves `logs/stacks-<time>.txt`: each thread's Python frames and what the kernel says it "
    "waits for, the child processes, and native frames by `py-spy dump --native`; of several ranks "
    "also `logs/collectives-rank<N>-<time>.json`, the last collectives each has called. Without "
    "py-spy, or where the kernel does not allow it (a container needs the capability "
    "SYS_PTRACE), the file and the result say so. A thread that holds the interpreter's lock "
    "in native code keeps this from being done, too: then run py-spy by hand.",
)
MEMORY_SNAPSHOT = Action(
    "memory_snapshot",
    "Write what holds memory to reports/: resident memory by kind, the largest tensors, Python allocations, "
    "and each CUDA device's allocator.",
    (
        Argument(
            "trace_seconds",
            "float",
            "Record allocations (Python's, and CUDA's where there is a device) for so many seconds first; "
            "slows the loop down meanwhile. 0: only what is there now.",
            default=0.0,
            minimum=0.0,
            maximum=600.0,
        ),
        Argument("top", "int", "Tensors and source lines listed.", default=30, minimum=1, maximum=1_000),
        ALERT,
    ),
    at="any_time",
    details="Leaves `reports/memory-step<step>-<time>.json`; sizes in bytes. With CUDA in use also "
    "`….cuda.pickle`, for https://pytorch.org/memory_viz. Tensors are looked at between two "
    "steps; where the loop does not come round they are looked at all the same, without "
    "gradients, and `between_steps` is false. Tensors that only C++ holds, such as those "
    "autograd saved, are not listed.",
)
MEASURE_UTILIZATION = Action(
    "measure_utilization",
    "Watch GPUs and loop for a while: utilisation, memory, power, temperature, and what bounds the training.",
    (
        Argument("seconds", "float", "How long.", default=10.0, minimum=0.1, maximum=3600.0),
        ALERT,
    ),
    at="any_time",
    details="The answer names the bottleneck – `input`, `launch`, `compute` or `memory` – with the numbers "
    "behind it; see docs/gpu.md. The loop is not slowed down.",
)
FREE_MEMORY = Action(
    "free_memory",
    "Collect garbage and give cached memory back: the device allocator's and the C library's.",
    (ALERT,),
)
SCALE_LR = Action(
    "scale_lr",
    "Multiply the learning rate of all parameter groups and of the schedule, so that it lasts.",
    (
        Argument(
            "factor",
            "float",
            "What to multiply by; all such factors together stay within the same bounds.",
            minimum=0.001,
            maximum=10.0,
        ),
        Argument("undo", "bool", "Take back all factors so far instead.", default=False),
        ALERT,
    ),
    undo="scale_lr",
    undo_arguments={"undo": True},
    details="Our schedules and those of torch are scaled in their bases and bounds: the rest of their "
    "curve is the old one times the factor. It is saved with the checkpoints, so that a "
    "resumed run has it and can take it back; a rollback to a checkpoint from before takes it "
    "back as well. `lasts` is false for a schedule of a kind unknown here; a loop that sets "
    "the rate by itself at each step overrides it.",
)
ROLLBACK = Action(
    "rollback",
    "Go back to the last sound checkpoint before the trouble, with the same data or past it.",
    (
        Argument(
            "before_step",
            "int",
            "The step at which the trouble began: only checkpoints up to there count. Default: now.",
            minimum=0,
        ),
        Argument(
            "checkpoint", "str", "A checkpoint by id, full name or tag instead, whatever its kind or step."
        ),
        Argument(
            "skip", "bool", "Pass over the data used since that checkpoint.", default=False
        ),
        Argument(
            "skip_more", "int", "Pass over so many further steps' worth of data, within the epoch.",
            default=0, minimum=0, maximum=1_000_000,
        ),
        ALERT,
    ),
    undo="rollback",
    details="The present state is committed first as an emergency checkpoint; `undo` in the result "
    "goes back to it. Without `before_step` only regular checkpoints count, since an "
    "emergency one may hold the trouble. Damaged ones are passed over for the next sound one, "
    "and named in `passed_over`.\n\n"
    "Without `skip` the run then does exactly what one resumed from that checkpoint would do. "
    "With it, model, optimizer and schedule go back while the data goes on, as PaLM's authors "
    "did at loss spikes (Chowdhery et al. 2022, section 5.1): so the batches since that "
    "checkpoint are not seen again. The steps in between count as rework.\n\n"
    "Checkpoints of the course that was left are not resumed from: `rollbacks.json` in the "
    "run folder names them. Those that are neither tagged nor emergencies are removed. A "
    "remote mirror keeps its copies: resume from there by naming a checkpoint.\n\n"
    "In a plain loop within `run.epochs`, a rollback into an earlier epoch ends `run.steps` "
    "early and sets `run.cut_short`; leave out then what belongs to the end of an epoch.",
)  # fmt: skip
SET_LOG_LEVEL = Action(
    "set_log_level",
    "Change the least level of the run's log files, until the process ends.",
    (
        Argument(
            "level", "choice", "The new level.", choices=("debug", "info", "warning", "error"), required=True
        ),
        ALERT,
    ),
    at="any_time",
    undo="set_log_level",
    details="The result has the level of `before`. The terminal goes on showing warnings and worse.",
)
SET_THRESHOLD = Action(
    "set_threshold",
    "Change one threshold of the in-process alerts, until the process ends.",
    (
        Argument("key", "str", "The threshold's name, as under [thresholds].", required=True),
        Argument(
            "value", "float", "The new one, in the unit of the alert table. Default: the run's setting."
        ),
        ALERT,
    ),
    at="any_time",
    undo="set_threshold",
    details="For the alerts judged in the trainer's process. While a sidecar watches the run it is "
    "Prometheus that judges, by its own rules (`note` says so): change `[thresholds]` and run "
    "`obsinfra rules write` for those.",
)

BUILT_IN: tuple[Action, ...] = (
    CHECKPOINT,
    EMERGENCY_CHECKPOINT,
    STOP,
    PAUSE,
    RESUME,
    PROFILE,
    DUMP_STACKS,
    MEMORY_SNAPSHOT,
    MEASURE_UTILIZATION,
    FREE_MEMORY,
    SCALE_LR,
    ROLLBACK,
    SET_LOG_LEVEL,
    SET_THRESHOLD,
)
ACTIONS: dict[str, Action] = {action.name: action for action in BUILT_IN}
"""Every action known in this process: the built-in ones, and those that packages registered."""


def register(action: Action) -> None:
    """Add an action of another package. Doing so again with an equal one changes nothing.

    Raises:
        ConfigError: its name is taken or cannot be one, two of its arguments share a name, or a default does
            not fit its own bounds.
    """
    known = ACTIONS.get(action.name)
    if known == action:
        return
    if known is not None:
        raise ConfigError(f"action {action.name!r} exists already", "a new name", "rename the added action")
    if not (action.name.isascii() and action.name.isidentifier() and len(action.name) <= 64):
        raise ConfigError(
            f"action name {shown(action.name)}", "letters, digits and '_', at most 64", "rename it"
        )
    if len(set(action.argument_names)) != len(action.arguments):
        raise ConfigError(f"action {action.name!r} has two arguments of one name", "distinct names")
    for argument in action.arguments:
        if argument.default is not None and not argument.accepts(argument.default):
            raise ConfigError(
                f"argument {argument.name} of {action.name!r} has default {shown(argument.default)}",
                argument.expected,
                "correct the default or the bounds",
            )
    ACTIONS[action.name] = action
