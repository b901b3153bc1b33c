"""Seeds of an order of data, and signals around the start of loader workers.

For the data loader here and the workloads' own. Never draws from torch's global generator.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_TRAINER_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def derived_seed(*parts: int | str) -> int:
    """A seed for torch generators from several numbers or words, the same on every machine and run."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def ignore_trainer_signals(worker_id: int) -> None:
    """Worker start: signals to the process group are the trainer's to deal with.

    A worker that died of Ctrl-C would take the batch down that the emergency checkpoint waits for. Workers
    end when the trainer tells them, or when it is gone.
    """
    for number in _TRAINER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TRAINER_SIGNALS)


@contextmanager
def trainer_signals_held() -> Iterator[None]:
    """Around the start of workers that `ignore_trainer_signals`.

    One that is hit before it ignores the signal would run the trainer's handlers. A signal that comes
    meanwhile reaches the trainer when this is left.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINER_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
