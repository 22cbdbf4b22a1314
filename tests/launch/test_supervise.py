"""Real processes that are killed, and what is left of what they started."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from toybox import survivors, wait_for

from genpipe.launch.supervise import supervised

FAMILY = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
subprocess.Popen(sleep)
orphan = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"
subprocess.run([sys.executable, "-c", orphan, *sleep], check=True)
open(sys.argv[1], "w").close()
time.sleep(600)
"""
"""Has a child, and a grandchild whose parent is gone and that has a session of its own."""

STARTER = """
import subprocess, sys, threading, time
from genpipe.launch.supervise import supervised
thread = threading.Thread(target=lambda: subprocess.Popen(supervised(sys.argv[1:])))
thread.start()
thread.join()
time.sleep(600)
"""


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    return tmp_path / "ready"


def family(ready: Path) -> list[str]:
    return [sys.executable, "-c", FAMILY, str(ready)]


@pytest.mark.parametrize("victim", ["starter", "command"])
def test_nothing_is_left_whoever_is_killed(ready: Path, victim: str) -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER, *family(ready)])
    wait_for(ready.exists)
    time.sleep(1)  # the thread that started it is long gone, which alone must not end it
    started = psutil.Process(starter.pid).children(recursive=True)
    command = started[1]
    assert len(started) == 4 and command.cmdline()[1:3] == ["-c", FAMILY]
    (starter if victim == "starter" else command).kill()
    assert survivors(started) == []
    assert (starter.poll() is None) == (victim == "command")
    starter.kill()
    starter.wait()


def test_asked_to_end_it_ends_all(ready: Path) -> None:
    supervisor = subprocess.Popen(supervised(family(ready)))
    wait_for(ready.exists)
    started = psutil.Process(supervisor.pid).children(recursive=True)
    supervisor.terminate()
    assert supervisor.wait(20) == 128 + signal.SIGTERM
    assert survivors(started, seconds=0) == []


@pytest.mark.parametrize(("command", "status"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_the_status_is_the_commands(command: str, status: int) -> None:
    done = subprocess.run(
        supervised([sys.executable, "-c", f"import os, sys; print('said', flush=True); {command}"]),
        stdout=subprocess.PIPE,
    )
    assert (done.returncode, done.stdout) == (status, b"said\n")
