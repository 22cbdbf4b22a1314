"""How a stage is asked to stop, and what it says when it did.

A request is a file of the stage's work folder, where rank 0 looks for it, so that it reaches every launcher on any
machine. A signal or a notice of the cluster is heard by the rank that gets it, which writes the request down. Training
asks at every step, writes a checkpoint, and ends as `training.loop.Interrupted`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

from pydantic import Field

from genpipe.config import Config
from genpipe.pipeline.spec import StageSpec, read_progress, write_progress
from genpipe.storage import open_storage

REQUEST, OUTCOME = "stop.json", "stopped.json"
POLL_SECONDS = 1.0

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Of whoever takes a machine away: SIGTERM of most, SIGUSR1 where Slurm is asked for it (`--signal=USR1@120`)."""

PREEMPTED_STATUS = 75
"""The exit status of a stage that is to go on elsewhere, or later: EX_TEMPFAIL of sysexits.h, 'try again'."""
CANCELLED_STATUS = 130
"""The exit status of a stage that somebody wanted to end, as of a program that was ended by Ctrl-C."""

Reason = Literal["preempted", "cancelled"]


class Stop(Config):
    """A request to stop: preempted, to go on by itself when it can, or cancelled, to go on when somebody says so."""

    reason: Reason
    by: str = Field(description="who asked")
    attempt: str = Field("", description="the attempt that is meant; empty: whichever runs")


class Stopped(Stop):
    """What came of a request."""

    done: str = Field(description="what is kept: samples trained on, or parts")

    @property
    def status(self) -> int:
        """The exit status of a process that ends so."""
        return PREEMPTED_STATUS if self.reason == "preempted" else CANCELLED_STATUS

    def describe(self) -> str:
        """For people, in a clause."""
        return f"{self.reason} at {self.done} ({self.by})"

    @property
    def note(self) -> str:
        """For people who watch the attempt that follows."""
        return f"was {self.reason} by {self.by}, goes on from {self.done}"


class StageStopped(KeyboardInterrupt):
    """The stage has stopped because it was asked to, with what it had done kept: neither an error nor a result."""

    def __init__(self, stopped: Stopped) -> None:
        super().__init__(f"{stopped.describe()}; the same command goes on from there")
        self.stopped = stopped


def request_stop(spec: StageSpec, reason: Reason, *, by: str) -> None:
    """Ask whoever runs the stage to stop; a cancellation is not taken back by a preemption.

    A preemption is that of the attempt of `spec`: ranks whose driver is gone are told to end, too, and the attempt that
    follows has nothing to do with that.
    """
    there = _read(spec)
    if there is None or there.reason == "preempted":
        stop = Stop(reason=reason, by=by, attempt=_attempt(spec) if reason == "preempted" else "")
        open_storage(spec.work).write(REQUEST, stop.model_dump_json().encode())


def requested(spec: StageSpec) -> Stop | None:
    """The request to the attempt of `spec` that is not answered yet."""
    stop = _read(spec)
    return stop if stop and stop.attempt in ("", _attempt(spec)) else None


def withdraw(spec: StageSpec) -> None:
    """Begin an attempt: what an earlier one was asked, and did not answer, does not count."""
    open_storage(spec.work).delete(REQUEST)


def answer(spec: StageSpec, *, done: str) -> StageStopped:
    """Write down that the stage has stopped, take the request away, and return what to raise: rank 0's part."""
    stopped = _stopped(spec, requested(spec), done)
    open_storage(spec.work).write(OUTCOME, stopped.model_dump_json().encode())
    if progress := read_progress(spec.work):
        write_progress(spec.work, progress.model_copy(update={"note": stopped.note}))
    withdraw(spec)
    return StageStopped(stopped)


def follow(spec: StageSpec, *, done: str) -> StageStopped:
    """What to raise on the other ranks."""
    return StageStopped(_stopped(spec, requested(spec) or outcome(spec), done))


def _stopped(spec: StageSpec, stop: Stop | None, done: str) -> Stopped:
    stop = stop or Stop(reason="preempted", by="a signal")
    return Stopped(reason=stop.reason, by=stop.by, done=done, attempt=_attempt(spec))


def _attempt(spec: StageSpec) -> str:
    """The id of the attempt that `spec` was given to, empty without Ray."""
    return spec.links.get("ray_job", "")


def _read(spec: StageSpec) -> Stop | None:
    try:
        return Stop.model_validate_json(open_storage(spec.work).read(REQUEST))
    except FileNotFoundError:
        return None


def outcome(spec: StageSpec) -> Stopped | None:
    """How the last attempt that stopped on request did."""
    try:
        return Stopped.model_validate_json(open_storage(spec.work).read(OUTCOME))
    except FileNotFoundError:
        return None


def this_process(what: str) -> str:
    """For `Stop.by`: what happened, and where."""
    return f"{what} to process {os.getpid()} on {socket.gethostname()}"


class _Signals:
    """What this process was told by signals, of which it has one set, whoever listens."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.heard = ""
        self.arrived = threading.Event()

    def hear(self, signum: int, frame: FrameType | None) -> None:
        self.heard = signal.Signals(signum).name
        self.arrived.set()


_signals = _Signals()


def hear_signals() -> dict[signal.Signals, object]:
    """Take SIGTERM and SIGUSR1 as requests to stop, on the main thread; returns the handlers that were there."""
    _signals.reset()
    return {number: signal.signal(number, _signals.hear) for number in SIGNALS}


@contextmanager
def listening(spec: StageSpec, *, rank: int, notice: Callable[[], str] = str) -> Iterator[Callable[[], bool]]:
    """Listen for a request to stop during the block; yields what tells whether there was one, at no cost.

    Every rank hears its own signals, if it is on the main thread or called `hear_signals` there before, and `notice`,
    which says who takes its machine away; rank 0 looks into the work folder, too.
    """
    before = hear_signals() if threading.current_thread() is threading.main_thread() else {}
    asked, ended = threading.Event(), threading.Event()

    def listen() -> None:
        while not ended.is_set():
            _signals.arrived.wait(POLL_SECONDS)
            try:
                if told := (this_process(_signals.heard) if _signals.heard else notice()):
                    asked.set()  # first, as the store may be slow
                    request_stop(spec, "preempted", by=told)
                elif rank == 0 and requested(spec):
                    asked.set()
            except OSError as error:  # of the store, which may well be back at the next look
                print(f"cannot look for requests to stop: {error}", file=sys.stderr, flush=True)
            if asked.is_set():
                return

    thread = threading.Thread(target=listen, name="stop-listener", daemon=True)
    thread.start()
    try:
        yield asked.is_set
    finally:
        ended.set()
        _signals.arrived.set()  # wakes the thread
        thread.join(POLL_SECONDS)  # what it writes is not to be found by the next attempt
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
