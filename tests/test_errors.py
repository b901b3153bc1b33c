"""What errors say: a message of ours that quotes somebody else's error is whole, whatever that one says."""

from __future__ import annotations

import pytest

from obsinfra.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("shapes differ\n  at line 3"), "shapes differ"),
        (RuntimeError("\n\n  a graph break\nin f"), "a graph break"),
        (MemoryError(), "MemoryError"),
        (ValueError("x" * 300), "x" * 200),
    ],
)
def test_the_first_line_of_an_error_says_something(error: Exception, line: str) -> None:
    assert first_line(error, 200) == line
