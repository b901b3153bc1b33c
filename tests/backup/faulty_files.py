"""File layers that fail, die, forget or only count, for `create_backup_system(..., files=...)`."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from obsinfra.backup.file_layer import FileLayer as FileLayer
from obsinfra.backup.file_layer import OperatingSystemFiles


class QuickFiles(OperatingSystemFiles):
    """Nothing is flushed: for tests that do not look at durability and save very often."""

    def write(self, path: Path, data: memoryview) -> None:
        assert not path.exists()
        path.write_bytes(data)

    def sync_folder(self, folder: Path) -> None:
        assert folder.is_dir()


class WatchedFiles(QuickFiles):
    """Calls `before(operation, path)` ahead of each operation, numbered by `count`.

    A write is two operations: `write` before anything is there, `write half` when a part of the data is.
    """

    def __init__(self, before: Callable[[str, Path], None] | None = None) -> None:
        self.operations: list[tuple[str, Path]] = []
        self.before = before

    @property
    def count(self) -> int:
        return len(self.operations)

    def _did(self, operation: str, path: Path) -> None:
        self.operations.append((operation, path))
        if self.before is not None:
            self.before(operation, path)

    def write(self, path: Path, data: memoryview) -> None:
        self._did("write", path)
        path.write_bytes(data[: len(data) // 2])
        self._did("write half", path)
        with path.open("ab") as file:
            file.write(data[len(data) // 2 :])

    def rename(self, source: Path, target: Path) -> None:
        self._did("rename", target)
        super().rename(source, target)

    def sync_folder(self, folder: Path) -> None:
        self._did("sync", folder)
        super().sync_folder(folder)

    def remove(self, path: Path) -> None:
        self._did("remove", path)
        super().remove(path)


class FailingFiles(WatchedFiles):
    """Operation number `at` fails with `code`; with `lasting`, so do all after it."""

    def __init__(self, at: int, code: int, *, lasting: bool = False) -> None:
        super().__init__(self._fail)
        self._at, self._code, self._lasting = at, code, lasting
        self.failed = False

    def _fail(self, operation: str, path: Path) -> None:
        if self.count == self._at or (self._lasting and self.count > self._at):
            self.failed = True
            raise OSError(self._code, os.strerror(self._code), str(path))


class KillingFiles(WatchedFiles):
    """The process is killed right before operation number `at`."""

    def __init__(self, at: int) -> None:
        super().__init__(self._kill)
        self._at = at

    def _kill(self, operation: str, path: Path) -> None:
        if self.count == self._at:
            os.kill(os.getpid(), signal.SIGKILL)


class PowerCut(BaseException):
    """The machine is off: nothing that would run after it may have an effect."""


class DyingFiles(WatchedFiles):
    """The process is as good as dead from operation number `at` on; what it did until then stays."""

    def __init__(self, at: int) -> None:
        super().__init__(self._die)
        self._at = at

    def _die(self, operation: str, path: Path) -> None:
        if self.count >= self._at:
            raise PowerCut


class ForgetfulFiles(WatchedFiles):
    """A disk that may forget what no one made durable: entries of folders that were not synced since.

    Content of written files is durable, as `write` promises. Before operation number `at` the power goes; all
    later operations do nothing.
    """

    def __init__(self, surroundings: Path, at: int = -1) -> None:
        super().__init__(self._cut)
        self._surroundings = surroundings
        self._at = at
        self._durable: set[Path] = set(surroundings.iterdir())

    def _cut(self, operation: str, path: Path) -> None:
        if 0 < self._at <= self.count:
            raise PowerCut

    def sync_folder(self, folder: Path) -> None:
        super().sync_folder(folder)
        self._durable |= set(folder.iterdir())

    def go_on(self) -> None:
        """Only the process had died: the disk works, and what it was not told to keep is still in memory."""
        self.operations.clear()
        self._at = -1

    def restart(self, forgets: Callable[[Path], bool] = lambda entry: True) -> None:
        """What the disk holds when the power is back: `forgets` decides for each entry never synced."""
        self.go_on()
        for entry in sorted(self._surroundings.rglob("*")):
            if entry not in self._durable and entry.exists() and forgets(entry):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self._durable = set(self._surroundings.rglob("*"))


def tree(root: Path) -> dict[str, bytes]:
    """Every file under `root` with its content."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
