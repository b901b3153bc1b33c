"""The exception tree, for every floor of the house. Imports nothing of ours.

A message names what was wrong, what was expected and what to do; the CLI turns a `UserError` into one
line on stderr and exit code 2, without a traceback.
"""

from __future__ import annotations


class ObsinfraError(Exception):
    """Root of every error this package raises on purpose."""

    exit_code = 1


class UserError(ObsinfraError):
    """Something the user gave us cannot work.

    Args:
        wrong: what was found, with the offending value.
        expected: what would have been accepted.
        fix: what to type or change; optional when `expected` already says it.
    """

    exit_code = 2

    def __init__(self, wrong: str, expected: str = "", fix: str = "") -> None:
        self.wrong, self.expected, self.fix = wrong, expected, fix
        parts = [wrong]
        if expected:
            parts.append(f"expected {expected}")
        if fix:
            parts.append(f"fix: {fix}")
        super().__init__("; ".join(parts))


class ConfigError(UserError):
    """A setting has an impossible value, an unknown name, or comes from an unreadable file."""


class DataError(UserError):
    """Training data is missing, malformed or too little."""


class DataWorkerError(UserError):
    """A data loader's worker process died, or gave nothing in time."""


class CheckpointError(UserError):
    """A checkpoint is absent, damaged, or does not fit the model it is loaded into."""


class RunBusyError(UserError):
    """Another live trainer owns this run folder."""


class CommandError(ObsinfraError):
    """A control command is malformed, unknown, expired or too large; the message goes into its ack."""


class NonFiniteLossError(ObsinfraError):
    """The loss became NaN or infinite; the last good state was checkpointed before this was raised."""


class MemoryExhaustedError(ObsinfraError):
    """A step does not fit into memory, not even with one row at a time; the message says what would help."""


class PeerLostError(ObsinfraError):
    """Another rank of the run is gone or does not answer; the message says which, and why if it is known."""


class RanksDifferError(UserError):
    """The ranks of a run do not have the same code, data, settings or model, or did a command differently."""


def first_line(error: BaseException, most: int = 1000) -> str:
    """What an error of somebody else says, as part of a message of ours; its type where it says nothing.

    Args:
        most: characters.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]
