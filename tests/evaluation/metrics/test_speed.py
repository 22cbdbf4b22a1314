"""What the samples say of how they were drawn is told, and is no part of what was drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from genpipe.artifacts import Artifact, read_manifest
from genpipe.evaluation.metrics.speed import SpeedConfig
from genpipe.stages import sample

if TYPE_CHECKING:
    from conftest import TinyPipeline


def test_scores_tell_what_the_samples_say(pixel_tiny: TinyPipeline) -> None:
    """Of pixel-tiny.yaml: four steps of Heun's sampler are seven evaluations, and nothing is guided."""
    scores = read_manifest(pixel_tiny.run("evaluate", "stages.evaluate.metrics={speed: {}}").uri)
    manifest = read_manifest(pixel_tiny.run("sample").uri)
    assert scores is not None and manifest is not None and manifest.environment["hardware"]
    found, drawn = (
        {name: value for name, value in of.metrics.items() if name.startswith("speed/")} for of in (scores, manifest)
    )
    assert found == drawn and found["speed/pictures_per_second"] > 0 and found["speed/parameters"] > 0
    assert found["speed/evaluations_decoder"] == 7


def test_pictures_that_are_drawn_again_are_the_same_at_another_speed(pixel_tiny: TinyPipeline, tmp_path: Path) -> None:
    spec = pixel_tiny.spec("sample")
    worker = sample.Worker(sample.Config.model_validate(spec.config), spec.inputs)
    found = []
    for name in ("first", "second"):
        (folder := tmp_path / name).mkdir()
        seconds = worker("train 0", folder)["cost"]["seconds"]
        found.append((seconds, {path.name: path.read_bytes() for path in folder.iterdir()}))
    (first, one), (second, other) = found
    assert first != second and one == other


def test_samples_that_say_nothing_are_refused(two_sets: dict[str, Artifact]) -> None:
    with pytest.raises(ValueError, match=r"metrics\.speed: it was not recorded when these samples were drawn"):
        SpeedConfig().check_inputs(two_sets)
    planned = two_sets["sample"].model_copy(update={"uri": "/nowhere"})
    SpeedConfig().check_inputs({"sample": planned})
