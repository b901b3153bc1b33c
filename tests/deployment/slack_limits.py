"""Slack's documented limits for a message with attachments, as a check of a payload.

https://docs.slack.dev/reference/methods/chat.postMessage (text: best below 4,000 characters, cut at 40,000),
https://docs.slack.dev/reference/block-kit/blocks (50 blocks; section text 3,000; header 150; 10 fields of
2,000),
https://docs.slack.dev/legacy/legacy-messaging/legacy-secondary-message-attachments (footer 300, hex colours).
An attachment's own text has no documented limit; it is held to a section block's, the strictest there is.
"""

from __future__ import annotations

import re
from typing import Any

MAX_ATTACHMENTS = 20
MAX_TEXT, MAX_TITLE, MAX_FOOTER, MAX_FALLBACK = 3_000, 150, 300, 4_000
MAX_FIELDS, MAX_FIELD_TEXT, MAX_ACTIONS = 10, 2_000, 5
ENTITY = re.compile(r"&(?!(amp|lt|gt);)")
LINK = re.compile(r"<https?://[^\s<>|]+\|[^<>|]+>")


def check_slack(payload: dict[str, Any]) -> None:
    """Fail where the payload is beyond a limit, or its text is not escaped as Slack wants it."""
    assert 1 <= len(payload["attachments"]) <= MAX_ATTACHMENTS
    assert len(payload.get("blocks", [])) <= 50
    for attachment in payload["attachments"]:
        assert 0 < len(attachment["text"]) <= MAX_TEXT
        assert 0 < len(attachment["title"]) <= MAX_TITLE
        assert len(attachment.get("fallback", "")) <= MAX_FALLBACK
        assert len(attachment.get("footer", "")) <= MAX_FOOTER
        assert re.fullmatch(r"good|warning|danger|#[0-9A-Fa-f]{6}", attachment["color"])
        assert len(attachment.get("fields") or []) <= MAX_FIELDS
        assert len(attachment.get("actions") or []) <= MAX_ACTIONS
        for field in attachment.get("fields") or []:
            assert len(field["title"]) <= MAX_FIELD_TEXT and len(field["value"]) <= MAX_FIELD_TEXT
        for part in ("text", "title", "fallback"):
            assert ENTITY.search(attachment[part]) is None, attachment[part]
            assert "<" not in LINK.sub("", attachment[part]), attachment[part]
