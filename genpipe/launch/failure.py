"""How a job ends badly, and how its submitter learns of it: by the `error.json` in the stage's work folder."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field

from genpipe.config import Config
from genpipe.pipeline.spec import StageSpec
from genpipe.storage import open_storage

FAILURE = "error.json"


class StageError(RuntimeError):
    """The stage itself failed; running it again as it is would fail again. `details` is for a debugger."""

    def __init__(self, message: str, *, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class JobLost(StageError):
    """The job ended without a word (a killed driver, a lost node or cluster); a new attempt goes on from there."""


class Failure(Config):
    """Why a job failed, as its work folder's `error.json` says."""

    job: str
    message: str
    infrastructure: bool = Field(description="a new attempt may well succeed")
    traceback: str


def read_failure(work: str, job: str) -> Failure | None:
    """The failure that `job` left under `work`, if it did."""
    try:
        failure = Failure.model_validate_json(open_storage(work).read(FAILURE))
    except FileNotFoundError:
        return None
    return failure if failure.job == job else None


@contextmanager
def report_failure(spec: StageSpec, job: str) -> Iterator[None]:
    """Leave an exception of the block where the job's submitter finds it, unless one is told already."""
    try:
        yield
    except Exception as error:
        if read_failure(spec.work, job) is None and not isinstance(error, JobLost) and ENDING not in str(error):
            failure = Failure(
                job=job,
                message=str(error).strip() or type(error).__name__,
                infrastructure=isinstance(error, ConnectionError | TimeoutError) or _lost_a_peer(error),
                traceback=traceback.format_exc(),
            )
            open_storage(spec.work).write(FAILURE, failure.model_dump_json().encode())
        raise


ENDING = "cannot schedule new futures after"
"""What work says in a process that Ray is ending meanwhile, which is no failure of the work."""


def _lost_a_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone: that rank's end is the failure, not this one."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in ("gloo", "Gloo", "NCCL", "by peer"))


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
