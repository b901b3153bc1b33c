"""Committed files that a command generates: written, or compared with what would be written.

For `obsinfra rules`, `docs` and `alerts`, which know the content.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from obsinfra.run.files import write_atomic


def write_generated(files: Mapping[Path, str], console: Console) -> None:
    """Write each file, whole, with the folders that it needs."""
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text, mode=0o644)
        console.print(f"wrote {escape(str(path))}", soft_wrap=True)


def check_generated(files: Mapping[Path, str], console: Console, *, fix: str, fine: str) -> None:
    """Exit code 1 when a file is not what `write_generated` would write.

    Args:
        fix: what to run then.
        fine: what to say when all are as they should be.
    """
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        console.print(f"[red]{escape(str(path))} is out of date[/]: run {fix}", soft_wrap=True)
    if stale:
        raise typer.Exit(1)
    console.print(fine, soft_wrap=True)
