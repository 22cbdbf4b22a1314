"""The system's stage: what its artifact says, what is refused, and several systems of one pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from genpipe.artifacts import Artifact, fetch, read_manifest
from genpipe.config import ConfigError
from genpipe.data.shard_dataset import open_shards
from genpipe.lineage import content_digest

if TYPE_CHECKING:
    from conftest import TinyPipeline


def parts(system: Artifact) -> dict[str, Artifact]:
    manifest = read_manifest(system.uri)
    assert manifest is not None
    return dict(manifest.inputs)


def test_a_system_names_its_parts_by_fingerprint_and_content(tiny: TinyPipeline) -> None:
    system = tiny.run("system")
    found = parts(system)
    assert found.keys() == {"autoencoder", "clip", "prior", "decoder", "upsamplers.0"}
    assert system.meta["parts"] == {role: artifact.fingerprint for role, artifact in found.items()}
    assert system.meta["made_from"] == {role: content_digest(artifact) for role, artifact in found.items()}
    assert (system.meta["kind"], system.meta["size"], system.meta["conditioned_on"]) == ("unclip", 32, ["text"])
    record = json.loads((fetch(system) / "system.json").read_text())
    assert record["model"]["decoder"]["steps"] == 4 and record["made_from"] == system.meta["made_from"]


def test_what_its_parts_promise_is_promised_before_they_are_made(tiny: TinyPipeline) -> None:
    planned = tiny.plan("stages.decoder.train.seed=11")["system"]
    assert planned.status == "run"
    assert (planned.artifact.meta["size"], planned.artifact.meta["conditioned_on"]) == (32, ["text"])


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("stages.system.model.upsamplers=[{steps: 2}, {steps: 2}]", "model.upsamplers"),
        ("stages.system.model.decoder={kind: ddpm, variance: learned}", "model.decoder"),
        ("stages.system.model={kind: pixel}", "model.kind to latent"),
        ("stages.system.inputs.upsamplers=[decoder]", "decoder"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(tiny: TinyPipeline, setting: str, named: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny.plan(setting)
    assert "stages.system" in str(error.value) and named in str(error.value)


def test_three_seeds_of_a_decoder_are_three_systems(tiny: TinyPipeline) -> None:
    """`configs/pipeline/seeds-tiny.yaml`, of which what tiny.yaml made is taken from its store."""
    seeds = type(tiny)(tiny.store, tiny.shapes, Path("configs/pipeline/seeds-tiny.yaml"))
    names = [f"sample@{i}" for i in range(3)]
    made = [seeds.run(name, "stages.decoder.train.samples=160") for name in names]
    pictures = [np.stack([data.image(i) for i in range(4)]) for data in (open_shards(a, split="train") for a in made)]
    assert len({picture.tobytes() for picture in pictures}) == 3
    plans = seeds.plan("stages.decoder.train.samples=160")
    assert [plans[f"decoder@{i}"].instance.cells for i in range(3)] == [{"train.seed": i} for i in range(3)]
    assert len({plans[f"decoder@{i}"].artifact.fingerprint for i in range(3)}) == 3
    assert all(plans[name].status == "cached" for name in ("shard", "clip", "features", *names))
