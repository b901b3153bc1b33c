"""Ends HTTP connections on which no request arrives: uvicorn waits for the rest of a request's head for ever.

The sidecar's server uses it, so that somebody who only opens connections cannot take all of them.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

HEAD_SECONDS = 30.0
"""A connection without a whole request head for this long is closed, at the latest after twice that."""


class PatientForAWhile(H11Protocol):
    """uvicorn's HTTP/1.1 with a limit on waiting for a request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(HEAD_SECONDS, self._look, None)

    def _look(self, cycle_before: RequestResponseCycle | None) -> None:
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE and self.cycle is cycle_before:
            self.transport.close()
        else:
            self.loop.call_later(HEAD_SECONDS, self._look, self.cycle)
