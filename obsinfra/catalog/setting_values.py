"""Values that a user may write in the tables of settings about alerts, checked one by one.

Each check returns the value as the tables hold it, or raises ValueError with what would do; who calls it
knows the setting's name. Knows no setting.
"""

from __future__ import annotations

import math
import re
import sys
from urllib.parse import urlsplit

LONGEST_SECONDS = 366 * 86_400.0
"""Nobody waits longer; and Prometheus knows no duration of some centuries."""

_LEAST, _MOST = -sys.float_info.max, sys.float_info.max

LONGEST_TEXT = 400
"""Of a summary or description: what a message has room for."""

_LABEL = re.compile(r"\{\{\s*\$labels\.\w+\s*\}\}")


def number(value: object) -> float:
    """A finite number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not _LEAST <= value <= _MOST:
        raise ValueError("a finite number")
    return float(value)


def seconds(value: object, least: float) -> float:
    """A length of time that somebody may wait for."""
    try:
        found = number(value)
    except ValueError:
        found = math.inf
    if not least <= found <= LONGEST_SECONDS:
        raise ValueError(f"a number from {least:g} to {LONGEST_SECONDS:g}")
    return found


def one_of(value: object, allowed: tuple[str, ...]) -> str:
    """One of these words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"one of {', '.join(word or repr(word) for word in allowed)}")
    return value


def truth(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def text(value: object) -> str:
    """One line for people, with no template but a label's value."""
    plain = _LABEL.sub("", value) if isinstance(value, str) else ""
    if not plain.strip() or len(str(value)) > LONGEST_TEXT or not plain.isprintable() or "{{" in plain:
        raise ValueError(
            f"text on one line of 1 to {LONGEST_TEXT} characters, with no template but {{{{ $labels.run }}}}"
        )
    return str(value)


def url(value: object) -> str:
    """Where something can be read."""
    given = value if isinstance(value, str) else ""
    try:
        parts = urlsplit(given)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\s{}<>\"|\\^`]", given):
        raise ValueError("an http or https URL, as https://wiki.example.org/slow-step")
    return given
