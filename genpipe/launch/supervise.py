"""A command whose processes all end with the process that started it, whatever ended that one.

`subprocess.Popen(supervised([...]))` in place of `subprocess.Popen([...])` puts a small process between the two. It
looks at its parent twice a second rather than ask the kernel for a signal, which would come as soon as the *thread*
that started it is gone. On Linux it adopts what its descendants leave behind, so that it finds all of them at the end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

PARENT_SECONDS = 0.5
END_SECONDS = 10.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def supervised(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` under a supervisor whose parent is the process that starts it.

    It exits with the command's status. Asked to (SIGTERM, or SIGINT if that is not blocked), or when its parent is
    gone, it kills the command and every process that descends from it, at once: nothing there gets to clean up.
    """
    return [sys.executable, "-I", str(Path(__file__)), str(os.getpid()), *command]


def main(parent: int, command: Sequence[str]) -> int:
    """Run `command` until it or `parent` ends, then kill what is left of it; the exit status."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _asked_to_end)
    try:
        child = subprocess.Popen(command, preexec_fn=_end_with_the_supervisor)
        return _watch(child, parent)
    except SystemExit as asked:
        return int(asked.code or 0)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        _kill_descendants()


def _watch(child: subprocess.Popen[bytes], parent: int) -> int:
    while os.getppid() == parent:
        with suppress(subprocess.TimeoutExpired):
            status = child.wait(PARENT_SECONDS)
            return status if status >= 0 else 128 - status
    return 128 + signal.SIGTERM


def _asked_to_end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _end_with_the_supervisor() -> None:
    """If the supervisor itself is killed, the command at least is asked to end."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _kill_descendants() -> None:
    """Again and again, as a process may start another just before it dies."""
    deadline = time.monotonic() + END_SECONDS
    while (descendants := _descendants(os.getpid())) and time.monotonic() < deadline:
        for process in descendants:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        time.sleep(0.02)


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for process, parent in _processes():
        children.setdefault(parent, []).append(process)
    found: list[int] = []
    level = [root]
    while level:
        level = [child for process in level for child in children.get(process, ())]
        found += level
    return found


def _processes() -> list[tuple[int, int]]:
    """Every process of this machine, and its parent."""
    if sys.platform != "linux":
        listed = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        own = [tuple(map(int, line.split())) for line in listed.splitlines()]
        return [(pid, ppid) for pid, ppid in own]
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                after_name = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2]
                found.append((int(entry), int(after_name.split()[1])))
    return found


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
