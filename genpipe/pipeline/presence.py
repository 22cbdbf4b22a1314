"""Whether the process that left a file is still there: what its heartbeat and its process id say.

A process on this machine is looked for; of one elsewhere only the heartbeat is known.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psutil

from genpipe.config import Config

BEAT_SECONDS = 10.0
EXPIRY_SECONDS = 90.0
"""A heartbeat older than this, by the clock of whoever looks, is that of a dead process."""


class Presence(Config):
    """A process: `machine` and `pid` with the time it was `started` name it, `beat` is when it last said so (Unix)."""

    machine: str
    pid: int
    started: float
    beat: float
    left: bool = False
    """Whether it has said that it is done here, and left the rest to others."""

    @classmethod
    def here(cls, *, left: bool = False) -> Presence:
        """This process, now."""
        started = psutil.Process().create_time()
        return cls(machine=_machine(), pid=os.getpid(), started=started, beat=time.time(), left=left)

    def is_alive(self) -> bool:
        """Whether the process is there; one that cannot be seen from here is so until its heartbeat expires."""
        if self.left:
            return False
        if self.machine == _machine():
            try:
                process = psutil.Process(self.pid)
                if process.status() == psutil.STATUS_ZOMBIE:
                    return False
                if abs(process.create_time() - self.started) < 1:
                    return True  # otherwise another took its number, or the clock was set
            except psutil.NoSuchProcess:
                return False
        return time.time() - self.beat < EXPIRY_SECONDS


@contextmanager
def heartbeat(beat: Callable[[], object], *, seconds: float = BEAT_SECONDS) -> Iterator[None]:
    """Call `beat` on a thread of its own every so many seconds of the block; it has stopped when the block ends.

    What it raises as OSError is passed over: the next beat may get through.
    """
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(seconds):
            with suppress(OSError):
                beat()

    thread = threading.Thread(target=work, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@cache
def _machine() -> str:
    """This machine, boot and (of containers) process namespace: where a process id means one process."""
    names = [socket.gethostname()]
    with suppress(OSError):  # not Linux
        names.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        names.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(names)
