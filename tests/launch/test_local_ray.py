"""A Ray of one's own: where machines differ, when it dies, and when whoever started it does."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
from test_ray import history, run
from toybox import Toys, saved, survivors, talking_otherwise, wait_for

from genpipe.artifacts import Artifact
from genpipe.launch import local_ray
from genpipe.launch.failure import JobLost, StageError
from genpipe.launch.jobs import cluster
from genpipe.pipeline.spec import Progress, read_progress

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_local_ray_that_dies_is_replaced_and_the_stage_goes_on(toys: Toys, data: Artifact, tmp_path: Path) -> None:
    """Whichever part of it dies, and by another thread than the one that started the first, as Prefect's tasks do,
    which end long before the run. A failure that was mended does not outlive its attempt: on the same Ray, and on those
    that follow, which know nothing of the attempts on others.
    """
    full = tmp_path / "full"
    full.touch()
    spec = toys.line(data, samples=1200, step_seconds=0.05, fail_while=str(full), resources={"checkpoint_seconds": 0.1})
    before, ranks = psutil.Process().children(recursive=True), dict[int, int]()

    def started() -> list[psutil.Process]:
        return [process for process in psutil.Process().children(recursive=True) if process not in before]

    def run_until_it_dies_of(victim: str) -> None:
        died = list[psutil.Process]()

        def kill_once(progress: Progress | None) -> None:
            """Once another rank than before has written a checkpoint."""
            if progress and not died and (newest := saved(spec)) >= 100 + 2 * max(ranks.values(), default=0):
                rank = int(progress.metrics["line/pid"])
                if rank not in ranks:
                    ranks[rank] = newest
                    died.extend(started())
                    next(process for process in died if process.name() == victim).kill()

        with pytest.raises(JobLost):
            local.run(spec, report=kill_once)
        assert died and survivors(died) == [], "nothing of it goes on beside the new one"

    with cluster() as local:
        with pytest.raises(StageError, match="no space left"):
            run(local, spec)
        full.unlink()
        for victim in ("gcs_server", "raylet"):
            run_until_it_dies_of(victim)
        threads = [threading.Thread(target=run, args=(local, spec)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        last = started()
        assert sorted(p.name() for p in last if p.name() in ("gcs_server", "raylet")) == ["gcs_server", "raylet"]
    assert survivors(last) == []
    pids = history(toys, spec, "line/pid")
    assert len({pid for _, pid in pids}) == 3
    assert [step for step, _ in pids].count(20) == 1, "it did not begin at the beginning"


SUBMITTER = """
import sys
from genpipe.launch.jobs import cluster
from genpipe.pipeline.spec import StageSpec
with cluster() as local:
    local.run(StageSpec.read(sys.argv[1]), report=lambda progress: None)
"""


def test_a_local_ray_and_its_jobs_end_with_a_killed_submitter(toys: Toys) -> None:
    """Whose folder of temporary files has a path that is too long for sockets below it."""
    with tempfile.TemporaryDirectory(prefix="as-long-as-that-of-a-user-of-macos-", ignore_cleanup_errors=True) as long:
        spec = toys.spec("toy_data", parts=2, seconds=60.0)
        command = [sys.executable, "-c", SUBMITTER, spec.write()]
        submitter = subprocess.Popen(command, env=os.environ | {"TMPDIR": long})
        wait_for(lambda: read_progress(spec.work) or submitter.poll() is not None)
        started = psutil.Process(submitter.pid).children(recursive=True)
        assert any("genpipe.launch.ray" in p.cmdline() for p in started)
        submitter.kill()
        submitter.wait()
        assert survivors(started) == []


def test_what_answers_in_place_of_a_dashboard_is_no_dashboard_yet() -> None:
    """As while Ray starts, when a connection to its port may be one of that port to itself."""
    with talking_otherwise() as address, pytest.raises(ConnectionError, match="the answer is not HTTP"):
        local_ray.get(address, token="", timeout=10.0)
