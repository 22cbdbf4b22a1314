"""Records that are written in the background of the work that they tell about."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Point(NamedTuple):
    """One value of one metric; `step` is samples seen (seconds, for system metrics)."""

    name: str
    value: float
    milliseconds: int
    step: int


class Picture(NamedTuple):
    """A picture (uint8, HWC); those of one name are a series over samples."""

    name: str
    image: np.ndarray
    milliseconds: int
    step: int


class File(NamedTuple):
    """A file with its content; a later one of the same name takes its place."""

    name: str
    data: bytes


class Facts(NamedTuple):
    """Facts about the run by name."""

    tags: Mapping[str, str]


class Status(NamedTuple):
    """What became of the run: RUNNING, FINISHED, FAILED or KILLED, and the error that ended it.

    A `late` one is told by another process than the one that ended: it holds only if that one left the run RUNNING.
    """

    status: str
    milliseconds: int
    error: str = ""
    late: bool = False


Record = Point | Picture | File | Facts | Status


class Steps:
    """The last step of each metric and each series of pictures: those only go forward in a run."""

    def __init__(self) -> None:
        self.last: dict[str, int] = {}

    def is_new(self, record: Record) -> bool:
        """Whether a record is of no series, or is further on in its series than all before it."""
        return not isinstance(record, Point | Picture) or record.step > self.last.get(_series(record), -1)

    def note(self, record: Record) -> None:
        """The record is kept."""
        if isinstance(record, Point | Picture):
            self.last[_series(record)] = max(record.step, self.last.get(_series(record), -1))


def _series(record: Point | Picture) -> str:
    return record.name if isinstance(record, Point) else f"images/{record.name}"


class Keeper(Protocol):
    """Keeps the records of one run. Called on a recorder's thread alone; raises where it cannot be reached."""

    where: str
    """For people."""
    pause_seconds: float
    """Between writes."""

    def open(self) -> None:
        """Look up what the run has recorded so far: before the first write, and again after each outage."""
        ...

    def write(self, records: Sequence[Record]) -> None:
        """Keep the records; a metric or picture that stands there for this step, or a later one, is passed over.

        So the points that a resumed training makes once more stand once, and a write may be repeated.
        """
        ...

    def refuses(self, error: Exception) -> bool:
        """Whether the error says that a record is not wanted, now or later."""
        ...


