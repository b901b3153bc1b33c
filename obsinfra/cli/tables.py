"""How the commands print a table: a row is one line wherever that helps to copy, search and cut."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

ROOMY_COLUMNS = 120
"""A terminal from this width on folds what is too long within its cell."""

UNFOLDED_COLUMNS = 1000


def print_table(console: Console, table: Table, *, prose: bool = False) -> None:
    """A row is one line off a terminal, and on a narrow one, which wraps it where it ends.

    Args:
        prose: most of it are sentences, which a narrow terminal folds within their cells, too.
    """
    if console.is_terminal and (prose or console.width >= ROOMY_COLUMNS):
        console.print(table)
    else:  # not by `width=` of the console's own print, which never goes beyond what it takes for its width
        Console(width=max(console.width, UNFOLDED_COLUMNS)).print(table, crop=False)
