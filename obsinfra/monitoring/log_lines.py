"""How one log event looks: as a line of JSON, as a plain line, and coloured on a terminal.

Pure functions for `logging_config`. Whatever objects an event carries, a line comes out, of bounded length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import structlog

LINE_MAX_BYTES = 256 * 1024
"""A longer line is shortened: a bad message from outside must not fill the disk."""

STRING_MAX = 4096
ITEMS_MAX = 100
DEPTH_MAX = 12
PLAIN_VALUE_MAX = 300

_exception_documents = structlog.tracebacks.ExceptionDictTransformer(
    show_locals=False, max_frames=50, use_rich=False
)
_renderers: dict[bool, structlog.dev.ConsoleRenderer] = {}


def json_line(document: Mapping[str, Any], exc_info: Any) -> bytes:
    """`document` as one line of strict JSON in UTF-8, without the newline.

    Numbers that are not finite become text, objects their `str`, tensors of one element their number. An
    exception becomes a list under `exception`: type, value and frames, causes after it.
    """
    values = dict(document)
    if exc_info is not None:
        values["exception"] = _exception_documents(exc_info)
    try:
        line = json.dumps(values, ensure_ascii=False, allow_nan=False, default=_plain)
    except (ValueError, TypeError, RecursionError):
        line = json.dumps(_clean(values, DEPTH_MAX, None), ensure_ascii=False, allow_nan=False)
    if len(line) > LINE_MAX_BYTES:
        short = {"truncated_from_characters": len(line), **values}
        line = json.dumps(_clean(short, 8, STRING_MAX), ensure_ascii=False, allow_nan=False)
        if len(line) > LINE_MAX_BYTES:
            core = ("truncated_from_characters", "timestamp", "level", "event", "channel")
            kept = {key: short[key] for key in core if key in short}
            line = json.dumps(_clean(kept, 2, STRING_MAX), ensure_ascii=False, allow_nan=False)
    # A lone surrogate (a file name of undecodable bytes) becomes the JSON escape for it.
    return line.encode("utf-8", "backslashreplace")


def plain_line(document: Mapping[str, Any], exc_info: Any) -> str:
    """One line for people: time, level, event, `key=value`. Of an exception only type and message."""
    values = dict(document)
    head = []
    if (timestamp := values.pop("timestamp", None)) is not None:
        head.append(str(timestamp)[11:19])
    if (level := values.pop("level", None)) is not None:
        head.append(f"{level:<7}")
    head.append(_printable(str(values.pop("event", ""))))
    if exc_info is not None:
        values["exception"] = f"{exc_info[0].__name__}: {exc_info[1]}"
    return " ".join([*head, *(f"{key}={_value(value)}" for key, value in values.items())])


def console_line(document: Mapping[str, Any], exc_info: Any, *, colors: bool) -> str:
    """Lines for a terminal, as structlog's ConsoleRenderer draws them, with an exception's traceback."""
    if colors not in _renderers:
        _renderers[colors] = structlog.dev.ConsoleRenderer(
            colors=colors, pad_event_to=24, exception_formatter=structlog.dev.plain_traceback
        )
    values: dict[str, Any] = {
        key: value if isinstance(value, int | float) else _value(value, quote=False)
        for key, value in document.items()
    }
    values["timestamp"] = str(document.get("timestamp", ""))[11:19]
    if exc_info is not None:
        values["exc_info"] = exc_info
    return str(_renderers[colors](None, "", values))


def _value(value: Any, *, quote: bool = True) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if len(text) > PLAIN_VALUE_MAX:
        text = f"{text[:PLAIN_VALUE_MAX]}… ({len(text)} characters)"
    return repr(text) if quote and " " in text else _printable(text)


def _printable(text: str) -> str:
    """Control characters would steer the terminal: then the text is shown quoted and escaped."""
    return text if text.isprintable() else repr(text)


def _plain(value: Any) -> Any:
    """A JSON value for an object json does not know."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    if isinstance(value, set | frozenset):
        return [str(item) for item in value]
    return str(value)


def _clean(value: Any, depth: int, string_max: int | None) -> Any:
    """`value` as strict JSON can hold it, at most `depth` levels deep, strings and lists cut to size."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return _cut(value, string_max)
    if depth > 0 and isinstance(value, Mapping):
        items = list(value.items())
        if string_max is not None:
            items = items[:ITEMS_MAX]
        return {_cut(str(key), string_max): _clean(item, depth - 1, string_max) for key, item in items}
    if depth > 0 and isinstance(value, list | tuple):
        members = value if string_max is None else value[:ITEMS_MAX]
        return [_clean(item, depth - 1, string_max) for item in members]
    if depth > 0 and not isinstance(value, Mapping | list | tuple):
        return _clean(_plain(value), 0, string_max)
    return _cut(str(value), string_max or STRING_MAX)


def _cut(text: str, limit: int | None) -> str:
    if limit is None or len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text)} characters)"
