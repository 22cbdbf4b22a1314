"""The processes of a run, all of them, whatever became of their parents.

The harness is a subreaper (prctl(2)): a process whose parent dies becomes its child instead of init's. So everything
that a run ever started is below the harness, and nothing can hide.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36
STOP_SECONDS = 10.0

SUPERVISOR = "launch/supervise.py"
"""In the command line of a supervisor, in which that of what it watches over stands, too."""

ROLES: dict[str, Callable[[psutil.Process, str], bool]] = {
    "flow": lambda process, line: "genpipe.cli.main run" in line,
    "prefect server": lambda process, line: "prefect.server" in line,
    "ray head": lambda process, line: "ray.scripts.scripts" in line,
    "gcs": lambda process, line: process.name() == "gcs_server",
    "raylet": lambda process, line: process.name() == "raylet",
    "dashboard": lambda process, line: "dashboard/dashboard.py" in line or line.startswith("ray-dashboard"),
    "dashboard agent": lambda process, line: "dashboard/agent.py" in line or "DashboardAgent" in line,
    "runtime env agent": lambda process, line: "runtime_env/agent/main.py" in line or "RuntimeEnvAgent" in line,
    "job supervisor": lambda process, line: "JobSupervisor" in line,
    "driver": lambda process, line: "genpipe.launch.ray" in line and not line.startswith(("/bin/sh", "sh ")),
    "train controller": lambda process, line: "TrainController" in line,
    "rank": lambda process, line: (
        "RayTrainWorker" in line or ("genpipe.launch.local" in line and "torchrun" not in line)
    ),
    "validator": lambda process, line: "ray::_validate" in line,
    "torchrun": lambda process, line: "torchrun" in line,
    "supervisor": lambda process, line: SUPERVISOR in line,
    "data worker": lambda process, line: "ray::MapWorker" in line,
}
"""What each kind of process is known by: the process and its command line."""

_apart: set[int] = set()


def adopt_orphans() -> None:
    """Have orphans of this process's descendants become its own children."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def set_apart(pid: int) -> None:
    """Count a process and its descendants as the harness's own, not as the run's."""
    _apart.add(pid)


def family() -> list[psutil.Process]:
    """What runs below this process and is the run's; the dead among its adopted children are reaped."""
    found = []
    for child in psutil.Process().children():
        if child.pid in _apart:
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [p for p in [child, *child.children(recursive=True)] if _alive(p)]
    return found


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        if process.status() != psutil.STATUS_ZOMBIE:
            return True
    return False


def reap(*, keep: Iterable[int]) -> None:
    """Take dead adopted children out of the process table; those of `keep` somebody waits for."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.pid not in _apart and child.pid not in keep and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


def of_role(role: str) -> list[psutil.Process]:
    """The processes of the run that play a role, a key of ROLES."""
    found = []
    for process in family():
        with contextlib.suppress(psutil.NoSuchProcess):
            line = command_line(process)
            if ROLES[role](process, line) and (role == "supervisor" or SUPERVISOR not in line):
                found.append(process)
    return found


def command_line(process: psutil.Process) -> str:
    """The command line of a process, empty once it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return " ".join(process.cmdline())
    return ""


def stop(process: psutil.Process) -> None:
    """Stop a process (SIGSTOP) and wait until none of its threads does anything: system calls end first."""
    process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + STOP_SECONDS
    while any(state not in "TtZ" for state in _states(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.005)


def _states(pid: int) -> list[str]:
    """The states of a process's threads, a letter each (proc(5))."""
    found = []
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            found.append(stat.read_text().rpartition(")")[2].split()[0])
    return found


def survivors(*, seconds: float) -> list[str]:
    """The command lines of what is left of the run after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := family()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [line[:120] for process in left if (line := command_line(process))]


def kill_all() -> None:
    """Kill the whole run, until nothing of it is left."""
    while left := family():
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(left, timeout=1)
        reap(keep=())
