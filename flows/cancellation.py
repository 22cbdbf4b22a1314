"""A run that is cancelled in Prefect, by its page or its API, stops, whoever leads it.

Prefect tells only its workers, and those not in every case. So each run looks for itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException

POLL_SECONDS = 3.0


class RunCancelled(KeyboardInterrupt):
    """Somebody cancelled the flow run in Prefect; for what it started that is as if a person had pressed Ctrl-C."""


class Cancellation:
    """Whether a flow run has been cancelled."""

    def __init__(self) -> None:
        self.seen = threading.Event()

    def check(self) -> None:
        """Raise RunCancelled if it has been."""
        if self.seen.is_set():
            raise RunCancelled("the run was cancelled in Prefect; run it again to go on")


def is_cancelled(flow_run_id: str) -> bool:
    """Whether somebody has cancelled the flow run; False where its server cannot be asked."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run_id).state
    except (httpx.HTTPError, PrefectException):
        return False
    return state is not None and (state.is_cancelling() or state.is_cancelled())


@contextmanager
def watched(flow_run_id: str, *, stop: Callable[[], None]) -> Iterator[Cancellation]:
    """Look for a cancellation during the block, and call `stop`, on another thread, when there is one."""
    cancellation, ended = Cancellation(), threading.Event()

    def look() -> None:
        with get_client(sync_client=True) as client:
            while not ended.wait(POLL_SECONDS):
                try:
                    state = client.read_flow_run(flow_run_id).state
                except (httpx.HTTPError, PrefectException):  # a server that is away cannot be asked
                    continue
                if state is not None and state.is_cancelling():
                    cancellation.seen.set()
                    stop()
                    return

    watcher = threading.Thread(target=look, name="cancellation", daemon=True)
    watcher.start()
    try:
        yield cancellation
    finally:
        ended.set()
        watcher.join()
