"""What became of each command of a run, durably: one small file an id in the folder `acks/`.

The channel writes it; so a command takes effect once even across restarts of the trainer.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from obsinfra.control.command import MAX_COMMAND_BYTES, MAX_LIFETIME_SECONDS, Ack, parse_ack
from obsinfra.errors import CommandError
from obsinfra.run.files import write_atomic

KEEP_SECONDS = 2 * MAX_LIFETIME_SECONDS
"""Longer than a command can live, so that a replayed one is always recognised or expired."""


class AckLedger:
    """The folder of acks.

    Args:
        folder: exists; 0700.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def last(self, id: str) -> Ack | None:
        """The newest ack of `id`; None when there is none, or it is unreadable."""
        try:
            with self._path(id).open("rb") as file:
                return parse_ack(file.read(MAX_COMMAND_BYTES + 1))
        except (OSError, CommandError):
            return None

    def record(self, ack: Ack) -> None:
        """Replace the ack of `ack.id`.

        `accepted` need not survive a power cut: whoever sent the command still has it, in the inbox or the
        sidecar's journal, and the sync is most of what a command costs.

        Raises:
            OSError: the disk failed.
        """
        write_atomic(self._path(ack.id), ack.to_json() + "\n", durable=ack.state != "accepted")

    def prune(self, now: float) -> None:
        """Remove acks older than `KEEP_SECONDS` at `now` (epoch seconds)."""
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.stat().st_mtime < now - KEEP_SECONDS:
                        os.unlink(entry.path)

    def _path(self, id: str) -> Path:
        return self._folder / f"{id}.json"
