"""Signals as one more door of the control channel, and how they reach a loop that is not looking.

The Python handler runs on the main thread between two bytecodes; a wake-up descriptor, written by the
interpreter's C handler at once, tells the watchdog even while the main thread is stuck in C.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from obsinfra.monitoring.logging_config import get_logger


class InterruptedWait(BaseException):
    """Raised by the signal handler inside a wait that may be left: for data, or in a validation.

    A BaseException, so that a library's `except Exception` cannot swallow it.
    """


class SignalDoor:
    """Turns the configured signals into a request to stop.

    Args:
        names: signal names, e.g. `("SIGTERM", "SIGINT")`.
        on_signal: called on the main thread with the signal's name; must only set flags.
        on_second_interrupt: called on the main thread when SIGINT comes again.

    Attributes:
        may_interrupt: set by the loop around a wait that the handler may leave by `InterruptedWait`.
        wake_fd: readable as soon as a signal arrived; None where handlers could not be installed.
    """

    def __init__(
        self,
        names: Iterable[str],
        *,
        on_signal: Callable[[str], None],
        on_second_interrupt: Callable[[], None],
    ) -> None:
        self._names = tuple(names)
        self._on_signal = on_signal
        self._on_second_interrupt = on_second_interrupt
        self._previous: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()
        self._interrupts = 0
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._previous_fd = -1
        self.may_interrupt = False

    @property
    def wake_fd(self) -> int | None:
        return None if self._pair is None else self._pair[0].fileno()

    def install(self) -> bool:
        """Install the handlers; False (and a log line) outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            get_logger("system").warning(
                "signals_not_handled", reason="observe() was not called on the main thread"
            )
            return False
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self._pair = (reader, writer)
        self._previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for name in self._names:
            number = signal.Signals[name]
            self._previous[number] = signal.signal(number, self._handle)
        _doors.append(self)
        return True

    def uninstall(self) -> None:
        """Put back what was there before."""
        if self._pair is None or os.getpid() != self._pid:
            return
        if threading.current_thread() is threading.main_thread():
            for number, previous in self._previous.items():
                if signal.getsignal(number) == self._handle:
                    signal.signal(number, previous if previous is not None else signal.SIG_DFL)
            signal.set_wakeup_fd(self._previous_fd)
        self._previous.clear()
        for end in self._pair:
            end.close()
        self._pair = None
        if self in _doors:
            _doors.remove(self)

    def drain(self) -> list[str]:
        """Names of the signals that arrived since the last call, as the wake-up descriptor tells."""
        if self._pair is None:
            return []
        try:
            numbers = self._pair[0].recv(4096)
        except (BlockingIOError, OSError):
            return []
        names = (signal.Signals(number).name for number in numbers if number in signal.valid_signals())
        return [name for name in names if name in self._names]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked data-loader worker: the trainer decides, workers end with it
        name = signal.Signals(number).name
        if name == "SIGINT":
            self._interrupts += 1
            if self._interrupts > 1:
                self._on_second_interrupt()
                return
        self._on_signal(name)
        if self.may_interrupt and frame is not None:
            # Never inside our own code, where a batch could have been taken and not yet handed on.
            module = str(frame.f_globals.get("__name__", ""))
            if not module.startswith("obsinfra.") or module.startswith("obsinfra.workloads"):
                self.may_interrupt = False
                raise InterruptedWait(name)


_doors: list[SignalDoor] = []


def _in_forked_child() -> None:
    """A forked child must not write into the trainer's wake-up descriptor."""
    if _doors:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
        _doors.clear()


os.register_at_fork(after_in_child=_in_forked_child)
