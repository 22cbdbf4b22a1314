"""Registered models as inputs, with a real MLflow registry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from toybox import Toys, artifact_of

from genpipe.artifacts import Artifact
from genpipe.launch.local import run_local
from genpipe.tracking.registry import resolve


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Artifact, str]]:
    """A trained line that is registered as model `line`, version 1, with the alias `best`; and where."""
    toys = Toys(tmp_path_factory.mktemp("store"))
    data = run_local(toys.spec("toy_data"))
    spec = toys.line(data)
    line = run_local(spec)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(toys.tracking_uri)  # MLflow looks a logged model up there, whatever the client's own URI
    client = MlflowClient()
    experiment = client.get_experiment_by_name("toys")
    assert experiment is not None
    [model] = client.search_logged_models([experiment.experiment_id])
    client.create_registered_model("line")
    client.create_model_version("line", source=f"models:/{model.model_id}", model_id=model.model_id)
    client.set_registered_model_alias("line", "best", "1")
    client.create_registered_model("foreign")
    client.create_model_version("foreign", source=str(Path(line.uri)))
    client.set_registered_model_alias("foreign", "best", "1")
    yield artifact_of(spec), toys.tracking_uri
    mlflow.set_tracking_uri(before)


@pytest.mark.parametrize("name", ["models:/line@best", "models:/line/1"])
def test_a_registered_model_is_the_artifact_of_its_run(registered: tuple[Artifact, str], name: str) -> None:
    line, uri = registered
    assert resolve(name, tracking_uri=uri) == line


def test_a_uri_is_itself(registered: tuple[Artifact, str]) -> None:
    line, uri = registered
    assert resolve(line.uri, tracking_uri=uri) == line


@pytest.mark.parametrize(
    "name", ["models:/line@worst", "models:/none@best", "models:/line/7", "models:/line", "models:/foreign@best"]
)
def test_what_is_no_model_of_ours_is_refused_by_name(registered: tuple[Artifact, str], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        resolve(name, tracking_uri=registered[1])
