"""Processes that are there, and such that are gone."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from genpipe.pipeline import presence
from genpipe.pipeline.presence import EXPIRY_SECONDS, Presence, heartbeat


def of(code: str) -> Presence:
    """The presence of another process, which then runs `code` and waits for its input to end."""
    begin = "from genpipe.pipeline.presence import Presence; print(Presence.here().model_dump_json(), flush=True)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{begin}{code}\nimport sys; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    there = Presence.model_validate_json(process.stdout.readline())
    processes[there.pid] = process
    return there


processes: dict[int, subprocess.Popen[str]] = {}


def test_a_process_of_this_machine_is_looked_for_whatever_its_heartbeat_says() -> None:
    there = of("")
    silent = there.model_copy(update={"beat": time.time() - 10 * EXPIRY_SECONDS})
    assert there.is_alive() and silent.is_alive(), "it may be stopped by a debugger"
    processes[there.pid].kill()
    deadline = time.monotonic() + 20
    while there.is_alive():
        assert time.monotonic() < deadline, "a zombie is dead, though nobody has waited for it"
        time.sleep(0.05)
    processes[there.pid].wait()
    assert not there.is_alive()


def test_another_process_that_took_its_number_is_not_it() -> None:
    here = Presence.here()
    assert here.is_alive()
    assert not here.model_copy(update={"started": "1"}).is_alive()


def test_of_another_machine_the_heartbeat_is_believed() -> None:
    elsewhere = Presence.here().model_copy(update={"machine": "elsewhere"})
    assert elsewhere.is_alive()
    assert not elsewhere.model_copy(update={"beat": time.time() - EXPIRY_SECONDS}).is_alive()


def test_what_was_left_is_nobodys() -> None:
    assert not Presence.here(left=True).is_alive()


def test_a_heartbeat_goes_on_through_trouble_with_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[float] = []
    twice = threading.Event()

    def beat() -> None:
        beats.append(time.monotonic())
        if len(beats) == 2:
            twice.set()
        raise OSError("the disk is full")

    with heartbeat(beat, seconds=0.01):
        assert twice.wait(20)
    count = len(beats)
    time.sleep(0.1)
    assert len(beats) == count, "it has stopped"
    assert presence.BEAT_SECONDS < EXPIRY_SECONDS / 3
