"""Who may ask the sidecar for something, how much, and how fast: token, size, rate, concurrency.

In front of every route that needs it (`sidecar`, `http_api`). Knows HTTP, nothing of alerts or runs.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect

MAX_BODY_BYTES = 1 << 20
BODY_SECONDS = 10.0
"""A body that takes longer to arrive is refused."""

RETRY_AFTER_SECONDS = 1


class Bucket:
    """A rate limit: so many a second, and a burst.

    Args:
        per_second: what is refilled.
        burst: what it holds.
    """

    def __init__(self, per_second: float, burst: float) -> None:
        self._per_second, self._burst = per_second, burst
        self._left, self._at = burst, time.monotonic()

    def take(self) -> bool:
        """Take one; False when there is none. For one thread, the event loop's."""
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Gate:
    """One door: what passes it is allowed, small, and not too much.

    Args:
        token: the bearer token.
        refused: called with the outcome (`unauthorized`, `malformed`, `too_large`, `too_slow`, `too_many`)
            and the detail.
        per_second: requests, and half as many again in a burst.
        at_once: requests under way.
        too_many: status for more than that.
    """

    def __init__(
        self,
        token: str,
        refused: Callable[[str, str], None],
        *,
        per_second: float,
        at_once: int,
        too_many: int,
    ) -> None:
        self._expected = f"Bearer {token}".encode()
        self._refused = refused
        self._bucket = Bucket(per_second, 1.5 * per_second)
        self._at_once, self._under_way = at_once, 0
        self._too_many = too_many

    def check_token(self, request: Request) -> None:
        """Refuse whoever does not have the token."""
        given = request.headers.get("authorization", "").encode()
        if not secrets.compare_digest(given, self._expected):
            raise self.refuse(401, "unauthorized", "expected the bearer token of the sidecar's token file")

    def check_rate(self) -> None:
        """Refuse what comes too fast."""
        if not self._bucket.take():
            raise self.refuse(self._too_many, "too_many", "too many requests; expected fewer a second")

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places for requests under way, or refuse."""
        if self._under_way >= self._at_once:
            raise self.refuse(self._too_many, "too_many", "too many requests at once; expected fewer")
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def body_of(self, request: Request) -> bytes:
        """The body, if it is small and comes soon."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > MAX_BODY_BYTES:
                        raise self.refuse(413, "too_large", f"expected at most {MAX_BODY_BYTES} bytes")
        except ClientDisconnect:
            raise self.refuse(400, "malformed", "the caller hung up before the end of its body") from None
        except TimeoutError:
            raise self.refuse(408, "too_slow", f"expected the body within {BODY_SECONDS:.0f} s") from None
        return bytes(body)

    def refuse(self, status: int, outcome: str, detail: str) -> HTTPException:
        """The exception to raise."""
        self._refused(outcome, detail)
        headers = {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if status in (429, 503):
            headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
        return HTTPException(status, detail, headers)
