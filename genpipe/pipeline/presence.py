"""Whether the process that left a file is still there: what its heartbeat and its process id say.

A process on this machine is looked for; of one elsewhere only the heartbeat is known.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from genpipe.config import Config

BEAT_SECONDS = 10.0
EXPIRY_SECONDS = 90.0
"""A heartbeat older than this, by the clock of whoever looks, is that of a dead process."""


class Presence(Config):
    """A process: `machine`, `pid` and when it `started` name it, `beat` is when it last said so (Unix time)."""

    machine: str
    pid: int
    started: str
    beat: float
    left: bool = False
    """Whether it has said that it is done here, and left the rest to others."""

    @classmethod
    def here(cls, *, left: bool = False) -> Presence:
        """This process, now."""
        return cls(machine=this_machine(), pid=os.getpid(), started=started(os.getpid()), beat=time.time(), left=left)

    def is_alive(self) -> bool:
        """Whether the process is there; one that cannot be seen from here is so until its heartbeat expires."""
        if self.left:
            return False
        if self.machine and self.machine == this_machine():
            return started(self.pid) == self.started
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
def this_machine() -> str:
    """What tells one space of process ids from all others: this boot of this machine, or a container on it.

    Empty where that is not known (not Linux).
    """
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started(pid: int) -> str:
    """When a process of this machine started, in ticks since the boot; empty if it is not there, or only a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]
