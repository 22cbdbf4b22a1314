"""How an attempt fails, and how its submitter learns why: from `errors/ATTEMPT/` in the stage's work folder.

Faults of the infrastructure are worth another attempt, faults of the stage are not, and the latter outweigh the former.
Which is which follows from types and from who is alive, never from the words of a message.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from genpipe.config import Config
from genpipe.files import telling_full
from genpipe.pipeline.spec import StageSpec
from genpipe.storage import open_storage

BEGUN = "begun/"
"""Where the work folder counts how often each part was begun, by attempt."""


class StageError(RuntimeError):
    """The stage itself failed; running it again as it is would fail again. `details` is for a debugger."""

    def __init__(self, message: str, *, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class JobLost(StageError):
    """The job was lost to its infrastructure (a killed driver, a lost node or cluster); a new attempt resumes it."""


class Failure(Config):
    """Why an attempt failed; one of the infrastructure may well succeed when it is tried again."""

    message: str
    traceback: str
    infrastructure: bool


def read_failure(work: str, attempt: str) -> Failure | None:
    """The failure that `attempt` reported under `work`, if it did: the stage's own fault before any other."""
    storage = open_storage(work)
    for infrastructure in (False, True):
        with suppress(FileNotFoundError):
            return Failure.model_validate_json(storage.read(_key(attempt, infrastructure=infrastructure)))
    return None


def report(work: str, attempt: str, failure: Failure) -> None:
    """Keep a failure for the submitter of the attempt, unless there is one of its kind: the first is the cause."""
    key = _key(attempt, infrastructure=failure.infrastructure)
    try:
        with suppress(FileExistsError):
            open_storage(work).create(key, failure.model_dump_json().encode())
    except OSError as trouble:  # the store may be what failed: the log has both
        print(f"the failure could not be reported: {first_line(trouble)}", file=sys.stderr, flush=True)


@contextmanager
def report_failure(
    spec: StageSpec, attempt: str, *, infrastructure: tuple[type[Exception], ...] = (), peers: int = 0
) -> Iterator[None]:
    """Report an exception of the block to the attempt's submitter, and raise it on.

    Lost connections and timeouts, a lost job and the types of `infrastructure` are faults of the infrastructure. So is
    for now a plain RuntimeError of a process that has `peers`, as Gloo raises where one of them is gone: who sees them
    all knows better. An interruption (KeyboardInterrupt, SystemExit) is no failure and is not reported.
    """
    try:
        yield
    except Exception as error:
        if not _shutting_down():
            faults = (ConnectionError, TimeoutError, JobLost, *infrastructure)
            unclear = peers > 0 and type(error) is RuntimeError
            report(spec.work, attempt, failure_of(error, infrastructure=unclear or isinstance(error, faults)))
        raise


def failure_of(error: Exception, *, infrastructure: bool) -> Failure:
    """What is reported of an exception."""
    try:
        with telling_full():
            raise error
    except Exception as told:
        message = str(told).strip() or type(told).__name__
    lines = traceback.format_exception(error)
    return Failure(message=message, traceback="".join(lines), infrastructure=infrastructure)


def forget_parts_begun(work: str) -> None:
    """Forget how often earlier attempts began each part."""
    open_storage(work).delete_all(BEGUN)


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _key(attempt: str, *, infrastructure: bool) -> str:
    return f"errors/{attempt}/{'infrastructure' if infrastructure else 'stage'}.json"


def _shutting_down() -> bool:
    """Whether this process is on its way out, when what fails is no failure: it takes no more work."""
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(int)
    except RuntimeError:
        return True
    return False
