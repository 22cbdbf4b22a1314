"""The tiny pipeline end to end, as a user runs it: the real command line, Prefect, Ray and MLflow."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from genpipe.artifacts import Manifest, read_manifest
from genpipe.stages import load_stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CONFIG = "configs/pipeline/tiny.yaml"
STAGES = ["shard", "autoencoder", "clip", "features", "decoder", "prior", "upsampler", "system", "sample", "evaluate"]
TRAINED = ["autoencoder", "clip", "prior", "decoder", "upsampler"]


class Project:
    """A user's folder of images, a store, a Prefect home that begins as a copy, and the command line on all."""

    def __init__(self, store: Path, images: Path, prefect_home: Path) -> None:
        self.store = store
        home = shutil.copytree(prefect_home, store.with_name(f"{store.name}-prefect"))
        self.environment = os.environ | {"PREFECT_HOME": str(home)}
        self.settings = [f"stages.shard.source.path={images}", f"store={store}"]

    def command(self, *arguments: str) -> list[str]:
        name, *rest = arguments
        return [sys.executable, "-m", "genpipe.cli.main", name, *rest, CONFIG, *self.settings]

    def start(self, *arguments: str, settings: Sequence[str] = ()) -> subprocess.Popen[str]:
        command = [*self.command(*arguments), *settings]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments: str, settings: Sequence[str] = ()) -> tuple[int, str]:
        process = self.start(*arguments, settings=settings)
        output, _ = process.communicate(timeout=580)
        return process.returncode, output

    def manifests(self, stage: str) -> list[Manifest]:
        folders = sorted(
            (self.store / "artifacts" / load_stage(stage).MAKES).iterdir(), key=lambda folder: folder.stat().st_ctime
        )
        found = [read_manifest(str(folder)) for folder in folders]
        return [manifest for manifest in found if manifest is not None]

    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.store}/mlflow.db")

    def runs(self, client: MlflowClient, stage: str) -> list[Run]:
        experiment = client.get_experiment_by_name("tiny")
        assert experiment is not None
        return list(client.search_runs([experiment.experiment_id], f"tags.`genpipe.stage` = '{stage}'"))


def statuses(output: str) -> dict[str, str]:
    """The second column of the table that a run ends with."""
    rows = re.findall(rf"^({'|'.join(STAGES)}) +(ran|cached|failed|skipped) ", output, re.MULTILINE)
    return dict(rows)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, shapes: Path, prefect_home: Path) -> tuple[Project, str]:
    """The project after its first run, and what that run printed."""
    project = Project(tmp_path_factory.mktemp("store"), shapes, prefect_home)
    code, output = project.run("run")
    assert code == 0, output
    return project, output


def test_first_run_makes_everything(project: tuple[Project, str]) -> None:
    made, output = project
    assert statuses(output) == dict.fromkeys(STAGES, "ran")
    grid = re.search(r"^(\S+/grid\.png)$", output, re.MULTILINE)
    assert grid
    width, height = Image.open(grid[1]).size
    assert height > width >= 400, "a dozen rows, each a caption and two pictures"
    assert not list((made.store / "work").rglob("*.safetensors")), "checkpoints outlive their stage"


def test_losses_fall(project: tuple[Project, str]) -> None:
    made, _ = project
    client = made.client()
    for stage in TRAINED:
        [run] = made.runs(client, stage)
        history = [point.value for point in client.get_metric_history(run.info.run_id, f"{stage}/loss")]
        assert len(history) == 8, f"{stage} logs every ten of its eighty steps"
        assert history[-1] < 0.9 * history[0], f"{stage}: {history}"


def test_mlflow_holds_runs_images_and_lineage(project: tuple[Project, str]) -> None:
    made, _ = project
    client = made.client()
    runs = {stage: made.runs(client, stage) for stage in STAGES}
    assert all(len(found) == 1 for found in runs.values())
    [parent] = {run.data.tags["mlflow.parentRunId"] for [run] in runs.values()}
    assert client.get_run(parent).info.status == "FINISHED"
    for stage, [run] in runs.items():
        [manifest] = made.manifests(stage)
        assert run.info.status == "FINISHED"
        assert run.data.tags["genpipe.fingerprint"] == manifest.artifact.fingerprint
        assert manifest.run_id == run.info.run_id
        datasets = {entry.dataset.name: entry.dataset.digest for entry in run.inputs.dataset_inputs}
        assert datasets == {name: artifact.fingerprint[:16] for name, artifact in manifest.inputs.items()}
    [decoder], [evaluate] = runs["decoder"], runs["evaluate"]
    assert decoder.data.params["train.global_batch_size"] == "16"
    assert {"decoder/grad_norm", "samples_per_second", "step_seconds", "data_wait_share"} <= decoder.data.metrics.keys()
    assert any("samples" in file.path for file in client.list_artifacts(decoder.info.run_id, "images"))
    inputs = client.get_run(evaluate.info.run_id).inputs  # a search leaves models out
    models = {client.get_logged_model(entry.model_id).name for entry in inputs.model_inputs}
    assert models == set(TRAINED)
    assert "grid.png" in {Path(file.path).name for file in _files(client, evaluate.info.run_id)}


