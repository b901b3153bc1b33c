"""Telling whether a process named in a file is still that process. For runs, the sidecar and the stack."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process, named so that a recycled pid is not mistaken for it.

    Attributes:
        pid: process id in this host's (or container's) pid namespace.
        created: start time in seconds since the epoch, as the kernel tells.
    """

    pid: int
    created: float

    @classmethod
    def current(cls) -> ProcessId:
        """This very process."""
        pid = os.getpid()
        return cls(pid, psutil.Process(pid).create_time())

    def alive(self) -> bool:
        """True while this process runs; False for an ended, zombie or recycled pid."""
        try:
            process = psutil.Process(self.pid)
            return (
                abs(process.create_time() - self.created) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.Error:
            return False
