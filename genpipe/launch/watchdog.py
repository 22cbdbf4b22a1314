"""Ranks that hang: found, named with their stack, and killed, so that whoever started the group starts it anew.

A rank writes what it is busy with into a few bytes of shared memory. A small process beside it, its watchdog, reads
them once a second, so that it sees a rank that is stopped, or that holds Python's lock, as well as one that waits for
ever. Of a rank that does not get on its watchdog tells the others, in the work folder, and all compare: as ranks go
through the same phases in the same order, those that are behind hold up the rest. A rank that waits for data, validates
or writes a checkpoint may take its time, and so may those that wait for it.

`python -m genpipe.launch.watchdog` is the process beside the rank, and imports little.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from genpipe.storage import Storage, join, open_storage

if TYPE_CHECKING:
    from genpipe.training.runtime import Phase

REPORTS, HANGS = "ranks", "hangs"
"""Where in the work folder the watchdogs tell one another of ranks that are stuck, and people of ranks that hung."""

QUICK = frozenset({"forward", "backward", "optimizer"})
"""Phases that end soon on a rank that does not hang."""

FIRST_STEP = 10
"""How many times as long the first step may take: libraries load their kernels and try out which ones are fast."""

POLL_SECONDS = 1.0
LOOKS = 20
"""How often a rank that is stuck is looked at within the time that is allowed."""
ROUNDS = 4
"""How often within that time each watchdog looks whether any other rank is stuck."""
SLEPT_SECONDS = 10.0
DUMP_SECONDS = 3.0
LAYOUT = struct.Struct("<QQ16s")
"""In shared memory: phases entered so far, rounds through all phases begun so far, and the name of the phase."""


class Watched:
    """One rank and the watchdog beside it, from entering the block to its end."""

    def __init__(self, work: str, *, rank: int, world_size: int, seconds: float | None) -> None:
        self._settings = asdict(_Settings(work, rank, world_size, seconds or 0.0, os.getpid()))
        self._seconds = seconds
        self._entered = self._rounds = 0

    def __enter__(self) -> Watched:
        self._folder = tempfile.TemporaryDirectory(prefix="genpipe-watchdog-")
        memory, stack = Path(self._folder.name, "memory"), Path(self._folder.name, "stack")
        memory.write_bytes(bytes(LAYOUT.size))
        with memory.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), LAYOUT.size)
        self.enter("start")
        self._process = None
        if self._seconds is not None:
            self._stack = stack.open("wb")
            faulthandler.register(signal.SIGUSR2, self._stack)
            paths = os.pathsep.join(filter(None, sys.path))
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, self._folder.name, json.dumps(self._settings)],
                env=os.environ | {"PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            faulthandler.unregister(signal.SIGUSR2)
            self._stack.close()
        self._memory.close()
        self._folder.cleanup()

    def enter(self, phase: Phase) -> None:
        """Note what the rank is busy with from now on."""
        self._entered += 1
        self._rounds += phase == "data"
        LAYOUT.pack_into(self._memory, 0, self._entered, self._rounds, phase.encode())


@dataclass(frozen=True)
class _Settings:
    work: str
    rank: int
    world_size: int
    seconds: float
    pid: int


@dataclass(frozen=True)
class Report:
    """What a watchdog tells the others once some rank does not get on; `beat` grows while it does.

    `seconds` is how long its own rank has been in its phase, `stuck` whether that is long, `hung` too long.
    """

    rank: int
    pid: int
    host: str
    entered: int
    phase: str
    seconds: float
    stuck: bool
    state: str
    hung: bool
    beat: int

    def describe(self) -> str:
        """For people: which rank, where, in what state, and what it was doing."""
        state = f", {self.state}" if self.state else ""
        seconds, phase = f"for {self.seconds:.0f} s", f"in its {self.phase} phase"
        done = f"made no progress {seconds} {phase}" if self.hung else f"has been {phase} {seconds}"
        return f"rank {self.rank} (process {self.pid} on {self.host}{state}) {done}"


@dataclass
class _Others:
    """The reports of all ranks as one watchdog sees them: those that are kept up, and since when."""

    storage: Storage
    world_size: int
    patience: float
    seen: dict[int, tuple[Report, float]] = field(default_factory=dict)

    def fresh(self) -> dict[int, Report]:
        """Reports that have changed lately: clocks of other machines are not asked."""
        now = time.monotonic()
        for rank in range(self.world_size):
            try:
                report = Report(**json.loads(self.storage.read(f"{REPORTS}/{rank}.json")))
            except FileNotFoundError:
                self.seen.pop(rank, None)
                continue
            if rank not in self.seen or self.seen[rank][0] != report:
                self.seen[rank] = (report, now)
        return {rank: report for rank, (report, at) in self.seen.items() if now - at < self.patience}


def behind(reports: Mapping[int, Report], world_size: int, *, give_up: bool) -> list[int]:
    """The ranks that hold up a group, by the reports of all; none while one may only be slow.

    A rank that nothing is heard of is waited for, too, until it is time to `give_up`: then its machine is gone. Of
    ranks that got equally far, those that a signal has stopped are to blame.
    """
    if not all(report.hung for report in reports.values()):
        return []
    silent = [rank for rank in range(world_size) if rank not in reports]
    if silent:
        return silent if give_up else []
    least = min(report.entered for report in reports.values())
    last = [rank for rank, report in reports.items() if report.entered == least]
    return [rank for rank in last if reports[rank].state] or last


def last_hang(work: str, *, since: float) -> str:
    """What was said of the last rank that hung since then (seconds of the epoch), empty if none did."""
    storage = open_storage(work)
    told = sorted(entry.key for entry in storage.list(f"{HANGS}/"))
    if not told or int(told[-1].removeprefix(f"{HANGS}/").partition("-")[0]) < int(since):
        return ""
    return storage.read(told[-1]).decode().splitlines()[0]


class _Watchdog:
    """The process beside a rank."""

    def __init__(self, folder: Path, settings: _Settings) -> None:
        self.settings = settings
        self.stack = folder / "stack"
        with (folder / "memory").open("rb") as file:
            self.memory = mmap.mmap(file.fileno(), LAYOUT.size, access=mmap.ACCESS_READ)
        self.storage = open_storage(settings.work)
        self.mine = f"{REPORTS}/{settings.rank}.json"
        self.poll = min(POLL_SECONDS, settings.seconds / LOOKS)
        self.others = _Others(self.storage, settings.world_size, patience=settings.seconds / 2)
        self.beat = 0
        self.told = -1
        self.asked = time.monotonic()
        self.alarm = False

    def watch(self) -> None:
        """Until the rank is gone, or hangs."""
        if self.settings.rank == 0:
            self._trying(self.storage.delete_all, f"{REPORTS}/")  # of an earlier attempt
        seen, since, polled, looked = -1, 0.0, time.monotonic(), 0.0
        while os.getppid() == self.settings.pid:
            time.sleep(self.poll)
            now = time.monotonic()
            if now - polled > SLEPT_SECONDS:
                since += now - polled  # this process, and the rank with it, was not let run
            polled = now
            entered, rounds, phase = LAYOUT.unpack(self.memory[:])
            if entered != seen:
                seen, since = entered, now
            if now - looked >= self.settings.seconds / LOOKS:
                looked = now
                limit = self.settings.seconds * (FIRST_STEP if rounds < 2 else 1)
                self._trying(self._look, entered, phase.rstrip(b"\0").decode(), now - since, limit)

    def _look(self, entered: int, phase: str, seconds: float, limit: float) -> None:
        """If some rank is stuck, tell of this one, and find out with the other watchdogs who is to blame."""
        stuck = seconds >= limit / 2
        if not stuck and not self._others_are_stuck():
            if self.beat:
                self.storage.delete(self.mine)
                self.beat = 0
            return
        self.beat += 1
        mine, state = self.settings, _state(self.settings.pid)
        hung = seconds >= limit and (phase in QUICK or bool(state))
        report = Report(
            mine.rank, mine.pid, socket.gethostname(), entered, phase, seconds, stuck, state, hung, self.beat
        )
        self.storage.write(self.mine, json.dumps(asdict(report)).encode())
        if not hung:
            if seconds >= limit and self.told != entered:
                self.told = entered
                print(f"{report.describe()}, which may take its time", file=sys.stderr, flush=True)
            return
        late = seconds >= 2 * limit
        blamed = behind(self.others.fresh(), mine.world_size, give_up=late)
        if mine.rank in blamed:
            self._kill(report, f"{report.describe()}; the group starts anew")
        elif blamed and late:  # by now their own watchdogs should have
            names = ", ".join(map(str, blamed))
            self._kill(report, f"{report.describe()}, waiting for rank {names}; the group starts anew")

    def _others_are_stuck(self) -> bool:
        """As of a moment ago: in a store far away each look costs something."""
        now = time.monotonic()
        if now - self.asked >= self.settings.seconds / ROUNDS:
            self.asked = now
            there = {entry.key for entry in self.storage.list(f"{REPORTS}/")} - {self.mine}
            self.alarm = bool(there) and any(report.stuck for report in self.others.fresh().values())
        return self.alarm

    def _kill(self, report: Report, message: str) -> None:
        message = f"{message} (its stack: {join(self.settings.work, HANGS)})"
        print(message, file=sys.stderr, flush=True)
        try:
            told = f"{message}\n\n{self._dump()}"
            self.storage.write(f"{HANGS}/{int(time.time())}-rank-{report.rank}.txt", told.encode())
            self.storage.delete(self.mine)
        finally:
            os.kill(self.settings.pid, signal.SIGKILL)
            sys.exit()

    def _dump(self) -> str:
        """The stacks of the rank's threads, which it writes itself unless it is stopped."""
        if _state(self.settings.pid):
            return "no stack: the process is stopped, and cannot say where it is"
        os.kill(self.settings.pid, signal.SIGUSR2)
        deadline = time.monotonic() + DUMP_SECONDS
        while not self.stack.stat().st_size and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 10)
        time.sleep(POLL_SECONDS / 10)  # for what is still being written
        return self.stack.read_text(errors="replace") or "no stack: the process does not react to signals"

    def _trying(self, act: Callable[..., None], *arguments: Any) -> None:
        """The store may be what does not get on: it is tried again at the next look."""
        try:
            act(*arguments)
        except OSError as error:
            print(f"the watchdog of rank {self.settings.rank}: {error}", file=sys.stderr, flush=True)


def _state(pid: int) -> str:
    """Whether a process was stopped, by its state in /proc; empty elsewhere than on Linux."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return {"T": "stopped by a signal (state T)", "t": "stopped by a debugger (state t)"}.get(state, "")


def main(folder: str, settings: str) -> None:
    """Watch the rank that started this process; signals are for the rank, whose end is this one's, too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    _Watchdog(Path(folder), _Settings(**json.loads(settings))).watch()


if __name__ == "__main__":
    main(*sys.argv[1:])
