"""The watchdog thread: acts when the loop does not come to a step boundary in time.

It wakes when a signal or a command arrives, waits out the grace, and then has the run commit its last host
snapshot and dump all stacks. Made by `ObservedRun`; knows only the callbacks it is given.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
import time
from collections.abc import Callable


class Watchdog:
    """One daemon thread that sleeps until there is something to watch.

    Args:
        signal_fd: readable when a signal arrived (`SignalDoor.wake_fd`), or None.
        on_signal_fd: called when it is readable; drains it and may call `expect`.
        on_overdue: called once for each deadline that passed without `satisfied`.
    """

    def __init__(
        self, signal_fd: int | None, *, on_signal_fd: Callable[[], None], on_overdue: Callable[[], None]
    ) -> None:
        self._signal_fd = signal_fd
        self._on_signal_fd = on_signal_fd
        self._on_overdue = on_overdue
        self._deadline: float | None = None
        self._lock = threading.Lock()
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stopping = False
        self._thread = threading.Thread(target=self._watch, name="obsinfra-watchdog", daemon=True)
        self._thread.start()

    def expect(self, seconds: float) -> None:
        """A step boundary is expected within `seconds`; an earlier deadline stays."""
        deadline = time.monotonic() + seconds
        with self._lock:
            if self._deadline is None or deadline < self._deadline:
                self._deadline = deadline
        self._wake()

    def satisfied(self) -> None:
        """The loop came to a boundary and took what was waiting."""
        with self._lock:
            self._deadline = None

    def stop(self) -> None:
        """End the thread."""
        self._stopping = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full means it is awake already; closed means it has ended
            os.write(self._writer, b"x")

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._reader, selectors.EVENT_READ)
        if self._signal_fd is not None:
            selector.register(self._signal_fd, selectors.EVENT_READ)
        try:
            while not self._stopping:
                with self._lock:
                    deadline = self._deadline
                timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
                for key, _ in selector.select(timeout):
                    if key.fd == self._reader:
                        os.read(self._reader, 4096)
                    else:
                        self._on_signal_fd()
                with self._lock:
                    overdue = self._deadline is not None and time.monotonic() >= self._deadline
                    if overdue:
                        self._deadline = None
                if overdue and not self._stopping:
                    self._on_overdue()
        finally:
            selector.close()
            os.close(self._reader)
            os.close(self._writer)
