"""What became of each command of a run, durably: one small file an id in the folder `acks/`.

While a command is under way there is an empty `<id>.begun` as well: a name needs one sync alone, that of the
folder, and the command waits for it before it takes effect.

The channel writes it; so a command takes effect once even across restarts of the trainer.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from obsinfra.control.command import MAX_COMMAND_BYTES, MAX_LIFETIME_SECONDS, Ack, parse_ack
from obsinfra.errors import CommandError
from obsinfra.run.files import fsync_folder, write_atomic

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
        """The newest ack of `id`, of `running` the state alone; None without one, or if it is unreadable."""
        ack = None
        with contextlib.suppress(OSError, CommandError), self._path(id).open("rb") as file:
            ack = parse_ack(file.read(MAX_COMMAND_BYTES + 1))
        if (ack is None or not ack.final) and self._begun(id).exists():
            return Ack(id, "running")
        return ack

    def record(self, ack: Ack) -> None:
        """Replace the ack of `ack.id`.

        `accepted` need not survive a power cut: whoever sent the command still has it, in the inbox or the
        sidecar's journal, and the sync is most of what a command costs.

        Raises:
            OSError: the disk failed.
        """
        if ack.state == "running":
            self._begin(ack.id)
            return
        write_atomic(self._path(ack.id), ack.to_json() + "\n", durable=ack.final)
        if ack.final:
            self._begun(ack.id).unlink(missing_ok=True)

    def _begin(self, id: str) -> None:
        try:
            os.close(os.open(self._begun(id), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            return
        fsync_folder(self._folder)

    def prune(self, now: float) -> None:
        """Remove acks older than `KEEP_SECONDS` at `now` (epoch seconds)."""
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.stat().st_mtime < now - KEEP_SECONDS:
                        os.unlink(entry.path)

    def _begun(self, id: str) -> Path:
        return self._folder / f"{id}.begun"

    def _path(self, id: str) -> Path:
        return self._folder / f"{id}.json"
