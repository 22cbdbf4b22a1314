"""Scores by the runs that made them, in a real MLflow."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from gallery import Gallery

from genpipe.artifacts import Artifact
from genpipe.tracking.lookup import RUN_ID, scores_of_run
from genpipe.tracking.store import client_of, experiment_id_of


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return Gallery(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def uri(gallery: Gallery) -> str:
    return f"sqlite:///{gallery.store}/mlflow.db"


def run(uri: str, *, artifact: str = "", stages: Sequence[Artifact] = ()) -> str:
    """The run of a stage that made an artifact, or of a pipeline whose stages made some."""
    client = client_of(uri)
    experiment = experiment_id_of(client, uri, "toys")
    created = client.create_run(experiment, tags={"genpipe.artifact": artifact} if artifact else {})
    if stages:
        client.log_dict(created.info.run_id, {"stages": [{"artifact": each.uri} for each in stages]}, "summary.json")
    assert RUN_ID.fullmatch(created.info.run_id)
    return str(created.info.run_id)


def committed(gallery: Gallery, kind: str, name: str) -> Artifact:
    (folder := gallery.store / "out").mkdir(exist_ok=True)
    return gallery.commit(kind, folder, name=name)


def test_a_stages_run_and_its_pipelines_run_stand_for_its_scores(gallery: Gallery, uri: str) -> None:
    scores, system = committed(gallery, "scores", "one"), committed(gallery, "system", "one")
    stage, other = run(uri, artifact=scores.uri), run(uri, artifact=system.uri)
    pipeline = run(uri, stages=[system, scores])
    assert scores_of_run(stage, tracking_uri=uri) == scores_of_run(pipeline, tracking_uri=uri) == scores
    for without in (other, run(uri), run(uri, stages=[system])):
        with pytest.raises(ValueError, match=f"{without}: a run .* made 0 scores"):
            scores_of_run(without, tracking_uri=uri)
    second = committed(gallery, "scores", "two")
    with pytest.raises(ValueError, match="made 2 scores; name the run of a stage"):
        scores_of_run(run(uri, stages=[scores, second]), tracking_uri=uri)


def test_runs_that_are_not_there_are_told_of(gallery: Gallery, uri: str) -> None:
    with pytest.raises(ValueError, match=f"{'0' * 32}: not found in MLflow at sqlite"):
        scores_of_run("0" * 32, tracking_uri=uri)
    with pytest.raises(ValueError, match="nothing is committed at"):
        scores_of_run(run(uri, artifact=f"{gallery.store}/artifacts/scores/gone"), tracking_uri=uri)
