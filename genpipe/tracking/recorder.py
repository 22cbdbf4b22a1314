"""Records that are written in the background of the work that they tell about."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Point(NamedTuple):
    """One value of one metric; `step` is samples seen (seconds, for system metrics)."""

    name: str
    value: float
    milliseconds: int
    step: int


Item = list[Point] | Callable[[], Any]


class Recorder:
    """A thread that writes points and calls functions, in the order they were put.

    `put` never waits. Writing is retried through an outage; records are lost, with a warning, only when the buffer is
    full, when they are `refused`, or when the other side stays away at the end: then `keep` gets the points. `sense`
    gives further points when it has some. Nothing of this raises: a record is not worth the work that it tells about.
    """

    CAPACITY = 1000
    CLOSE_SECONDS = 60.0
    RETRY_SECONDS = (1.0, 30.0)
    PAUSE_SECONDS = 0.5

    def __init__(
        self,
        *,
        write: Callable[[list[Point]], Any],
        refused: Callable[[Exception], bool],
        sense: Callable[[], list[Point]] | None = None,
        keep: Callable[[list[Point]], Any] | None = None,
        pause_seconds: float | None = None,
        label: str,
    ) -> None:
        self.write = write
        self.refused = refused
        self.sense = sense
        self.keep = keep
        self.pause_seconds = self.PAUSE_SECONDS if pause_seconds is None else pause_seconds
        self.label = label
        self.items: queue.Queue[Item] = queue.Queue(self.CAPACITY)
        self.closing = threading.Event()
        self.deadline = float("inf")
        self.warned: set[str] = set()
        self.thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self.thread.start()

    def put(self, item: Item) -> None:
        """Have the thread write some points, or call a function."""
        try:
            self.items.put_nowait(item)
        except queue.Full:
            self._warn("the buffer of records is full; some are lost")

    def close(self) -> None:
        """End the thread once everything is written, or CLOSE_SECONDS after this call."""
        if not self.closing.is_set():
            self.deadline = time.monotonic() + self.CLOSE_SECONDS
            self.closing.set()
        self.thread.join(max(0.0, self.deadline - time.monotonic()) + 5)
        if self.thread.is_alive():
            self._warn("the last records were not taken in time")

    def _work(self) -> None:
        while True:
            last = self.closing.is_set()
            points: list[Point] = []
            if self.sense is not None:
                self._persist(lambda points=points: points.extend(self.sense()))  # type: ignore[misc]
            for item in self._waiting():
                if isinstance(item, list):
                    points += item
                else:
                    self._flush(points)
                    points = []
                    self._persist(item)
            self._flush(points)
            if last and self.items.empty():
                return
            self.closing.wait(self.pause_seconds)

    def _waiting(self) -> Iterator[Item]:
        while True:
            try:
                yield self.items.get_nowait()
            except queue.Empty:
                return

    def _flush(self, points: list[Point]) -> None:
        if points and not self._persist(lambda: self.write(points)) and self.keep is not None:
            try:
                self.keep(points)
            except Exception as error:
                self._warn(f"metrics could not be kept elsewhere: {_reason(error)}")

    def _persist(self, write: Callable[[], Any]) -> bool:
        """Call `write` until it works (True), its record is refused, or the deadline passes."""
        pause, longest = self.RETRY_SECONDS
        while True:
            try:
                write()
                return True
            except Exception as error:
                if self.refused(error) or time.monotonic() > self.deadline:
                    self._warn(f"a record is lost: {_reason(error)}")
                    return False
                self._warn(f"no answer, trying again: {_reason(error)}")
            self.closing.wait(min(pause, max(0.0, self.deadline - time.monotonic())))
            pause = min(2 * pause, longest)

    def _warn(self, message: str) -> None:
        kind = message.split(":")[0]
        if kind not in self.warned:
            self.warned.add(kind)
            print(f"{self.label}: {message}", file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
