"""Signals as one more door of the control channel, and how they reach a loop that is not looking.

The Python handler runs on the main thread between two bytecodes; a wake-up descriptor, written by the
interpreter's C handler at once, tells the watchdog even while the main thread is stuck in C.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.context import get_spawning_popen
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any, Literal

from torch.utils.data import DataLoader, get_worker_info

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
        on_second_interrupt: called when SIGINT comes again, on the main thread or, should that be stuck, on
            the one that drains; takes no lock and ends the process.

    Attributes:
        may_interrupt: set by the loop around what the handler may leave by `InterruptedWait`: a wait for
            data, or a validation.
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
        self._interrupts_drained = 0
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._over = RawValue(ctypes.c_bool, False)  # shared with forked children and all loader workers
        self._previous_fd = -1
        self.may_interrupt: Literal["data", "validation"] | None = None

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
        self._over.value = True
        above = _doors[_doors.index(self) + 1 :] if self in _doors else []
        if threading.current_thread() is threading.main_thread():
            for number, previous in self._previous.items():
                if signal.getsignal(number) == self._handle:
                    signal.signal(number, previous if previous is not None else signal.SIG_DFL)
            if not above:
                _set_wakeup_fd(self._previous_fd)
        for door in above:  # of runs that began later and go on: what they put back one day is not this one
            for number, previous in door._previous.items():
                if previous == self._handle:
                    door._previous[number] = self._previous[number]
            if door._previous_fd == self._pair[1].fileno():
                door._previous_fd = self._previous_fd
        self._previous.clear()
        for end in self._pair:
            end.close()
        self._pair = None
        if self in _doors:
            _doors.remove(self)

    @contextlib.contextmanager
    def shielding(self, loader: object) -> Iterator[None]:
        """Around the start of `loader`'s workers: signals to the process group are the trainer's to obey.

        A worker that died of one would take the step down that the emergency checkpoint waits for.
        """
        if self._pair is None or not isinstance(loader, DataLoader) or not loader.num_workers:
            yield
            return
        numbers = set(self._previous)
        inner: Callable[[int], object] | None = loader.worker_init_fn
        if isinstance(inner, _WorkerStart):  # of this run, or of one before that used the same loader
            inner = inner.inner
        loader.worker_init_fn = _WorkerStart(numbers, self._over, inner)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def drain(self) -> list[str]:
        """Names of the signals that arrived since the last call, as the wake-up descriptor tells."""
        if self._pair is None:
            return []
        try:
            numbers = self._pair[0].recv(4096)
        except (BlockingIOError, OSError):
            return []
        names = [signal.Signals(number).name for number in numbers if number in signal.valid_signals()]
        ours = [name for name in names if name in self._names]
        self._interrupts_drained += ours.count("SIGINT")
        if self._interrupts_drained > 1:
            self._on_second_interrupt()
        return ours

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            self._in_child(number)
            return
        name = signal.Signals(number).name
        if name == "SIGINT":
            self._interrupts += 1
            if self._interrupts > 1:
                self._on_second_interrupt()
                return
        for door in _doors:  # of every run of this process
            if name in door._names:
                door._on_signal(name)
        if self.may_interrupt is not None and frame is not None:
            # Never inside our own code, where a batch could have been counted and not yet handed on; a
            # workload's validation counts nothing.
            module = str(frame.f_globals.get("__name__", ""))
            validating = self.may_interrupt == "validation" and module.startswith("obsinfra.workloads.")
            if validating or not module.startswith("obsinfra."):
                self.may_interrupt = None
                raise InterruptedWait(name)

    def _in_child(self, number: int) -> None:
        """A data-loader worker goes on: the batch it loads is waited for, and it ends with the run.

        Any other forked child, and a worker left behind by the run, is ended as if we had never been here.
        """
        if get_worker_info() is None or self._over.value:
            previous = self._previous.get(signal.Signals(number))
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)
            signal.raise_signal(number)


class _WorkerStart:
    """`worker_init_fn` of a shielded loader; `inner` is the user's own.

    Args:
        numbers: signals that are the trainer's to obey.
        over: true once the run has ended.
    """

    def __init__(
        self, numbers: set[signal.Signals], over: ctypes.c_bool | None, inner: Callable[[int], object] | None
    ) -> None:
        self._numbers, self._over, self.inner = numbers, over, inner

    def __call__(self, worker_id: int) -> None:
        # Until here torch's own handler of SIGTERM would end the worker. A spawned one has no door.
        handler = _inherited[-1]._handle if _inherited else self._unless_over
        for number in self._numbers:
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)
        if self.inner is not None:
            self.inner(worker_id)

    def _unless_over(self, number: int, frame: FrameType | None) -> None:
        """Python ends its children by SIGTERM when it ends, and waits for them."""
        if self._over is None or self._over.value:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __getstate__(self) -> dict[str, Any]:
        """Shared memory goes only to a process that is being started, not into a copy of the loader."""
        return {**vars(self), "_over": self._over if get_spawning_popen() is not None else None}


def _set_wakeup_fd(fd: int) -> None:
    try:
        signal.set_wakeup_fd(fd)
    except (OSError, ValueError):  # whose it was has closed it
        signal.set_wakeup_fd(-1)


_doors: list[SignalDoor] = []
"""Installed in this process, in the order in which they were."""

_inherited: list[SignalDoor] = []
_masks: list[set[int | signal.Signals]] = []


def _before_fork() -> None:
    """A signal to the child before it lets go of the wake-up descriptor would look like the trainer's."""
    ours = {number for door in _doors for number in door._previous}
    _masks.append(set(signal.pthread_sigmask(signal.SIG_BLOCK, ours)))


def _in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _in_child() -> None:
    if _doors:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
        _inherited[:] = _doors
        _doors.clear()
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
