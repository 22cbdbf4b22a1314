"""Registered models as inputs, with a real MLflow registry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import pytest
from mlflow import MlflowClient
from toybox import Toys, artifact_of

from genpipe import load
from genpipe.artifacts import Artifact, read_manifest
from genpipe.launch.local import run_local
from genpipe.tracking.registry import promote, register, registered, resolve
from genpipe.tracking.store import client_of

if TYPE_CHECKING:
    from conftest import Command, TinyPipeline


@pytest.fixture(scope="module")
def line_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Artifact, str]]:
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
def test_a_registered_model_is_the_artifact_of_its_run(line_model: tuple[Artifact, str], name: str) -> None:
    line, uri = line_model
    assert resolve(name, tracking_uri=uri) == line


def test_a_uri_is_itself(line_model: tuple[Artifact, str]) -> None:
    line, uri = line_model
    assert resolve(line.uri, tracking_uri=uri) == line


@pytest.mark.parametrize(
    "name", ["models:/line@worst", "models:/none@best", "models:/line/7", "models:/line", "models:/foreign@best"]
)
def test_what_is_no_model_of_ours_is_refused_by_name(line_model: tuple[Artifact, str], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        resolve(name, tracking_uri=line_model[1])


@pytest.fixture(scope="module")
def released(pixel_tiny: TinyPipeline) -> tuple[list[Artifact], str]:
    """Two releases of one model, the second one newer; and where they are registered."""
    alone = ("stages.release.inputs={evaluate: null, sample: null}", "stages.release.observe.register_as=a/shape")
    settings = ("stages.release.rows=1", "stages.release.each=1", "stages.release.title=")
    made = [pixel_tiny.run("release", *alone, *settings[:2], settings[2] + title) for title in ("one", "two")]
    return made, f"sqlite:///{pixel_tiny.store}/mlflow.db"


def test_a_release_is_its_models_candidate_until_a_newer_one_is(released: tuple[list[Artifact], str]) -> None:
    (first, second), uri = released
    assert resolve("models:/a-shape@candidate", tracking_uri=uri) == second
    assert resolve("models:/a-shape/1", tracking_uri=uri) == first
    known = registered(uri)
    assert (known[first.fingerprint], known[second.fingerprint]) == ("a-shape/1", "a-shape/2")


def test_a_release_is_registered_once(released: tuple[list[Artifact], str]) -> None:
    """However often its records are completed."""
    (first, _), uri = released
    manifest = read_manifest(first.uri)
    assert manifest is not None
    client = client_of(uri)
    [output] = client.get_run(manifest.run_id).outputs.model_outputs
    assert register(client, "a/shape", first, model_id=output.model_id, run_id=manifest.run_id) == "1"
    assert len(client.search_model_versions("name = 'a-shape'")) == 2


def test_the_champion_is_who_is_promoted(released: tuple[list[Artifact], str], genpipe: Command) -> None:
    (first, second), uri = released
    assert promote("a-shape", "candidate", tracking_uri=uri) == second
    code, said, error = genpipe("promote", "a-shape", "1", "--tracking-uri", uri)
    assert code == 0 and f"models:/a-shape@champion is {first.uri}" in said, error
    assert resolve("models:/a-shape@champion", tracking_uri=uri) == first
    assert load("models:/a-shape@champion", tracking_uri=uri).artifact == first
    for version, named in (("7", "models:/a-shape/7"), ("worst", "models:/a-shape@worst")):
        code, _, error = genpipe("promote", "a-shape", version, "--tracking-uri", uri)
        assert code == 2 and named in error
    assert resolve("models:/a-shape@champion", tracking_uri=uri) == first, "as it was"


def test_promoting_needs_a_place(genpipe: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, _, error = genpipe("promote", "a-shape", "1")
    assert code == 2 and "MLFLOW_TRACKING_URI" in error
