"""Runs that are interrupted or die: what they leave behind, through real Prefect, Ray and MLflow."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from toy_project import Project
from toybox import TOYS, survivors, wait_for

from genpipe.launch.jobs import connect
from genpipe.launch.local_ray import TUNING, Head, local_head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


SLOW = {
    "toy_data": ["stages.toy_data.seconds=60"],
    "toy_line": ["stages.toy_line.step_seconds=0.1", "stages.toy_line.train.samples=4000"],
}


@pytest.mark.parametrize(("sent", "stage"), [(signal.SIGINT, "toy_line"), (signal.SIGTERM, "toy_data")])
def test_nothing_survives_the_command(project: Project, sent: signal.Signals, stage: str) -> None:
    if stage == "toy_line":
        project.make_data()
    process = project.start(*SLOW[stage], stage=stage)
    wait_for(lambda: project.progress(stage) or process.poll() is not None)
    assert process.poll() is None, project.output.read_text()
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) > 5
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as Ctrl-C does: the whole group gets it
    else:
        process.send_signal(sent)
    process.wait(60)
    output = project.output.read_text()
    assert survivors(started) == []
    assert process.returncode == (130 if sent == signal.SIGINT else 143), output
    assert "Traceback" not in output, output
    assert project.runs(stage)[0].info.status == "KILLED"
    assert project.runs("parent")[0].info.status == "KILLED"
    assert not list((project.store / "artifacts" / stage).glob("*/manifest.json"))


def test_a_killed_run_leaves_nothing_and_the_next_one_ends_its_records(project: Project) -> None:
    project.make_data()
    slow = ["stages.toy_line.step_seconds=0.1", "stages.toy_line.train.samples=600"]
    slow += ["stages.toy_line.resources.checkpoint_seconds=1"]
    process = project.start(*slow, stage="toy_line")
    folders = (project.store / "work/toy_line").glob
    later = "*/checkpoints/000000000000[1-9]*/manifest.json"  # than the one before the first step
    wait_for(lambda: list(folders(later)) or process.poll() is not None, seconds=400)
    assert process.poll() is None, project.output.read_text()
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert survivors(started) == [], "Prefect's server and Ray end with the run"
    assert [run.info.status for run in project.runs("parent")] == ["RUNNING"]

    code, output = project.run(*slow, stage="toy_line")
    assert code == 0, output
    after, before = project.runs("parent")
    assert (before.info.status, after.info.status) == ("KILLED", "FINISHED")
    assert "is gone" in before.data.tags["genpipe.error"]
    [line] = project.runs("toy_line")
    assert line.info.status == "FINISHED"
    steps = [metric.step for metric in project.mlflow().get_metric_history(line.info.run_id, "line/loss")]
    assert steps == list(range(20, 620, 20)), "one history: nothing twice, nothing lost"
    with sqlite3.connect(project.folder / "prefect" / "prefect.db") as database:
        states = dict(database.execute("select id, state_type from flow_run").fetchall())
    flow_runs = [run.data.tags["genpipe.prefect_flow_run_id"] for run in (before, after)]
    assert [states[flow_run] for flow_run in flow_runs] == ["CRASHED", "COMPLETED"]
    assert not list((project.store / "runs/open").glob("*"))


@pytest.fixture
def head() -> Iterator[Head]:
    """A Ray that outlives the command: to the command it is a cluster, known by its address and token alone."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with local_head(os.environ | TUNING | {"PATH": path, "PYTHONPATH": str(TOYS)}) as found:
        yield found


def test_a_new_run_adopts_what_a_dead_one_left_on_the_cluster(
    tmp_path: Path, prefect_home: Path, mlflow_tables: Path, head: Head
) -> None:
    project = Project(tmp_path, prefect_home, mlflow_tables, ray={"address": head.address})
    project.make_data()
    project.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}
    client = connect(head.address, token=head.token)
    process = project.start(*SLOW["toy_line"], stage="toy_line")
    wait_for(lambda: project.progress("toy_line") or process.poll() is not None)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()  # Prefect's server

    process = project.start(*SLOW["toy_line"], stage="toy_line")
    adopted = re.compile(r"^toy_line: running [\d,]+/4,000 samples", re.MULTILINE)
    wait_for(lambda: adopted.search(project.output.read_text()) or process.poll() is not None)
    assert process.poll() is None, project.output.read_text()
    jobs = [job.submission_id for job in client.list_jobs()]
    assert sum(job.startswith("genpipe-toy_line-") for job in jobs) == 1, "adopted, not started again"
    [run] = project.runs("toy_line")
    steps = [metric.step for metric in project.mlflow().get_metric_history(run.info.run_id, "line/loss")]
    assert steps == sorted(set(steps)), "it went on undisturbed"

    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    assert process.returncode == 130
    status = {job.submission_id: str(job.status) for job in client.list_jobs()}
    assert "RUNNING" not in status.values(), "a person's Ctrl-C stops the jobs on a cluster, too"
