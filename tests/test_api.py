"""The Python API: what it loads, draws and says, against the rooms below it and against MLflow's registry."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import pytest
import torch
from mlflow import MlflowClient

import genpipe
from genpipe.artifacts import Artifact

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")
PROMPTS = ["a small red circle", "a large blue bar", "a small green cross"]


@pytest.fixture(scope="module")
def artifact(tiny: TinyPipeline) -> Artifact:
    return tiny.run("system")


def test_importing_genpipe_reads_neither_torch_nor_pydantic() -> None:
    script = "import sys, genpipe; print({'torch', 'pydantic', 'numpy'} & set(sys.modules), callable(genpipe.load))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set() True"
    with pytest.raises(AttributeError, match="laod"):
        _ = genpipe.laod  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def registered(tiny: TinyPipeline, artifact: Artifact) -> Iterator[str]:
    """Where the system is the registered model `shapes` with the alias `best`, and its decoder `half`."""
    uri, before = tiny.load().tracking_uri, mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)  # MLflow looks a logged model up there, whatever the client's own URI
    client = MlflowClient()
    experiment = client.get_experiment_by_name(tiny.load().experiment)
    assert experiment is not None
    for name, made in (("shapes", artifact), ("half", tiny.run("decoder"))):
        query = f"tags.`genpipe.artifact` = '{made.uri}'"
        [model] = client.search_logged_models([experiment.experiment_id], query)
        client.create_registered_model(name)
        client.create_model_version(name, source=f"models:/{model.model_id}", model_id=model.model_id)
        client.set_registered_model_alias(name, "best", "1")
    yield uri
    mlflow.set_tracking_uri(before)


def test_a_registered_system_is_loaded(registered: str, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="in which MLflow"):
        genpipe.load("models:/shapes@best")
    with pytest.raises(ValueError, match=r"models:/half@best: stands for an artifact of kind decoder"):
        genpipe.load("models:/half@best", tracking_uri=registered)
    assert genpipe.load("models:/shapes@best", tracking_uri=registered).artifact == artifact
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered)
    assert genpipe.load("models:/shapes@best").artifact == artifact


def test_a_plan_says_what_a_run_would_do(tiny: TinyPipeline, artifact: Artifact) -> None:
    where = [f"store={tiny.store}", f"stages.shard.source.path={tiny.shapes}"]
    plans = {planned.name: planned for planned in genpipe.plan(tiny.config, where)}
    assert plans["system"].artifact == artifact and plans["system"].status == "cached"
    changed = {p.name: p.status for p in genpipe.plan(tiny.config, [*where, "stages.decoder.train.seed=7"])}
    assert (changed["prior"], changed["decoder"], changed["system"]) == ("cached", "run", "run")
    with pytest.raises(ValueError, match=r"stages\.decoder\.trian: unknown key"):
        genpipe.plan(tiny.config, [*where, "stages.decoder.trian.seed=7"])


def test_a_run_that_cannot_begin_says_so(tiny: TinyPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stages\.shard: source\.path: the folder .*absent does not exist"):
        genpipe.run(tiny.config, [f"store={tmp_path}", f"stages.shard.source.path={tmp_path}/absent"])
