"""Runs that are interrupted or die: what they leave behind, through real Prefect, Ray and MLflow."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from toy_project import Project, results
from toybox import TOYS, survivors, wait_for

from genpipe.launch.head import Head, local_head
from genpipe.launch.ray import TUNING, connect

pytestmark = pytest.mark.slow


SLOW = {
    "toy_data": ["stages.toy_data.seconds=60"],
    "toy_line": ["stages.toy_line.step_seconds=0.1", "stages.toy_line.train.samples=4000"],
}


@pytest.mark.parametrize(
    ("sent", "stage"), [(signal.SIGINT, "toy_line"), (signal.SIGTERM, "toy_data"), (signal.SIGKILL, "toy_data")]
)
def test_nothing_survives_the_command(tmp_path: Path, sent: signal.Signals, stage: str) -> None:
    project = Project(tmp_path)
    process = project.start(*SLOW[stage])
    wait_for(lambda: project.progress(stage) or process.poll() is not None, seconds=120)
    assert process.poll() is None, project.output.read_text()
    started = psutil.Process(process.pid).children(recursive=True)
    rays = [p for p in started if "prefect.server" not in command_of(p)]
    assert len(rays) > 5
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as Ctrl-C does: the whole group gets it
    else:
        process.send_signal(sent)
    process.wait(60)
    output = project.output.read_text()
    assert survivors(rays if sent == signal.SIGKILL else started) == []
    if sent == signal.SIGKILL:
        for p in started:
            with suppress(psutil.NoSuchProcess):
                p.kill()  # Prefect's server
        return
    assert process.returncode == (130 if sent == signal.SIGINT else 143), output
    assert "Traceback" not in output, output
    assert project.runs(stage)[0].info.status == "KILLED"
    assert project.runs("parent")[0].info.status == "KILLED"
    assert not list((project.store / "artifacts" / stage).glob("*/manifest.json"))


def command_of(process: psutil.Process) -> str:
    """The command line of a process; nothing of one that has ended meanwhile."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture
def head() -> Iterator[Head]:
    """A Ray that outlives the command: to the command it is a cluster, known by its address and token alone."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with local_head(os.environ | TUNING | {"PATH": path, "PYTHONPATH": str(TOYS)}) as found:
        yield found


def test_a_new_run_adopts_what_a_dead_one_left_on_the_cluster(tmp_path: Path, head: Head) -> None:
    project = Project(tmp_path, ray={"address": head.address})
    project.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}
    client = connect(head.address, token=head.token)
    settings = ["stages.toy_line.step_seconds=0.1", "stages.toy_line.train.samples=800"]
    process = project.start(*settings)
    wait_for(lambda: project.progress("toy_line") or process.poll() is not None, seconds=120)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()  # Prefect's server
    code, output = project.run(*settings)
    assert code == 0, output
    found = results(output)
    assert found.pop("toy_slow") in ("ran", "cached"), "its job may have ended while nobody looked"
    assert found == {"toy_data": "cached", "toy_line": "ran", "toy_end": "ran"}
    jobs = [job.submission_id for job in client.list_jobs()]
    assert sum(job.startswith("genpipe-toy_line-") for job in jobs) == 1, "adopted, not started again"
    [run] = project.runs("toy_line")
    assert run.info.status == "FINISHED"
    steps = [metric.step for metric in project.mlflow().get_metric_history(run.info.run_id, "line/loss")]
    assert steps == sorted(set(steps)), "it went on undisturbed"

    process = project.start("stages.toy_line.step_seconds=0.1", "stages.toy_line.train.samples=4000")
    wait_for(lambda: len(project.progress("toy_line")) > 0 or process.poll() is not None, seconds=120)
    assert process.poll() is None, project.output.read_text()
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    assert process.returncode == 130
    status = {job.submission_id: str(job.status) for job in client.list_jobs()}
    assert "RUNNING" not in status.values(), "a person's Ctrl-C stops the jobs on a cluster, too"
