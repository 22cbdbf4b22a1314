"""Generated pictures that show their classes teach them; those that show others do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gallery import SIDE, Gallery, evaluation, measured

from genpipe.artifacts import Artifact
from genpipe.evaluation.metrics.classification import ClassificationConfig

CLASSES = ["red", "green", "blue"]
COUNTS = {"train": 60, "heldout": 45}


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return Gallery(tmp_path_factory.mktemp("store"))


def colored(labels: list[int], *, seed: int) -> list[tuple[np.ndarray, str]]:
    """Noise, brighter in the channel of the class."""
    draws = np.random.default_rng(seed)
    images = draws.integers(0, 200, (len(labels), SIDE, SIDE, 3))
    images[np.arange(len(labels)), :, :, labels] += 40
    return [(image.astype(np.uint8), CLASSES[label]) for image, label in zip(images, labels, strict=True)]


def of_classes(gallery: Gallery, labels: dict[str, list[int]], *, shown: int = 0, **settings: Any) -> Artifact:
    """Pictures of classes, or of those that are `shown` places further on."""
    of = {split: colored([(label + shown) % 3 for label in those], seed=len(those)) for split, those in labels.items()}
    return gallery.shards(of, labels=labels, classes=CLASSES, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shard(gallery: Gallery) -> Artifact:
    return of_classes(gallery, {split: [i % 3 for i in range(count)] for split, count in COUNTS.items()})


def config(**settings: Any) -> ClassificationConfig:
    return ClassificationConfig.model_validate({"network": {"kind": "pixels", "side": 4}, **settings})


@pytest.mark.parametrize(("shown", "expected"), [(0, 1.0), (1, 0.0)])
def test_what_the_pictures_show_is_learned(
    gallery: Gallery, shard: Artifact, tmp_path: Path, shown: int, expected: float
) -> None:
    sample = of_classes(gallery, {"train": [i % 3 for i in range(31)]}, shown=shown, kind="samples", name=str(shown))
    found = measured(config(), {"shard": shard, "sample": sample}, tmp_path)
    assert found == {
        "train/classification_pixels": pytest.approx(expected, abs=0.1),
        "train/classification_pixels_real": pytest.approx(1, abs=0.1),
        "train/classification_pixels_chance": pytest.approx(1 / 3),
    }
    assert set(config().names({})) > set(found)


def test_pictures_without_classes_are_refused(gallery: Gallery, shard: Artifact) -> None:
    sample = of_classes(gallery, {"train": [-1] * 4}, kind="samples", name="none")
    with pytest.raises(ValueError, match=r"metrics\.classification: the train samples have no class labels"):
        config().check(evaluation({"shard": shard, "sample": sample}))
    others = sample.model_copy(update={"meta": {"classes": ["cat"]}})
    with pytest.raises(ValueError, match=r"metrics\.classification: .* do not have the same classes"):
        config().check_inputs({"shard": shard, "sample": others})
