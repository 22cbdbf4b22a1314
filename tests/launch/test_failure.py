"""What an attempt reports of its failure, and whose fault it was."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toybox import Toys

from genpipe.launch.failure import JobLost, read_failure, report_failure
from genpipe.launch.lease import LeaseLost
from genpipe.pipeline.spec import StageSpec


class ClusterGone(Exception):
    pass


@pytest.fixture
def spec(tmp_path: Path) -> StageSpec:
    return Toys(tmp_path).spec("toy_data")


def fail(spec: StageSpec, error: BaseException, *, attempt: str = "first", peers: int = 0) -> None:
    with (
        pytest.raises(type(error)),
        report_failure(spec, attempt, infrastructure=(ClusterGone, torch.distributed.DistError), peers=peers),
    ):
        raise error


@pytest.mark.parametrize(
    ("error", "infrastructure"),
    [
        (ValueError("the config is wrong"), False),
        (FileNotFoundError(2, "No such file", "shard.tar"), False),
        (ConnectionResetError("by the other side"), True),
        (TimeoutError("no answer"), True),
        (ClusterGone("its head is gone"), True),
        (torch.distributed.DistNetworkError("no answer"), True),
        (JobLost("Ray Train gave up"), True),
        (LeaseLost("another attempt has taken over"), True),
        (RuntimeError("shapes do not match"), False),
        (RuntimeError("words like gloo, by peer and cannot schedule new futures after shutdown decide nothing"), False),
    ],
)
def test_faults_of_the_infrastructure_are_told_from_the_stages_own(
    spec: StageSpec, error: Exception, infrastructure: bool
) -> None:
    fail(spec, error)
    failure = read_failure(spec.work, "first")
    assert failure is not None
    assert failure.infrastructure == infrastructure
    assert failure.message == str(error)
    assert type(error).__name__ in failure.traceback


@pytest.mark.parametrize(
    ("error", "infrastructure"),
    [
        (RuntimeError("whatever Gloo says of a lost peer"), True),
        (torch.OutOfMemoryError("a type of its own"), False),
        (NotImplementedError("also a RuntimeError"), False),
    ],
)
def test_among_peers_a_plain_runtime_error_accuses_nobody(
    spec: StageSpec, error: Exception, infrastructure: bool
) -> None:
    fail(spec, error, peers=1)
    failure = read_failure(spec.work, "first")
    assert failure is not None and failure.infrastructure == infrastructure


def test_the_stages_own_fault_outweighs_the_others_that_follow_or_precede_it(spec: StageSpec) -> None:
    fail(spec, ConnectionError("rank 1 is gone"))
    fail(spec, ValueError("the loss is wrong"))
    fail(spec, ConnectionError("rank 0 is gone"))
    fail(spec, ValueError("and again"))
    failure = read_failure(spec.work, "first")
    assert failure is not None and failure.message == "the loss is wrong"


def test_interruptions_are_not_failures(spec: StageSpec) -> None:
    for interruption in (KeyboardInterrupt("Ctrl-C"), SystemExit(143)):
        fail(spec, interruption)
    assert read_failure(spec.work, "first") is None


LEAVING = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from genpipe.launch.failure import report_failure
from genpipe.pipeline.spec import StageSpec
spec = StageSpec.read(sys.argv[1])
def work():
    pool = ThreadPoolExecutor(1)
    with report_failure(spec, "first"):
        while True:
            pool.submit(int)
            time.sleep(0.01)
threading.Thread(target=work).start()
time.sleep(0.5)
"""


def test_what_fails_because_its_process_ends_has_not_failed(spec: StageSpec) -> None:
    """The main thread is done while another one still asks for work to be scheduled."""
    done = subprocess.run([sys.executable, "-c", LEAVING, spec.write()], capture_output=True, text=True, timeout=60)
    assert "cannot schedule new futures" in done.stderr
    assert read_failure(spec.work, "first") is None


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/"), "/"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "a disk of this machine"),
    ],
)
def test_a_full_disk_is_a_sentence_with_what_to_do(spec: StageSpec, error: Exception, where: str) -> None:
    fail(spec, error)
    failure = read_failure(spec.work, "first")
    assert failure is not None and not failure.infrastructure
    assert failure.message.startswith(where)
    assert "no space left" in failure.message and "then give the same command again" in failure.message
    assert "Errno" not in failure.message and "Errno" in failure.traceback


def test_a_failure_belongs_to_its_attempt(spec: StageSpec) -> None:
    fail(spec, ValueError("a full disk"), attempt="first")
    assert read_failure(spec.work, "second") is None
    fail(spec, ValueError("a wrong setting"), attempt="second")
    said = [read_failure(spec.work, attempt) for attempt in ("first", "second")]
    assert [failure.message for failure in said if failure] == ["a full disk", "a wrong setting"]