def _files(client: MlflowClient, run_id: str, folder: str | None = None) -> Iterator[object]:
    for file in client.list_artifacts(run_id, folder):
        if file.is_dir:
            yield from _files(client, run_id, file.path)
        else:
            yield file


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


class Changed(NamedTuple):
    """A run after a change: what it printed, the scores that it was held against, and its own."""

    output: str
    baseline: str
    scores: str


@pytest.fixture(scope="module")
def changed(project: tuple[Project, str]) -> Changed:
    """A run whose decoder learns nothing, and that for long, on two ranks, of which one is killed in mid-stage."""
    made, _ = project
    [baseline] = (manifest.artifact.uri for manifest in made.manifests("evaluate"))
    settings = [
        "stages.decoder.train.samples=4000",
        "stages.decoder.train.optim.lr=1e-9",
        "stages.decoder.resources.workers=2",
        "stages.decoder.resources.checkpoint_seconds=0.5",
        gate(baseline),
    ]
    process = made.start("run", settings=settings)
    killed = False
    while process.poll() is None and not killed:
        checkpoints = list((made.store / "work" / "decoder").glob("*/checkpoints/*/manifest.json"))
        ranks = [child for child in _children(process.pid) if "RayTrainWorker" in " ".join(_cmdline(child))]
        if checkpoints and len(ranks) == 2:
            ranks[0].kill()
            killed = True
        time.sleep(0.1)
    output, _ = process.communicate(timeout=580)
    assert killed and process.returncode == 1, output
    [scores] = {manifest.artifact.uri for manifest in made.manifests("evaluate")} - {baseline}
    return Changed(output, baseline, scores)


def gate(baseline: str) -> str:
    """The setting that holds the pictures against those of other scores."""
    return f'stages.evaluate.observe.gates={{"train/self_cosine": {{"not_worse_than": "{baseline}"}}}}'


def test_a_killed_rank_and_a_change_of_the_decoder(project: tuple[Project, str], changed: Changed) -> None:
    """One change reruns what depends on it."""
    made, _ = project
    rerun = {"decoder", "system", "sample", "evaluate"}
    assert statuses(changed.output) == {stage: "ran" if stage in rerun else "cached" for stage in STAGES}
    runs = made.runs(made.client(), "decoder")
    assert len(runs) == 2, "one run for each fingerprint, whatever became of its ranks"
    assert all(run.info.status == "FINISHED" for run in runs)
    reached = made.client().get_metric_history(runs[0].info.run_id, "decoder/loss")
    assert max(point.step for point in reached) == 4000


def test_a_run_that_misses_its_gate_against_the_first_scores_fails(
    project: tuple[Project, str], changed: Changed
) -> None:
    made, _ = project
    assert "gate missed: evaluate: train/self_cosine differs by -" in " ".join(changed.output.split()), changed.output
    client = made.client()
    stage, _ = made.runs(client, "evaluate")
    against = json.loads(Path(client.download_artifacts(stage.info.run_id, "scores.json")).read_text())["against"]
    assert against["train/self_cosine"]["baseline"] == changed.baseline and against["train/self_cosine"]["missed"]


def test_a_run_that_changes_nothing_is_all_cached_starts_no_ray_and_holds_its_gate(
    project: tuple[Project, str], changed: Changed
) -> None:
    """The gate asks for no worse pictures than those of the decoder that learned nothing."""
    made, _ = project
    process = made.start("run", settings=[gate(changed.scores)])
    seen: set[str] = set()
    while process.poll() is None:
        seen |= {child.name() for child in _children(process.pid)}
        time.sleep(0.2)
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.returncode == 0, output
    assert statuses(output) == dict.fromkeys(STAGES, "cached")
    assert not seen & {"raylet", "gcs_server"}
    told = rf"^evaluate: train/self_cosine differs by .*95 % interval.* from {re.escape(changed.scores)}$"
    held = re.search(told, output, re.MULTILINE)
    assert held, output
    client = made.client()
    parent, *_ = _parents(made, client)
    summary = Path(client.download_artifacts(parent.info.run_id, "summary.json"))
    assert held[0] in {row["held gates"] for row in json.loads(summary.read_text())["stages"]}


def _parents(project: Project, client: MlflowClient) -> list[Run]:
    """The runs of the pipeline, the last one first."""
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], "tags.`genpipe.config` != ''"))


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def test_corrupted_manifest_is_refused(project: tuple[Project, str]) -> None:
    made, _ = project
    [manifest] = (made.store / "artifacts" / "clip").glob("*/manifest.json")
    whole = manifest.read_text()
    record = json.loads(whole)
    record["metrics"]["loss"] = 0.0
    manifest.write_text(json.dumps(record))
    try:
        code, output = made.run("run")
    finally:
        manifest.write_text(whole)
    assert code == 2
    assert str(manifest) in output and "changed since it was written" in output and "Traceback" not in output
