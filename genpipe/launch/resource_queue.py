"""Whose turn it is: stages that are ready wait here for the cores and GPUs of one machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

SETTLE_SECONDS = 0.5
"""From when somebody comes or leaves to when anybody is served: those that become ready together come one by one, and
so do those that waited for the one that leaves, which may be the first in order."""
POLL_SECONDS = 0.5


class Turns:
    """Gives out what a machine has, in an order that does not depend on who asked first.

    Ray would serve stages that became ready together by chance, and one that others wait for might come last.
    """

    def __init__(self, capacity: Mapping[str, float], *, interrupted: threading.Event) -> None:
        self.free = dict(capacity)
        self.waiting: list[int] = []
        self.settled = 0.0
        self.changed = threading.Condition()
        self.interrupted = interrupted

    @contextmanager
    def take(self, needs: Mapping[str, float], *, order: int) -> Iterator[bool]:
        """Wait for `needs` and hold them during the block; yields False, without them, once `interrupted` is set.

        Nobody overtakes a lower `order` that waits, so that a stage that needs the whole machine gets it. `needs` must
        fit the capacity.
        """
        granted = self._acquire(needs, order=order)
        try:
            yield granted
        finally:
            if granted:
                self._give(needs, sign=1)

    def _acquire(self, needs: Mapping[str, float], *, order: int) -> bool:
        with self.changed:
            self.waiting.append(order)
            self.settled = time.monotonic() + SETTLE_SECONDS
            while not self._served(needs, order=order) and not self.interrupted.is_set():
                unsettled = self.settled - time.monotonic()
                self.changed.wait(unsettled if unsettled > 0 else POLL_SECONDS)
            self.waiting.remove(order)
            if self.interrupted.is_set():
                return False
            self._give(needs, sign=-1)
            return True

    def _served(self, needs: Mapping[str, float], *, order: int) -> bool:
        if time.monotonic() < self.settled or order != min(self.waiting):
            return False
        return all(self.free.get(kind, 0.0) >= amount for kind, amount in needs.items())

    def _give(self, needs: Mapping[str, float], *, sign: int) -> None:
        with self.changed:  # a re-entrant lock
            for kind, amount in needs.items():
                self.free[kind] = self.free.get(kind, 0.0) + sign * amount
            if sign > 0:
                self.settled = time.monotonic() + SETTLE_SECONDS
            self.changed.notify_all()
