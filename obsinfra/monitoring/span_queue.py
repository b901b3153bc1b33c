"""A bounded queue of finished spans with one thread that delivers them in batches.

The tracer puts, the thread delivers to a file or a collector. A slow or dead receiver costs spans, which are
counted, never time: `put` does not wait. Knows neither OpenTelemetry nor what a receiver is.

The SDK's own BatchSpanProcessor is not used because it starts a thread in every forked child (data-loader
workers), cannot end by a deadline, and does not tell how many spans it dropped.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SpanQueue(Generic[T]):
    """Delivers what is put into it on a daemon thread of its own.

    Args:
        name: name of the thread.
        deliver: takes a batch, returns how many of it were accepted; raises when none was.
        on_error: called on the thread with what `deliver` raised.
        capacity: spans waiting at most; further ones are dropped.
        batch: spans per delivery at most.
        linger_seconds: how long a first span waits for company.

    Attributes:
        delivered: spans accepted by the receiver.
        dropped: spans lost: queue full, delivery failed, not accepted, or not delivered before the end.
        errors: deliveries that failed.
    """

    def __init__(
        self,
        name: str,
        deliver: Callable[[list[T]], int],
        on_error: Callable[[Exception], None],
        *,
        capacity: int = 4096,
        batch: int = 256,
        linger_seconds: float = 0.5,
    ) -> None:
        self.delivered = self.dropped = self.errors = 0
        self._deliver, self._on_error = deliver, on_error
        self._capacity, self._batch, self._linger = capacity, batch, linger_seconds
        self._waiting: deque[T] = deque()
        self._in_flight = 0
        self._closing = self._abandoned = False
        self._changed = threading.Condition()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, span: T) -> None:
        """Hand over `span`; dropped and counted when the queue is full or closed. Never waits long."""
        if os.getpid() != self._pid:
            return  # a forked child has the queue's memory but not its thread; its lock may be held forever
        with self._changed:
            if self._closing or len(self._waiting) >= self._capacity:
                self.dropped += 1
                return
            self._waiting.append(span)
            if len(self._waiting) == 1 or len(self._waiting) >= self._batch:
                self._changed.notify()

    def begin_close(self) -> None:
        """Accept nothing more and deliver what waits without lingering."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self, deadline: float) -> bool:
        """Deliver what waits until `deadline` (`time.monotonic`), then give the rest up as dropped.

        Returns:
            Whether everything was delivered, or refused, in time.
        """
        if os.getpid() != self._pid:
            return True
        self.begin_close()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            if self._thread.is_alive() and not self._abandoned:
                self._abandoned = True
                self.dropped += len(self._waiting) + self._in_flight
                self._waiting.clear()
        return not self._abandoned

    def _work(self) -> None:
        while batch := self._take():
            try:
                accepted = self._deliver(batch)
                failure: Exception | None = None
            except Exception as error:  # whatever it is, it must not end the thread
                accepted, failure = 0, error
            with self._changed:
                self._in_flight = 0
                if self._abandoned:
                    return
                self.delivered += accepted
                self.dropped += len(batch) - accepted
                self.errors += failure is not None
            if failure is not None:
                self._on_error(failure)

    def _take(self) -> list[T]:
        """The next batch; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            self._changed.wait_for(
                lambda: self._closing or len(self._waiting) >= self._batch, timeout=self._linger
            )
            batch = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
            self._in_flight = len(batch)
            return batch
