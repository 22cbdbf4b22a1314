"""Pipelines of toy stages through real Prefect, Ray and MLflow, run as a user does: a process of their own."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from toybox import TOYS, survivors, wait_for

from genpipe.launch.head import Head, local_head
from genpipe.launch.ray import TUNING, connect

pytestmark = pytest.mark.slow

TRAIN = {"samples": 80, "global_batch_size": 4, "log_every": 5, "precision": "fp32"}


class Project:
    """A pipeline of toys in a folder, with a Prefect home of its own."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder
        self.config = folder / "toy.yaml"
        self.store = folder / "store"
        self.output = folder / "output"
        stages = {"toy_data": {"parts": 2}} | {name: {"train": TRAIN} for name in ("toy_line", "toy_slow", "toy_end")}
        self.config.write_text(yaml.safe_dump({"name": "toy", "store": str(self.store), "stages": stages} | settings))
        self.environment = os.environ | {
            "PREFECT_HOME": str(folder / "prefect"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def start(self, *overrides: str, stage: str = "all") -> subprocess.Popen[bytes]:
        command = [sys.executable, str(TOYS / "run_toys.py"), stage, str(self.config), *overrides]
        return subprocess.Popen(
            command,
            env=self.environment,
            cwd=self.folder,
            stdout=self.output.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group, as a terminal gives one to a command
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # even under a `&` of a script
        )

    def run(self, *overrides: str, stage: str = "all") -> tuple[int, str]:
        code = self.start(*overrides, stage=stage).wait(200)
        return code, self.output.read_text()

    def mlflow(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.store}/mlflow.db")

    def runs(self, name: str) -> list[Run]:
        """The MLflow runs of a stage, or of the pipeline (`parent`), the newest first."""
        client = self.mlflow()
        experiment = client.get_experiment_by_name("toy")
        if experiment is None:
            return []
        query = f"tags.`genpipe.stage` = '{name}'"
        runs = client.search_runs([experiment.experiment_id], query if name != "parent" else "")
        return [run for run in runs if name != "parent" or "genpipe.stage" not in run.data.tags]

    def progress(self, stage: str) -> list[Path]:
        return list((self.store / "work" / stage).glob("*/progress.json"))


def results(output: str) -> dict[str, str]:
    return dict(re.findall(r"^RESULT (\w+) (\w+)", output, re.MULTILINE))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


def test_a_failed_stage_leaves_the_others_work_and_the_next_run_picks_up(project: Project) -> None:
    code, output = project.run("stages.toy_line.fail=no such luck")
    assert code == 1, output
    assert results(output) == {"toy_data": "ran", "toy_line": "failed", "toy_slow": "ran", "toy_end": "skipped"}
    assert re.search(r"RESULT toy_line failed no such luck \(log: .*/job.log\)", output)
    assert "RESULT toy_end skipped it needs toy_data, toy_line, toy_slow" in output
    assert "Traceback" not in output, output
    assert project.runs("parent")[0].info.status == "FAILED"

    code, output = project.run()
    assert code == 0, output
    assert results(output) == {"toy_data": "cached", "toy_line": "ran", "toy_slow": "cached", "toy_end": "ran"}

    code, output = project.run()
    assert code == 0, output
    assert set(results(output).values()) == {"cached"}
    code, output = project.run("stages.toy_slow.width=1", "stages.toy_slow.step_seconds=0.001")
    assert results(output) == {"toy_data": "cached", "toy_line": "cached", "toy_slow": "ran", "toy_end": "ran"}


def test_records_link_prefect_ray_and_mlflow(project: Project) -> None:
    parent = project.runs("parent")[0]
    assert parent.info.status == "FINISHED"
    newest = project.runs("toy_slow")[0]
    assert newest.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert newest.data.tags["genpipe.ray_job"].startswith("genpipe-toy_slow-")
    assert parent.data.tags["genpipe.run.toy_slow"] == newest.info.run_id
    assert parent.data.tags["genpipe.status.toy_data"] == "cached"
    flow_run = newest.data.tags["genpipe.prefect_flow_run_id"]
    assert parent.data.tags["genpipe.prefect_flow_run_id"] == flow_run
    with sqlite3.connect(project.folder / "prefect" / "prefect.db") as database:
        states = dict(database.execute("select id, state_type from flow_run").fetchall())
        names = dict(database.execute("select id, name from flow_run").fetchall())
        tasks = database.execute("select name, state_type from task_run where flow_run_id = ?", (flow_run,)).fetchall()
        tables = database.execute("select data from artifact where key = 'genpipe-stages'").fetchall()
    assert states[flow_run] == "COMPLETED"
    assert names[flow_run] == parent.info.run_name, "one name in both pages"
    assert sorted(states.values()) == ["COMPLETED"] * 3 + ["FAILED"]
    assert dict(tasks) == dict.fromkeys(("toy_data", "toy_line", "toy_slow", "toy_end"), "COMPLETED")
    assert any(newest.info.run_id in str(table) for table in tables), "Prefect's table names the MLflow runs"


def test_one_stage_by_hand(project: Project) -> None:
    code, output = project.run("stages.toy_line.step_seconds=0.002", stage="toy_end")
    assert code == 2, output
    assert "stages.toy_end: its input toy_line is not committed for this configuration; run `genpipe stage " in output
    code, output = project.run("stages.toy_line.step_seconds=0.002", stage="toy_line")
    assert (code, results(output)) == (0, {"toy_line": "ran"}), output


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_survives_the_command(tmp_path: Path, sent: signal.Signals) -> None:
    project = Project(tmp_path)
    process = project.start("stages.toy_line.step_seconds=0.1", "stages.toy_line.train.samples=4000")
    wait_for(lambda: project.progress("toy_line") or process.poll() is not None, seconds=120)
    assert process.poll() is None, project.output.read_text()
    started = psutil.Process(process.pid).children(recursive=True)
    rays = [p for p in started if "prefect.server" not in " ".join(p.cmdline())]
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
    assert project.runs("toy_line")[0].info.status == "KILLED"
    assert project.runs("parent")[0].info.status == "KILLED"
    assert not list((project.store / "artifacts" / "toy_line").glob("*/manifest.json"))


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
