"""What must hold after a fault: the weights, the processes, the records. Each function gives a sentence a trouble."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence

from chaos import processes
from chaos.lab import Case, Point, Reference, points_of
from mlflow import MlflowClient
from mlflow.entities import Run

ENDED = {"FINISHED", "FAILED", "KILLED"}
COMPARED = ("decoder/", "heldout/")
"""Metrics that follow from the weights and the data; the others are times."""
GONE_SECONDS = 20.0


def troubles(case: Case, reference: Reference) -> Iterator[str]:
    """All that is not as it should be once the last command has ended."""
    if left := processes.survivors(seconds=GONE_SECONDS):
        yield f"{len(left)} processes are left: {'; '.join(sorted(set(left)))[:300]}"
    if len(found := case.committed()) != 1:
        yield f"{len(found)} artifacts are committed"
        return
    if case.digest() != reference.digest:
        yield "the weights are not the undisturbed run's"
    if left := case.checkpoints():
        yield f"{len(left)} checkpoints are left"
    yield from _troubles_of_mlflow(case, reference) if case.launcher == "pipeline" else _of_jsonl(case, reference)
    if case.launcher == "pipeline":
        yield from _troubles_of_prefect(case)


def _of_jsonl(case: Case, reference: Reference) -> Iterator[str]:
    lines = case.jsonl()
    status = [line["status"] for line in lines if "status" in line]
    if status[-1:] != ["FINISHED"]:
        yield f"metrics.jsonl ends as {status[-1:]}"
    yield from _troubles_of_history(points_of(lines), reference)


def _troubles_of_mlflow(case: Case, reference: Reference) -> Iterator[str]:
    client = MlflowClient(case.tracking_uri())
    experiment = client.get_experiment_by_name(case.settings["name"])
    runs: list[Run] = list(client.search_runs([experiment.experiment_id])) if experiment else []
    for run in runs:
        if run.info.status not in ENDED:
            yield f"MLflow's run {run.info.run_name} is {run.info.status}"
    stages = [run for run in runs if run.data.tags.get("genpipe.instance") == "decoder"]
    if len(stages) != 1:
        yield f"MLflow has {len(stages)} runs of the stage"
        return
    parents = [run for run in runs if "genpipe.instance" not in run.data.tags]
    if not any(run.info.status == "FINISHED" for run in parents):
        yield f"MLflow's pipeline runs are {[run.info.status for run in parents]}"
    run = client.get_run(stages[0].info.run_id)
    if run.info.status != "FINISHED":
        yield f"MLflow's run of the stage is {run.info.status}"
    if not (run.outputs and run.outputs.model_outputs):
        yield "MLflow's run of the stage has no model"
    names = [name for name in run.data.metrics if name.startswith(COMPARED)]
    points = [
        Point(name, point.step, point.value)
        for name in names
        for point in client.get_metric_history(run.info.run_id, name)
    ]
    yield from _troubles_of_history(points, reference)


def _troubles_of_history(points: Sequence[Point], reference: Reference) -> Iterator[str]:
    compared = [point for point in points if point.name.startswith(COMPARED)]
    counts = Counter((point.name, point.samples) for point in compared)
    if twice := sorted({samples for (_, samples), count in counts.items() if count > 1}):
        yield f"{len(twice)} steps stand twice in the history, the first at {twice[0]} samples"
    usual = {samples for _, samples in reference.history}
    extra = {point.samples for point in compared} - usual  # where it was asked to stop, in the midst of a mean
    cut = {min(later) for stop in extra if (later := [samples for samples in usual if samples > stop])}
    expected = [point for point in compared if point.samples not in extra | cut]
    if odd := {p.samples for p in expected if reference.history.get((p.name, p.samples)) != p.value}:
        yield f"{len(odd)} steps of the history are not the undisturbed run's, the first at {min(odd)} samples"


def lost_steps(case: Case, reference: Reference) -> int:
    """How many steps of the undisturbed run's history are missing: what a kill took before it was written."""
    if case.launcher == "pipeline":
        client = MlflowClient(case.tracking_uri())
        experiment = client.get_experiment_by_name(case.settings["name"])
        runs = client.search_runs([experiment.experiment_id], "tags.`genpipe.instance` = 'decoder'")
        history = client.get_metric_history(runs[0].info.run_id, "decoder/loss") if runs else []
        found = {point.step for point in history}
    else:
        found = {point.samples for point in points_of(case.jsonl()) if point.name == "decoder/loss"}
    return len({samples for name, samples in reference.history if name == "decoder/loss"} - found)


def _troubles_of_prefect(case: Case) -> Iterator[str]:
    connection = sqlite3.connect(case.folder / "prefect/prefect.db", timeout=30)
    flows = connection.execute("select state_type from flow_run order by created").fetchall()
    tasks = connection.execute("select name, state_type from task_run").fetchall()
    connection.close()
    states = [state for (state,) in flows]
    if open_ := [state for state in states if state not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")]:
        yield f"Prefect's flow runs are left {', '.join(map(str, open_))}"
    if not states or "COMPLETED" not in states:
        yield f"Prefect's flow runs are {states}"
    if running := [name for name, state in tasks if state in ("RUNNING", "PENDING", "SCHEDULED")]:
        yield f"Prefect's task runs {', '.join(running)} are not ended"
