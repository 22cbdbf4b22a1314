"""How a system came to be, against the manifests and MLflow's record of its parts."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from genpipe import api
from genpipe.artifacts import Artifact, read_manifest
from genpipe.evaluation.drawn import Drawings
from genpipe.gallery.app import make_app
from genpipe.gallery.history import behind, training_pictures
from genpipe.tracking.store import client_of

if TYPE_CHECKING:
    from conftest import TinyPipeline


@pytest.fixture(scope="module")
def system(tiny: TinyPipeline) -> Artifact:
    return tiny.run("system")


def test_everything_behind_a_system_is_named_with_its_run(tiny: TinyPipeline, system: Artifact) -> None:
    found = {made.role: made for made in behind(system)}
    assert found["system"].uri == system.uri
    for role in ("autoencoder", "clip", "prior", "decoder", "features", "shard"):
        manifest = read_manifest(tiny.run(role).uri)
        assert manifest is not None
        assert (found[role].uri, found[role].run_id) == (manifest.artifact.uri, manifest.run_id)
    assert found["upsamplers.0"].stage == "upsampler"


def test_each_part_shows_what_it_drew_in_training(tiny: TinyPipeline, system: Artifact) -> None:
    """At the samples at which it was validated, as MLflow has them."""
    found = {each.manifest.identity["stage"]: each for each in training_pictures(system)}
    assert found.keys() == {"autoencoder", "decoder", "upsampler"}
    client = client_of(f"sqlite:///{tiny.store}/mlflow.db")
    for stage, series in found.items():
        history = client.get_metric_history(
            series.manifest.run_id, f"heldout/{'psnr' if stage != 'decoder' else 'loss'}"
        )
        assert list(series.pictures) == sorted({point.step for point in history})
        assert len(series.pictures) > 1, "it can be seen to get better"


def test_the_server_gives_them_and_nothing_else(system: Artifact) -> None:
    loaded, training = api.load(system.uri), training_pictures(system)
    with TestClient(make_app(loaded, Drawings(), training), base_url="http://127.0.0.1:5001") as client:
        listed = client.get("/training").json()
        assert [each["artifact"] for each in listed] == [each.manifest.artifact.uri for each in training]
        for number, each in enumerate(listed):
            last = each["samples_seen"][-1]
            answer = client.get(f"/training/{number}/{last}")
            assert answer.headers["Content-Type"] == "image/png"
            assert Image.open(io.BytesIO(answer.content)).width >= 32
        for missing in ("/training/99/640", "/training/-1/640", "/training/0/3"):
            assert client.get(missing).status_code == 404
        roles = {each["role"] for each in client.get("/system").json()["made_from"]}
        assert {"system", "decoder", "shard"} <= roles
