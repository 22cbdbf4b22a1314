"""What measured systems have in common and what not, on the tiny pipeline and one that is worse for a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from genpipe.artifacts import read_manifest
from genpipe.pipeline.comparing import Measured, curves, numbers, settings, unpaired_runs

if TYPE_CHECKING:
    from conftest import TinyPipeline

pytestmark = pytest.mark.slow

WORSE = "stages.decoder.train.samples=16"


def test_what_is_behind_scores(tiny: TinyPipeline) -> None:
    stages = Measured.at(tiny.run("evaluate"), label="A").stages
    trained = {"autoencoder", "clip", "prior", "decoder", "upsampler"}
    assert stages.keys() == {"evaluate", "sample", "system", "shard", "features", *trained}
    assert all(stages[name].artifact.fingerprint == tiny.run(name).fingerprint for name in stages)


def test_numbers_settings_and_curves_of_two(tiny: TinyPipeline) -> None:
    one, other = (tiny.run("evaluate", *overrides) for overrides in ((), (WORSE,)))
    runs = [Measured.at(one, label="A"), Measured.at(other, label="B")]
    rows = {row.number: row for row in numbers(runs)}
    ours, theirs = (read_manifest(artifact.uri) for artifact in (one, other))
    assert ours is not None and theirs is not None and rows.keys() == ours.metrics.keys() == theirs.metrics.keys()
    for name, row in rows.items():
        assert row.values == (ours.metrics[name], theirs.metrics[name])
        [difference] = row.differences
        value = difference if isinstance(difference, float) else difference.value if difference else None
        assert value == pytest.approx(theirs.metrics[name] - ours.metrics[name], abs=1e-6), name
    cosine = rows["train/self_cosine"]
    assert cosine.first is not None and cosine.first.low < ours.metrics["train/self_cosine"] < cosine.first.high
    assert not isinstance(rows["train/self_cosine"].differences[0], float), "paired"
    assert rows["pool"].first is None and rows["pool"].differences == (0.0,)
    assert settings(runs) == [("decoder", "train.samples", ("1280", "16"))]
    assert {stage: {label: set(of) for label, of in made.items()} for stage, made in curves(runs).items()} == {
        "decoder": {"A": {640, 1280}, "B": {16}}
    }
    assert unpaired_runs(runs) == {}
