"""Records that cannot be read: how a data set says so, and the ledger that counts them up to a limit.

Data sets raise `CorruptRecord` or yield `Skipped`; the data loader keeps the ledger, in its own process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from obsinfra.errors import DataError
from obsinfra.monitoring.logging_config import get_logger

REMEMBERED = 1_000
"""Places already reported, so that a damaged record is one log line and not one an epoch."""


class CorruptRecord(DataError):
    """One record of a map-style data set cannot be read; the others can.

    Args:
        where: the record, for people: file and row.
        reason: what is wrong with it.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}", "a sound record")
        self.where, self.reason = where, reason

    def __reduce__(self) -> tuple[type[CorruptRecord], tuple[str, str]]:
        return type(self), (self.where, self.reason)  # it may have to cross from a worker process


@dataclass(frozen=True, slots=True)
class Skipped:
    """Records left out. Iterable data sets yield it in their place: a generator cannot raise and go on.

    Attributes:
        where: file and row, row group or chunk.
        reason: what was wrong.
        records: how many; 1 where the number cannot be told.
    """

    where: str
    reason: str
    records: int = 1


class SkipLedger:
    """Counts and reports what was skipped; ends the training beyond the limit.

    Args:
        limit: most records to skip in one epoch; 0: none.

    Attributes:
        total: records skipped by this process.
        in_epoch: records skipped in the epoch under way, before a resume included.
        seen: what was skipped, each place once, the first `REMEMBERED`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self.in_epoch = 0
        self.seen: dict[str, Skipped] = {}

    def note(self, skipped: Iterable[Skipped]) -> None:
        """Count these.

        Raises:
            DataError: more were skipped in this epoch than the limit.
        """
        for one in skipped:
            self.total += one.records
            self.in_epoch += one.records
            if one.where not in self.seen and len(self.seen) < REMEMBERED:
                self.seen[one.where] = one
                get_logger("system").warning(
                    "record_skipped",
                    where=one.where,
                    reason=one.reason,
                    records=one.records,
                    skipped_in_epoch=self.in_epoch,
                    limit=self.limit,
                )
            if self.in_epoch > self.limit:
                raise DataError(
                    f"{self.in_epoch} corrupt record{'s' if self.in_epoch > 1 else ''} in one epoch, "
                    f"the last: {one.where}: {one.reason}",
                    f"at most {self.limit} (max_skipped)",
                    "repair the data, or raise max_skipped",
                )
