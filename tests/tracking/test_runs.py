"""The MLflow store, read back with MLflow's own client after toy stages ran in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from toybox import Toys, free_port

from genpipe import artifacts
from genpipe.launch.local import run_local
from genpipe.pipeline.spec import StageSpec
from genpipe.tracking import store
from genpipe.tracking.jsonl import runs_uri
from genpipe.tracking.recorder import Recorder
from genpipe.tracking.runs import PipelineRun, claim_stage_run, fail_stage_run, open_stage_run, pipeline_run


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


def test_a_stage_outlives_an_mlflow_that_is_gone(
    toys: Toys,
    trained: tuple[StageSpec, StageSpec],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Gone before the stage begins, and gone while it trains: it commits, and its metrics are in the store."""
    monkeypatch.setattr(Recorder, "CLOSE_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    gone = f"http://127.0.0.1:{free_port()}"
    data = artifacts.find(trained[0].target.uri)
    assert data is not None
    for seed, run_id in ((11, ""), (12, "claimed-before-it-went")):
        spec = toys.line(data, train={"seed": seed}).model_copy(update={"tracking_uri": gone, "run_id": run_id})
        run_local(spec)
        lines = [json.loads(line) for line in Path(runs_uri(spec), "metrics.jsonl").read_text().splitlines()]
        losses = [line["samples_seen"] for line in lines if "line/loss" in line.get("metrics", {})]
        assert losses == [20, 40, 60, 80]
    assert "no answer from MLflow" in capsys.readouterr().err
    fail_stage_run(spec, "there is no MLflow to record it")
    parent = PipelineRun(store.client_of(gone), "r0", "0")
    parent.end_stages(KeyboardInterrupt())
    parent.summarize([{"stage": "toy_line", "status": "ran", "run_id": ""}])
    assert "the summary is not recorded in MLflow" in capsys.readouterr().err


def test_a_job_that_died_silently_is_marked_failed(client: MlflowClient, toys: Toys) -> None:
    spec = toys.spec("toy_data", slope=3.0)
    claim_stage_run(spec)
    fail_stage_run(spec, "the node is gone")
    assert run_of(client, spec).info.status == "FAILED"
    run_local(spec)
    fail_stage_run(spec, "not this time")
    assert run_of(client, spec).info.status == "FINISHED"


def test_a_pipeline_run_tells_of_its_stages(client: MlflowClient, toys: Toys, tmp_path: Path) -> None:
    config = tmp_path / "pipeline.yaml"
    config.write_text("name: toys\n")
    rows = [
        {"stage": "toy_data", "status": "cached", "run_id": "r1", "seconds": 0.0},
        {"stage": "toy_line", "status": "failed", "run_id": "", "seconds": 2.0},
    ]
    with pipeline_run(
        toys.tracking_uri, experiment="toys", name="toys", tags={"genpipe.x": "1"}, files=[config]
    ) as parent:
        parent.summarize(rows)
    run = client.get_run(parent.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["genpipe.run.toy_data"] == "r1"
    assert run.data.tags["genpipe.status.toy_line"] == "failed"
    logged = {file.path for file in client.list_artifacts(parent.run_id)}
    assert {"summary.json", "config"} <= logged


def test_stages_that_were_stopped_do_not_go_on_running(client: MlflowClient, toys: Toys) -> None:
    stopped = pytest.raises(KeyboardInterrupt)
    with stopped, pipeline_run(toys.tracking_uri, experiment="toys", name="toys", tags={}) as parent:
        data = toys.spec("toy_data", slope=6.0).model_copy(update={"pipeline_run_id": parent.run_id})
        done = run_local(data)
        line = claim_stage_run(toys.line(done).model_copy(update={"pipeline_run_id": parent.run_id}))
        other = claim_stage_run(toys.line(done, samples=160))  # of no pipeline run
        parent.end_stages(KeyboardInterrupt("Ctrl-C"))
        raise KeyboardInterrupt
    assert client.get_run(line).info.status == "KILLED"
    assert client.get_run(line).data.tags["genpipe.error"] == "KeyboardInterrupt: Ctrl-C"
    assert client.get_run(other).info.status == "RUNNING"
    manifest = artifacts.read_manifest(done.uri)
    assert manifest is not None and client.get_run(manifest.run_id).info.status == "FINISHED"


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
