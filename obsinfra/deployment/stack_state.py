"""What the native stack writes about itself: the plan it runs from, and what runs now. Plain data.

Written by NativeStack (plan.json) and the supervisor (stack.json), read by both. Also the state folder's
lock, and the error of a stack that cannot run, which both kinds of stack share.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from obsinfra.errors import ConfigError, ObsinfraError, UserError
from obsinfra.run.files import write_json_atomic
from obsinfra.run.process import ProcessId

VERSION = 1


@contextlib.contextmanager
def state_locked(state_dir: Path, *, create: bool = False) -> Iterator[None]:
    """One `up` or `down` at a time per state folder; another waits.

    Raises:
        ConfigError: the folder is not writable.
    """
    try:
        if create:
            state_dir.mkdir(parents=True, mode=0o700, exist_ok=True)
        fd = os.open(state_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot use {state_dir}: {error.strerror}", "a writable folder", "choose --output-dir"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class StackUnavailable(UserError):
    """The stack cannot run here: a program or an image is missing, or one did not become ready."""


@dataclass(frozen=True, slots=True)
class Program:
    """One program of the stack.

    Attributes:
        name: `prometheus`, `alertmanager` or `sidecar`; also names its log.
        arguments: the whole command line.
        port, url: where it listens.
        ready_path: answers 200 once it is ready.
        after: programs that must be ready before this one is started for the first time.
    """

    name: str
    arguments: list[str]
    port: int
    url: str
    ready_path: str
    after: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the supervisor shall run. All paths are absolute.

    Attributes:
        state_dir: where plan, state, logs, data and token are.
        output_dir: the folder of runs the sidecar watches.
        started: ISO 8601, UTC.
        programs: in the order of starting.
    """

    state_dir: str
    output_dir: str
    started: str
    programs: list[Program]

    def write(self) -> None:
        """Write plan.json."""
        write_json_atomic(Path(self.state_dir) / "plan.json", asdict(self))

    @classmethod
    def read(cls, state_dir: Path) -> Plan:
        """Read plan.json."""
        return cls.of(json.loads((state_dir / "plan.json").read_text()))

    @classmethod
    def of(cls, document: dict[str, Any]) -> Plan:
        """A plan from its JSON form."""
        return cls(**(document | {"programs": [Program(**program) for program in document["programs"]]}))


@dataclass(frozen=True, slots=True)
class Child:
    """A program as it runs now; `process` is None between a crash and the restart."""

    process: ProcessId | None
    restarts: int
    port: int
    url: str


@dataclass(frozen=True, slots=True)
class StackState:
    """The content of stack.json."""

    plan: Plan
    supervisor: ProcessId
    children: dict[str, Child]

    def write(self) -> None:
        """Write stack.json, whole or not at all."""
        document = {"version": VERSION} | asdict(self)
        write_json_atomic(Path(self.plan.state_dir) / "stack.json", document)

    @classmethod
    def read(cls, state_dir: Path) -> StackState | None:
        """Read stack.json; None when there is none.

        Raises:
            ObsinfraError: it is not readable as one.
        """
        path = state_dir / "stack.json"
        try:
            document = json.loads(path.read_text())
            return cls(
                plan=Plan.of(document["plan"]),
                supervisor=ProcessId(**document["supervisor"]),
                children={
                    name: Child(
                        **(child | {"process": ProcessId(**child["process"]) if child["process"] else None})
                    )
                    for name, child in document["children"].items()
                },
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ObsinfraError(f"{path} is not what a supervisor wrote ({error!r}); remove it") from error

    def processes(self) -> dict[str, ProcessId]:
        """Every process it names, the supervisor first."""
        return {"supervisor": self.supervisor} | {
            name: child.process for name, child in self.children.items() if child.process is not None
        }