class Recorder:
    """A thread that hands records to a keeper, in the order they were put.

    `put` never waits. Through a short outage writing is tried again; after PATIENCE_SECONDS the `reserve` gets the
    records, until the keeper answers again, which hands in what the reserve has (`Keeper.open`). `sense` gives further
    records when it has some. Nothing of this raises: a record is not worth the work that it tells about.
    """

    CAPACITY = 10_000
    PATIENCE_SECONDS = 15.0
    FLUSH_SECONDS = 3.0
    CLOSE_SECONDS = 60.0
    RETRY_SECONDS = (1.0, 30.0)

    def __init__(
        self, keeper: Keeper, *, reserve: Keeper | None = None, sense: Callable[[], list[Point]] | None = None
    ) -> None:
        self.keeper = keeper
        self.reserve = reserve
        self.sense = sense
        self.items: queue.Queue[Sequence[Record] | threading.Event] = queue.Queue(self.CAPACITY)
        self.closing = threading.Event()
        self.wake = threading.Event()
        self.patience = float("inf")
        self.opened: set[int] = set()
        self.away = False
        self.retry_at = 0.0
        self.warned: set[str] = set()
        self.thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self.thread.start()

    @property
    def complete(self) -> bool:
        """Whether, closed, the keeper has every record that it did not refuse."""
        return self.closing.is_set() and not self.thread.is_alive() and not self.away

    def put(self, records: Sequence[Record]) -> None:
        """Have the thread write some records."""
        try:
            self.items.put_nowait(records)
        except queue.Full:
            self._warn("the buffer of records is full; some are lost")

    def flush(self) -> None:
        """Return when what was put is kept, by the reserve if the keeper does not take it within FLUSH_SECONDS."""
        flushed = threading.Event()
        try:
            self.items.put_nowait(flushed)
        except queue.Full:
            return
        self.patience = time.monotonic() + self.FLUSH_SECONDS
        self.wake.set()
        flushed.wait(2 * self.FLUSH_SECONDS)
        self.patience = float("inf")

    def close(self) -> None:
        """End the thread once everything is kept, or CLOSE_SECONDS after this call."""
        if not self.closing.is_set():
            self.patience = time.monotonic() + min(self.PATIENCE_SECONDS, self.CLOSE_SECONDS)
            self.closing.set()
            self.wake.set()
        self.thread.join(self.CLOSE_SECONDS)
        if self.thread.is_alive():
            self._warn("the last records were not taken in time")

    def _work(self) -> None:
        while True:
            last = self.closing.is_set()
            self.wake.clear()
            records: list[Record] = list(self._sensed())
            for item in self._waiting():
                if isinstance(item, threading.Event):
                    self._write(records)
                    records = []
                    item.set()
                else:
                    records += item
            self._write(records)
            if last and self.items.empty():
                return
            if not self.closing.is_set():
                keeper = self.reserve if self.away and self.reserve else self.keeper
                self.wake.wait(keeper.pause_seconds)

    def _sensed(self) -> list[Point]:
        try:
            return self.sense() if self.sense is not None else []
        except Exception as error:
            self._warn(f"the use of this machine is not recorded: {_reason(error)}")
            return []

    def _waiting(self) -> Iterable[Sequence[Record] | threading.Event]:
        while True:
            try:
                yield self.items.get_nowait()
            except queue.Empty:
                return

    def _write(self, records: Sequence[Record]) -> None:
        """Hand records to the keeper, or in its absence to the reserve."""
        if not records:
            return
        if self.away and time.monotonic() < self.retry_at and not self.closing.is_set():
            self._reserve(records)
            return
        begun = time.monotonic()
        pause, longest = self.RETRY_SECONDS
        while (error := self._attempt(self.keeper, records)) is not None:
            self.opened.discard(id(self.keeper))
            impatient = self.away or time.monotonic() > min(begun + self.PATIENCE_SECONDS, self.patience)
            if impatient and (self.reserve is not None or self.closing.is_set()):
                self.away, self.retry_at = True, time.monotonic() + longest
                self._warn(f"no answer{self._kept()}: {_reason(error)}")
                self._reserve(records)
                return
            self.wake.wait(min(pause, max(0.05, self.patience - time.monotonic())))
            self.wake.clear()
            pause = min(2 * pause, longest)
        if self.away:
            self.away = False
            self.warned.clear()
            self._warn("answers again; what was kept meanwhile is handed in")

    def _kept(self) -> str:
        return f"; records are kept in {self.reserve.where} and handed in later" if self.reserve else ""

    def _reserve(self, records: Sequence[Record]) -> None:
        error = self._attempt(self.reserve, records) if self.reserve else None
        if error is not None or self.reserve is None:
            self._warn(f"records are lost{f': {_reason(error)}' if error else ''}")

    def _attempt(self, keeper: Keeper, records: Sequence[Record]) -> Exception | None:
        """Have a keeper write, without the records that it refuses; the error if it could not be reached."""
        try:
            if id(keeper) not in self.opened:
                keeper.open()
                self.opened.add(id(keeper))
            keeper.write(records)
        except Exception as error:
            if not keeper.refuses(error):
                return error
            if len(records) > 1:
                failed = [self._attempt(keeper, [record]) for record in records]  # each by itself
                return next((error for error in failed if error is not None), None)
            self._warn(f"a record is lost: {_reason(error)}")
        return None

    def _warn(self, message: str) -> None:
        kind = message.split(":")[0]
        if kind not in self.warned:
            self.warned.add(kind)
            print(f"{self.keeper.where}: {message}", file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
