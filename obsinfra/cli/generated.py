"""Committed files that a command generates: written, or compared with what would be written.

For `obsinfra rules`, `docs` and `alerts`, which know the content.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from obsinfra.errors import UserError
from obsinfra.run.files import write_atomic


def write_generated(files: Mapping[Path, str], console: Console) -> None:
    """Write each file, whole, with the folders that it needs.

    Raises:
        UserError: one cannot be written.
    """
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text, mode=0o644)
        except (OSError, ValueError) as error:  # ValueError: `/` has no name
            raise UserError(
                f"cannot write {path}: {getattr(error, 'strerror', None) or error}",
                "a file in a writable folder",
                "name another one",
            ) from None
        console.print(f"wrote {escape(str(path))}", soft_wrap=True)


def check_generated(files: Mapping[Path, str], console: Console, *, fix: str, fine: str) -> None:
    """Exit code 1 when a file is not what `write_generated` would write.

    Args:
        fix: what to run then.
        fine: what to say when all are as they should be.
    """
    stale = [path for path, text in files.items() if content_of(path) != text]
    for path in stale:
        console.print(f"[red]{escape(str(path))} is out of date[/]: run {fix}", soft_wrap=True)
    if stale:
        raise typer.Exit(1)
    console.print(fine, soft_wrap=True)


def content_of(path: Path) -> str | None:
    """The text of a generated file, bytes that are none shown as such; None where there is no file.

    Raises:
        UserError: it cannot be read.
    """
    if not path.is_file():
        return None
    try:
        return path.read_text(errors="backslashreplace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}", "a readable file") from None
