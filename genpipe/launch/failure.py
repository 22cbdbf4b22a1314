"""How a job fails, and how its submitter learns why: from `error.json` in the stage's work folder.

A failure belongs to one attempt, which is one job: the next attempt begins by deleting what the last one reported.
Faults of the infrastructure are worth another attempt, faults of the stage are not, and the latter outweigh the former.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field

from genpipe.config import Config
from genpipe.pipeline.spec import StageSpec
from genpipe.storage import open_storage

ATTEMPT = "attempt"
FAILURE = "error.json"
BEGUN = "begun/"
"""Where the work folder counts how often each part was begun, by job."""


class StageError(RuntimeError):
    """The stage itself failed; running it again as it is would fail again. `details` is for a debugger."""

    def __init__(self, message: str, *, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class JobLost(StageError):
    """The job was lost to its infrastructure (a killed driver, a lost node or cluster); a new attempt resumes it."""


class Failure(Config):
    """Why a job failed, as its work folder's `error.json` says."""

    job: str = Field(description="the attempt that failed")
    message: str
    infrastructure: bool = Field(description="a new attempt may well succeed")
    traceback: str


def last_attempt(work: str) -> int:
    """The number of the last attempt that began under `work`, 0 before the first."""
    try:
        job = open_storage(work).read(ATTEMPT).decode()
    except FileNotFoundError:
        return 0
    return int(job.rpartition("-")[2])


def begin_attempt(work: str, job: str) -> None:
    """Start a new attempt clean: forget how earlier ones failed, and how often they began each part."""
    storage = open_storage(work)
    storage.delete(FAILURE)
    storage.delete_all(BEGUN)
    storage.write(ATTEMPT, job.encode())


def read_failure(work: str, job: str) -> Failure | None:
    """The failure that `job` reported under `work`, if it did."""
    try:
        failure = Failure.model_validate_json(open_storage(work).read(FAILURE))
    except FileNotFoundError:
        return None
    return failure if failure.job == job else None


@contextmanager
def report_failure(spec: StageSpec, job: str, *, infrastructure: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Report an exception of the block to the job's submitter, and raise it on.

    Lost connections and timeouts, a lost job and the types of `infrastructure` are faults of the infrastructure. An
    interruption (KeyboardInterrupt, SystemExit) is no failure and is not reported.
    """
    try:
        yield
    except Exception as error:
        if _SHUTDOWN not in str(error):
            faults = (ConnectionError, TimeoutError, JobLost, *infrastructure)
            failure = Failure(
                job=job,
                message=str(error).strip() or type(error).__name__,
                infrastructure=isinstance(error, faults) or _lost_a_peer(error),
                traceback=traceback.format_exc(),
            )
            try:
                _report(spec.work, failure)
            except OSError as trouble:  # the store may be what failed: the log has both
                print(f"the failure could not be reported: {first_line(trouble)}", file=sys.stderr, flush=True)
        raise


def _report(work: str, failure: Failure) -> None:
    known = read_failure(work, failure.job)
    if known is None or (known.infrastructure and not failure.infrastructure):
        open_storage(work).write(FAILURE, failure.model_dump_json().encode())


_SHUTDOWN = "cannot schedule new futures after"
"""What a thread pool says (as a plain RuntimeError) in a process that is being shut down, which is no failure."""


def _lost_a_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone: Gloo raises plain RuntimeErrors, so by their words."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in ("gloo", "Gloo", "by peer"))


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
