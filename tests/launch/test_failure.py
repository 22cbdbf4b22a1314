"""What a job reports of its failure, and what a new attempt forgets."""

from __future__ import annotations

from pathlib import Path

import pytest
from toybox import Toys

from genpipe.launch.failure import JobLost, begin_attempt, last_attempt, read_failure, report_failure
from genpipe.pipeline.spec import StageSpec
from genpipe.storage import open_storage


class ClusterGone(Exception):
    pass


@pytest.fixture
def spec(tmp_path: Path) -> StageSpec:
    return Toys(tmp_path).spec("toy_data")


def fail(spec: StageSpec, error: BaseException, *, job: str = "job-1") -> None:
    with pytest.raises(type(error)), report_failure(spec, job, infrastructure=(ClusterGone,)):
        raise error


@pytest.mark.parametrize(
    ("error", "infrastructure"),
    [
        (ValueError("the config is wrong"), False),
        (OSError(28, "No space left on device"), False),
        (ConnectionResetError("by the other side"), True),
        (TimeoutError("no answer"), True),
        (ClusterGone("its head is gone"), True),
        (JobLost("Ray Train gave up"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_faults_of_the_infrastructure_are_told_from_the_stages_own(
    spec: StageSpec, error: Exception, infrastructure: bool
) -> None:
    fail(spec, error)
    failure = read_failure(spec.work, "job-1")
    assert failure is not None
    assert failure.infrastructure == infrastructure
    assert failure.message == str(error)
    assert type(error).__name__ in failure.traceback


def test_the_stages_own_fault_outweighs_the_others_that_follow_or_precede_it(spec: StageSpec) -> None:
    fail(spec, ConnectionError("rank 1 is gone"))
    fail(spec, ValueError("the loss is wrong"))
    fail(spec, ConnectionError("rank 0 is gone"))
    fail(spec, ValueError("and again"))
    failure = read_failure(spec.work, "job-1")
    assert failure is not None and failure.message == "the loss is wrong"


def test_interruptions_are_not_failures(spec: StageSpec) -> None:
    for interruption in (KeyboardInterrupt("Ctrl-C"), SystemExit(143)):
        fail(spec, interruption)
    fail(spec, RuntimeError("cannot schedule new futures after interpreter shutdown"))
    assert read_failure(spec.work, "job-1") is None


def test_a_new_attempt_starts_clean(spec: StageSpec) -> None:
    assert last_attempt(spec.work) == 0
    begin_attempt(spec.work, "genpipe-toy-0123-1")
    fail(spec, ValueError("a full disk"), job="genpipe-toy-0123-1")
    assert read_failure(spec.work, "genpipe-toy-0123-2") is None, "it belongs to the other attempt"
    open_storage(spec.work).write("begun/genpipe-toy-0123-1/part-0/0", b"")
    begin_attempt(spec.work, "genpipe-toy-0123-2")
    assert last_attempt(spec.work) == 2
    assert read_failure(spec.work, "genpipe-toy-0123-1") is None
    assert [entry.key for entry in open_storage(spec.work).list()] == ["attempt"]
