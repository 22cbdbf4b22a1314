"""Work beside the loop: one piece at a time, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """A thread that does one piece of work at a time.

    What the work raises is raised again by the next `start` or `wait`. `canceled` tells the work that nobody wants it.
    """

    def __init__(self) -> None:
        self.canceled = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether work is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None], *, name: str) -> None:
        """Begin a piece of work, after the one before."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Return when no work is under way, on any thread; what it raised is left to the next `start` or `wait`."""
        if thread := self._thread:
            thread.join()

    def wait(self) -> None:
        """Return when no work is under way."""
        self.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def cancel(self, *, grace_seconds: float) -> None:
        """Give the work that is under way so long to end by itself, then cancel it; what it raises is dropped."""
        if self._thread is not None:
            self._thread.join(grace_seconds)
            self.canceled.set()
            self._thread.join()
        self._thread, self._error = None, None

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
