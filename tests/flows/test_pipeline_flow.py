"""Pipelines of toy stages through real Prefect, Ray and MLflow."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path

import pytest
from toy_project import Project, results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path, mlflow_tables: Path) -> Project:
    project = Project(tmp_path_factory.mktemp("project"), prefect_home, mlflow_tables)
    project.make_data()
    return project


def test_a_failed_stage_leaves_the_others_work(project: Project) -> None:
    code, output = project.run("stages.toy_line.fail=no such luck")
    assert code == 1, output
    assert results(output) == {"toy_data": "cached", "toy_line": "failed", "toy_slow": "ran", "toy_end": "skipped"}
    assert re.search(r"RESULT toy_line failed no such luck \(log: .*/job.log\)", output)
    assert "RESULT toy_end skipped it needs toy_data, toy_line, toy_slow" in output
    assert "Traceback" not in output, output
    assert re.search(r"all stages: running 0/3 stages  \d\S* left", output), output


def test_one_stage_by_hand(project: Project) -> None:
    code, output = project.run(stage="toy_line")
    assert (code, results(output)) == (0, {"toy_line": "ran"}), "mended, it takes up what the failed run left"


def test_records_link_prefect_ray_and_mlflow(project: Project) -> None:
    by_hand, parent = project.runs("parent")
    assert (by_hand.info.status, parent.info.status) == ("FINISHED", "FAILED")
    stage = project.runs("toy_slow")[0]
    assert stage.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert stage.data.tags["genpipe.ray_job"].startswith("genpipe-toy_slow-")
    page = parent.data.tags["mlflow.note.content"]
    link = f"#/experiments/{parent.info.experiment_id}/runs/{stage.info.run_id}?workflowType=machine_learning"
    assert f"| [toy_slow]({link}) | ran |" in page
    assert re.search(r"\| \[?toy_line.* \| failed \|.*no such luck", page)
    flow_run = stage.data.tags["genpipe.prefect_flow_run_id"]
    assert parent.data.tags["genpipe.prefect_flow_run_id"] == flow_run
    with sqlite3.connect(project.folder / "prefect" / "prefect.db") as database:
        states = dict(database.execute("select id, state_type from flow_run").fetchall())
        names = dict(database.execute("select id, name from flow_run").fetchall())
        tasks = database.execute("select name, state_type from task_run where flow_run_id = ?", (flow_run,)).fetchall()
        tables = database.execute("select data from artifact where key = 'genpipe-stages'").fetchall()
    assert states == {flow_run: "FAILED", by_hand.data.tags["genpipe.prefect_flow_run_id"]: "COMPLETED"}
    assert names[flow_run] == parent.info.run_name, "one name in both pages"
    ended = dict(tasks)
    assert ended.pop("toy_end") != "COMPLETED"
    assert ended == {"toy_data": "COMPLETED", "toy_line": "FAILED", "toy_slow": "COMPLETED"}
    assert any(stage.info.run_id in str(table) for table in tables), "Prefect's table names the MLflow runs"


def test_a_run_needs_no_mlflow(project: Project) -> None:
    code, output = project.run("tracking.uri=jsonl", stage="toy_data")
    assert (code, results(output)) == (0, {"toy_data": "cached"}), output
    [summary] = (project.store / "runs/pipelines").glob("*/summary.json")
    record = json.loads(summary.read_text())
    assert record["status"] == "FINISHED"
    assert [(row["stage"], row["status"]) for row in record["rows"]] == [("toy_data", "cached")]
    assert (summary.parent / "config/toy.yaml").is_file()
