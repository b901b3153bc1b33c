"""Finding the runbooks: one Markdown page per alert, as a person reads them at night.

The sidecar serves them and tests read them. Knows files alone: neither alerts nor HTTP.
"""

from __future__ import annotations

import re
from pathlib import Path

from obsinfra.errors import UserError

INDEX = "README"
"""The page that lists all others."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]{0,79}")


def find_runbooks() -> Path:
    """The folder of runbooks: the wheel's copy, or `docs/runbooks` of the repository.

    Raises:
        UserError: neither is there.
    """
    package = Path(__file__).parents[1]
    places = (package / "deployment" / "stack_files" / "runbooks", package.parent / "docs" / "runbooks")
    for folder in places:
        if (folder / f"{INDEX}.md").is_file():
            return folder
    raise UserError(
        f"no runbooks in {places[0]} or {places[1]}",
        f"a folder with {INDEX}.md",
        "install obsinfra from a wheel or run it from a checkout",
    )


def read_runbook(folder: Path, name: str) -> str | None:
    """The text of one runbook; None where there is none of that name.

    Args:
        folder: where they are; nothing outside it is ever read.
        name: an alert's name or `INDEX`; a `.md` after it is allowed, as links between runbooks have it.
    """
    stem = name.removesuffix(".md")
    if not _NAME.fullmatch(stem):
        return None
    try:
        return (folder / f"{stem}.md").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
