"""The MLflow store, read back with MLflow's own client after toy stages ran in this process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from toybox import Toys, free_port, wait_for

from genpipe import artifacts
from genpipe.launch.local import LocalLauncher, run_local
from genpipe.pipeline.spec import StageSpec
from genpipe.tracking import store
from genpipe.tracking.jsonl import runs_uri
from genpipe.tracking.open_runs import all_open
from genpipe.tracking.recorder import Recorder
from genpipe.tracking.recording import attach, claim, open_stage_run, pipeline_run, settle_stage, settle_store
from genpipe.tracking.runs import DESCRIPTION, claim_stage_run

TRAINING = "workflowType=machine_learning"
"""What has MLflow open its pages for model training; `tests/cli/test_ui.py` sees that it does."""


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return Toys(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def client(toys: Toys) -> MlflowClient:
    store.check(toys.tracking_uri)
    return MlflowClient(toys.tracking_uri)


def run_of(client: MlflowClient, spec: StageSpec) -> Run:
    """The only run of the fingerprint."""
    experiment = client.get_experiment_by_name(spec.experiment)
    assert experiment is not None
    query = f"tags.`genpipe.fingerprint` = '{spec.target.fingerprint}'"
    [run] = client.search_runs([experiment.experiment_id], query)
    return client.get_run(run.info.run_id)  # a search leaves the input models out


@pytest.fixture(scope="module")
def trained(toys: Toys, client: MlflowClient) -> tuple[StageSpec, StageSpec]:
    data = toys.spec("toy_data")
    line = toys.line(run_local(data)).model_copy(
        update={"git_revision": "abc-dirty", "links": {"ray_job": "job-1", "prefect_flow_run": "brave-cat"}}
    )
    run_local(line)
    return data, line


def test_a_training_run_holds_params_metrics_images_and_tags(
    client: MlflowClient, trained: tuple[StageSpec, StageSpec]
) -> None:
    _, line = trained
    run = run_of(client, line)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "toy_line")
    assert run.data.params["train.optim.lr"] == "0.05"
    assert run.data.params["train.global_batch_size"] == "4"
    assert not any(name.startswith(("resources", "observe")) for name in run.data.params), "they do not identify a run"
    tags = run.data.tags
    assert (tags["genpipe.git_revision"], tags["mlflow.source.git.commit"]) == ("abc-dirty", "abc")
    assert (tags["genpipe.ray_job"], tags["genpipe.prefect_flow_run"]) == ("job-1", "brave-cat")
    assert tags["genpipe.artifact"] == line.target.uri
    assert tags["genpipe.precision_used"] == "fp32"
    losses = client.get_metric_history(run.info.run_id, "line/loss")
    assert [metric.step for metric in losses] == [20, 40, 60, 80], "samples seen, every five steps of four"
    assert {"line/grad_norm", "samples_per_second", "step_seconds", "data_wait_share", "heldout/loss"} <= set(
        run.data.metrics
    )
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert any(path.startswith("images/picture") and path.endswith(".png") for path in images)


def test_the_run_records_the_manifest_that_the_artifact_has(
    client: MlflowClient, trained: tuple[StageSpec, StageSpec], tmp_path: Path
) -> None:
    for spec in trained:
        run_id = run_of(client, spec).info.run_id
        manifest = artifacts.read_manifest(spec.target.uri)
        assert manifest is not None
        assert manifest.run_id == run_id, "the artifact names its run"
        logged = Path(client.download_artifacts(run_id, "manifest.json", str(tmp_path))).read_text()
        assert artifacts.Manifest.model_validate_json(logged) == manifest


def test_lineage_leads_from_the_model_back_to_the_data(
    client: MlflowClient, toys: Toys, trained: tuple[StageSpec, StageSpec]
) -> None:
    data, line = trained
    run = run_of(client, line)
    [dataset] = run.inputs.dataset_inputs
    assert dataset.dataset.name == "toy_data"
    assert data.target.fingerprint.startswith(dataset.dataset.digest)
    assert data.target.uri in dataset.dataset.source
    [output] = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, str(model.status), model.source_run_id) == ("toy_line", "READY", run.info.run_id)
    assert model.tags["genpipe.artifact"] == line.target.uri

    inputs = {"toy_data": artifacts.find(data.target.uri), "toy_line": artifacts.find(line.target.uri)}
    end = toys.spec("toy_end", inputs | {"toy_slow": inputs["toy_line"]}, train={"samples": 8, "global_batch_size": 4})
    with pytest.raises(RuntimeError), open_stage_run(end):
        raise RuntimeError("far enough")
    used = run_of(client, end).inputs
    assert [model.model_id for model in used.model_inputs] == [output.model_id]
    assert {d.dataset.name for d in used.dataset_inputs} == {"toy_data", "toy_line", "toy_slow"}


def test_a_retry_goes_on_in_the_same_run(
    client: MlflowClient, toys: Toys, trained: tuple[StageSpec, StageSpec]
) -> None:
    data = artifacts.find(trained[0].target.uri)
    assert data is not None
    spec = toys.line(data, train={"seed": 1}).model_copy(update={"pipeline_run_id": "first"})
    with pytest.raises(ValueError, match="unlucky"), open_stage_run(spec):
        raise ValueError("unlucky")
    failed = run_of(client, spec)
    assert failed.info.status == "FAILED"
    assert failed.data.tags["genpipe.error"] == "ValueError: unlucky"
    with pytest.raises(KeyboardInterrupt), open_stage_run(spec):
        assert run_of(client, spec).info.status == "RUNNING"
        assert "genpipe.error" not in run_of(client, spec).data.tags, "an error that is being mended"
        raise KeyboardInterrupt
    assert run_of(client, spec).info.status == "KILLED"
    run_local(spec.model_copy(update={"pipeline_run_id": "second"}))
    done = run_of(client, spec)
    assert (done.info.run_id, done.info.status) == (failed.info.run_id, "FINISHED")
    assert done.data.tags["mlflow.parentRunId"] == "second"


def steps_of(client: MlflowClient, run_id: str, metric: str) -> list[int]:
    return [point.step for point in client.get_metric_history(run_id, metric)]


def test_metrics_and_pictures_after_a_resume_are_of_one_history(client: MlflowClient, toys: Toys) -> None:
    """Killed at 160 samples, resumed from the checkpoint at 80: what is computed once more stands once."""
    spec = toys.spec("toy_data", slope=7.0)
    run_id = claim(spec)
    for start, stop in ((20, 180), (100, 220)):
        run = attach(spec, run_id)
        for samples_seen in range(start, stop, 20):
            run.log({"loss": 1 / samples_seen, "rate": samples_seen % 7}, samples_seen=samples_seen)
            if samples_seen % 40 == 0:
                run.log_image("held/out", np.zeros((4, 4, 3), np.uint8), samples_seen=samples_seen)
        run.close()
    for metric in ("loss", "rate"):
        assert steps_of(client, run_id, metric) == list(range(20, 220, 20))
    pictures = [file.path for file in client.list_artifacts(run_id, "images") if file.path.endswith(".png")]
    assert len(pictures) == len(range(40, 220, 40))


def killed(code: str, toys: Toys, *, lives: bool = False) -> subprocess.Popen[str]:
    """A process that runs `code` until it prints something, and is then killed, or `lives`."""
    begin = f"from pathlib import Path; from toybox import Toys; toys = Toys(Path({toys.store!r}))\n"
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", begin + code], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert process.stdout is not None and process.stdout.readline(), "it ended too early"
    if not lives:
        process.kill()
        process.wait()
    return process


COMMITTED = """
import time
from genpipe.launch.local import LocalLauncher, run_local
from genpipe.tracking.recording import StageRun
StageRun.finish = lambda *_: (print("committed", flush=True), time.sleep(60))
data = run_local(toys.spec("toy_data"))
run_local(toys.line(data, train={"seed": SEED}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("found_by", ["stage", "store"])
def test_whoever_finds_the_artifact_committed_completes_its_record(
    client: MlflowClient, toys: Toys, trained: tuple[StageSpec, StageSpec], found_by: str
) -> None:
    """Of a driver that was killed just after the commit."""
    data = artifacts.find(trained[0].target.uri)
    assert data is not None
    seed = {"stage": 21, "store": 22}[found_by]
    spec = toys.line(data, train={"seed": seed})
    killed(COMMITTED.replace("SEED", str(seed)), toys)
    assert run_of(client, spec).info.status == "RUNNING"
    for _ in range(2):
        if found_by == "stage":
            run_local(spec)
        else:
            settle_store(toys.store)
        run = run_of(client, spec)
        assert run.info.status == "FINISHED"
        assert len(run.outputs.model_outputs) == 1
        assert steps_of(client, run.info.run_id, "loss") == [80]
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"manifest.json", "images"} <= files
    assert not [run for run in all_open(toys.store) if run.stage == spec]


@pytest.mark.parametrize("late", [KeyboardInterrupt("Ctrl-C"), KeyError("'00000'")])
def test_what_is_committed_is_finished_whatever_came_after(
    client: MlflowClient, toys: Toys, trained: tuple[StageSpec, StageSpec], late: BaseException
) -> None:
    data = artifacts.find(trained[0].target.uri)
    assert data is not None
    spec = toys.line(data, train={"seed": 31 + isinstance(late, KeyError)})
    with pytest.raises(type(late)), open_stage_run(spec):
        LocalLauncher().train(spec, run_of(client, spec).info.run_id)
        raise late
    run = run_of(client, spec)
    assert run.info.status == "FINISHED" and len(run.outputs.model_outputs) == 1
    assert "genpipe.error" not in run.data.tags


def test_an_artifact_that_is_made_again_has_a_run_of_its_own(client: MlflowClient, toys: Toys) -> None:
    spec = toys.spec("toy_data", slope=8.0)
    first = claim(spec)
    run_local(spec)
    assert claim(spec) == first
    shutil.rmtree(spec.target.uri)
    run_local(spec)
    manifest = artifacts.read_manifest(spec.target.uri)
    assert manifest is not None and manifest.run_id != first
    assert client.get_run(first).info.status == client.get_run(manifest.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_runs_of_dead_processes_are_ended_and_those_of_live_ones_left(
    client: MlflowClient, toys: Toys, trained: tuple[StageSpec, StageSpec]
) -> None:
    code = """
import time
from genpipe.tracking.recording import claim, pipeline_run
tags = {"genpipe.prefect_flow_run_id": "flow-SLOPE"}
with pipeline_run(toys.tracking_uri, store=toys.store, experiment="toys", name="SLOPE", tags=tags) as parent:
    claim(toys.spec("toy_data", slope=SLOPE).model_copy(update={"pipeline_run_id": parent.run_id}))
    print("claimed", flush=True)
    time.sleep(600)
"""
    dead, alive = toys.spec("toy_data", slope=9.0), toys.spec("toy_data", slope=10.0)
    killed(code.replace("SLOPE", "9.0"), toys)
    living = killed(code.replace("SLOPE", "10.0"), toys, lives=True)
    try:
        ended = settle_store(toys.store)
        assert [record.tags["genpipe.prefect_flow_run_id"] for record in ended] == ["flow-9.0"]
        assert settle_store(toys.store) == []
        for spec, status in ((dead, "KILLED"), (alive, "RUNNING")):
            run = run_of(client, spec)
            parent = client.get_run(run.data.tags["mlflow.parentRunId"])
            assert (run.info.status, parent.info.status) == (status, status)
            for each in (run, parent):
                assert ("is gone" in each.data.tags.get("genpipe.error", "")) == (status == "KILLED")
    finally:
        living.kill()
        living.wait()
    settle_store(toys.store)


@pytest.mark.slow
def test_records_of_a_time_without_mlflow_are_handed_in_once(
    toys: Toys,
    trained: tuple[StageSpec, StageSpec],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Gone before the stage begins, and gone while it trains: it commits, and the server gets all when it is there."""
    monkeypatch.setattr(Recorder, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    data = artifacts.find(trained[0].target.uri)
    assert data is not None
    store.client_of.cache_clear()
    specs = [toys.line(data, train={"seed": seed}).model_copy(update={"tracking_uri": uri}) for seed in (11, 12)]
    server = MlflowServer(tmp_path, port)
    with server, pipeline_run(uri, store=toys.store, experiment="toys", name="p", tags={}) as parent:
        specs[1] = specs[1].model_copy(update={"run_id": claim(specs[1])})
        server.stop()
        for spec in specs:
            run_local(spec)
            lines = [json.loads(line) for line in Path(runs_uri(spec), "metrics.jsonl").read_text().splitlines()]
            losses = [line["samples_seen"] for line in lines if "line/loss" in line.get("metrics", {})]
            assert losses == [20, 40, 60, 80]
        parent.summarize([{"stage": "toy_line", "status": "ran", "run_id": ""}])
    said = capsys.readouterr().err
    assert said.count("what is recorded is kept in") == 2, "of the stage that could not be claimed, and of the pipeline"
    assert "records are kept in" in said
    assert settle_store(toys.store) == [], "it is still gone"

    with MlflowServer(tmp_path, port):
        client = MlflowClient(uri)
        for _ in range(2):
            settle_store(toys.store)
            for spec in specs:
                run = run_of(client, spec)
                assert run.info.status == "FINISHED" and len(run.outputs.model_outputs) == 1
                assert steps_of(client, run.info.run_id, "line/loss") == [20, 40, 60, 80]
                assert steps_of(client, run.info.run_id, "loss") == [80]
                assert run.data.tags["genpipe.precision_used"] == "fp32"
                images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
                assert len([path for path in images if path.endswith(".png")]) == 1
            assert client.get_run(parent.run_id).info.status == "FINISHED"
            assert "| ran |" in client.get_run(parent.run_id).data.tags[DESCRIPTION]
    assert not [run for run in all_open(toys.store) if run.tracking_uri == uri]


class MlflowServer:
    """`mlflow server` on loopback, with its records in a folder; it takes them up when it is started again."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port = port
        self.command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")),
        ]

    def __enter__(self) -> None:
        quiet = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(self.command, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self.answers)

    def answers(self) -> bool:
        try:
            store.check(f"http://127.0.0.1:{self.port}")
        except ValueError:
            return False
        return True

    def stop(self) -> None:
        family = psutil.Process(self.process.pid).children(recursive=True)
        for process in (self.process, *family):
            process.kill()
        self.process.wait()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()


def test_a_job_that_died_silently_is_marked_failed(client: MlflowClient, toys: Toys) -> None:
    spec = toys.spec("toy_data", slope=3.0)
    claim(spec)
    settle_stage(spec, status="FAILED", error="the node is gone")
    assert run_of(client, spec).info.status == "RUNNING", "whoever claimed it is there"
    later = spec.model_copy(update={"pipeline_run_id": "p2"})
    settle_stage(later, status="FAILED", error="the node is gone", gone=True)
    assert run_of(client, spec).info.status == "RUNNING", "it is not the job of that pipeline run"
    settle_stage(spec, status="FAILED", error="the node is gone", gone=True)
    assert run_of(client, spec).info.status == "FAILED"
    assert run_of(client, spec).data.tags["genpipe.error"] == "the node is gone"
    run_local(spec)
    settle_stage(spec, status="FAILED", error="not this time", gone=True)
    assert run_of(client, spec).info.status == "FINISHED"


def test_a_pipeline_run_tells_of_its_stages(
    client: MlflowClient, toys: Toys, trained: tuple[StageSpec, StageSpec], tmp_path: Path
) -> None:
    config, picture = tmp_path / "pipeline.yaml", tmp_path / "grid.png"
    config.write_text("name: toys\n")
    Image.new("RGB", (8, 8)).save(picture)
    data, line = (run_of(client, spec) for spec in trained)
    rows = [
        {"stage": "toy_data", "status": "cached", "run_id": data.info.run_id, "seconds": 0.0, "message": "as it is"},
        {"stage": "toy_line", "status": "ran", "run_id": line.info.run_id, "seconds": 62.0, "headline": "loss 0.5"},
        {"stage": "toy_last", "status": "failed", "run_id": "", "seconds": 2.0, "message": "a | b\nc"},
    ]
    with pipeline_run(
        toys.tracking_uri,
        store=toys.store,
        experiment="toys",
        name="toys",
        tags={"genpipe.config": "pipeline.yaml", "genpipe.prefect_url": "http://prefect/runs/1"},
        settings={"stages.toy_line.train.samples": "80"},
        files=[config],
    ) as parent:
        begun = client.get_run(parent.run_id)
        assert "`stages.toy_line.train.samples = 80`" in begun.data.tags[DESCRIPTION]
        assert begun.data.params == {"stages.toy_line.train.samples": "80"}
        parent.summarize(rows, metrics={"toy_line/loss": 0.5}, images=[picture])
    run = client.get_run(parent.run_id)
    assert run.info.status == "FAILED"
    assert run.data.metrics == {"toy_line/loss": 0.5}
    text, link = run.data.tags[DESCRIPTION], f"#/experiments/{run.info.experiment_id}/runs"
    assert f"| [toy_data]({link}/{data.info.run_id}?{TRAINING}) | cached |  |  |" in text
    assert f"| [toy_line]({link}/{line.info.run_id}?{TRAINING}) | ran | 1m02s | loss 0.5 |" in text
    assert "| toy_last | failed |  |  | a \\| b c |" in text
    assert f"path=samples/grid.png&run_uuid={run.info.run_id}" in text
    assert "[its flow run in Prefect](http://prefect/runs/1)" in text
    assert [each.dataset.name for each in run.inputs.dataset_inputs] == ["toy_data"]
    assert [each.model_id for each in run.outputs.model_outputs] == [line.outputs.model_outputs[0].model_id]
    logged = {file.path for file in client.list_artifacts(parent.run_id)}
    assert {"summary.json", "config", "samples"} <= logged


def test_a_run_says_what_it_was_made_from_until_somebody_describes_it(
    client: MlflowClient, trained: tuple[StageSpec, StageSpec]
) -> None:
    data, line = trained
    run = run_of(client, line)
    link = f"#/experiments/{run.info.experiment_id}/runs/{run_of(client, data).info.run_id}?{TRAINING}"
    assert f"made by [this run]({link})" in run.data.tags[DESCRIPTION]
    asked = line.model_copy(update={"pipeline_run_id": "p7", "pipeline": "nightly"})
    claim_stage_run(asked)
    assert "[this run of the pipeline nightly]" in run_of(client, line).data.tags[DESCRIPTION]
    client.set_tag(run.info.run_id, DESCRIPTION, "the one in the talk")
    claim_stage_run(asked)
    assert run_of(client, line).data.tags[DESCRIPTION] == "the one in the talk"


def test_long_and_many_settings_are_recorded(client: MlflowClient, toys: Toys) -> None:
    spec = toys.spec("toy_data", slope=4.0)
    many = {f"setting_{i}": "x" * 7000 for i in range(250)}
    run_id = claim_stage_run(spec.model_copy(update={"config": spec.config | many}))
    params = client.get_run(run_id).data.params
    assert sum(name.startswith("setting_") for name in params) == 250
    assert len(params["setting_0"]) == 6000


def test_a_deleted_experiment_is_explained(client: MlflowClient, toys: Toys) -> None:
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(ValueError, match=r"tracking.experiment: 'gone' was deleted .* restore"):
        claim_stage_run(toys.spec("toy_data", slope=5.0).model_copy(update={"experiment": "gone"}))
