"""What the gallery finds in a store, against what the pipeline's artifacts hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from genpipe.artifacts import Artifact
from genpipe.data.shard_dataset import open_shards
from genpipe.evaluation.drawn import Drawings

if TYPE_CHECKING:
    from conftest import TinyPipeline

MEASURED = "stages.evaluate.metrics={memorization: {networks: [{kind: pixels}]}, grid: {}}"


@pytest.fixture(scope="module")
def system(tiny: TinyPipeline) -> Artifact:
    tiny.run("evaluate", MEASURED)
    return tiny.run("system")


def test_every_picture_of_the_system_is_there_with_what_was_asked_for(tiny: TinyPipeline, system: Artifact) -> None:
    samples = tiny.run("sample")
    drawings = Drawings.of(system)
    of_it = [drawn for drawn in drawings.pictures if drawn.samples == samples.uri]
    assert len(of_it) == sum(samples.meta["samples"].values())
    assert [drawn.id for drawn in drawings.pictures] == list(range(len(drawings.pictures)))
    for drawn in of_it:
        shards = open_shards(samples, split=drawn.split)
        assert drawn.caption in shards.captions(drawn.row) and drawn.key == shards.key(drawn.row)
        assert drawings.image(drawn.id) == shards.image_bytes(drawn.row)


def test_a_measured_picture_lies_beside_its_nearest_training_picture(tiny: TinyPipeline, system: Artifact) -> None:
    drawings, shards = Drawings.of(system), open_shards(tiny.run("shard"), split="train")
    measured = [drawn for drawn in drawings.pictures if drawn.neighbors]
    assert measured
    for drawn in measured:
        assert "pixels" in {neighbor.network for neighbor in drawn.neighbors}
        assert drawn.p is not None and 0 < drawn.p <= 1
        for which, neighbor in enumerate(drawn.neighbors):
            image, caption = drawings.training(drawn.id, which)
            assert image == shards.image_bytes(neighbor.row) and caption in shards.captions(neighbor.row)


def test_another_system_or_none_has_drawn_nothing(system: Artifact, tmp_path: Path) -> None:
    assert not Drawings.of(system.model_copy(update={"fingerprint": "0" * 64})).pictures
    assert not Drawings.of(system.model_copy(update={"uri": str(tmp_path)})).pictures
