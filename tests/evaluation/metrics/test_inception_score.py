"""The Inception score against Salimans et al.'s own way of computing it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gallery import SIDE, Gallery, evaluation, measured, pictures
from scipy.stats import entropy
from scripted import PLAIN, Projection, network_file, projected
from torch import Tensor, nn

from genpipe.artifacts import Artifact
from genpipe.evaluation.metrics.inception_score import InceptionScoreConfig

DRAWN, CLASSES = range(23), 5


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return Gallery(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def inputs(gallery: Gallery) -> dict[str, Artifact]:
    return {"sample": gallery.shards({"train": pictures(DRAWN, [str(i) for i in DRAWN])}, kind="samples")}


def test_it_is_that_of_its_authors(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    """Their program: split the predictions, in each exp of the mean of entropy(p(y|x), p(y)), then mean and std."""
    network = network_file(tmp_path, Projection(SIDE, CLASSES), size=SIDE, name="classes", **PLAIN)
    cfg = InceptionScoreConfig.model_validate({"network": network, "folds": 4})
    predicted = projected(DRAWN, dims=CLASSES).double().softmax(1).numpy()
    scores = []
    for fold in range(4):
        part = np.stack([p for i, p in enumerate(predicted) if i * 4 // len(predicted) == fold])
        scores.append(np.exp(np.mean([entropy(p, part.mean(0)) for p in part])))
    found = measured(cfg, inputs, tmp_path / "out")
    assert found == {
        "train/inception_score_classes_23": pytest.approx(np.mean(scores), rel=1e-5),
        "train/inception_score_std_classes_23": pytest.approx(np.std(scores), rel=1e-4),
    }
    assert cfg.names(inputs)[:2] == ["train/inception_score_classes_*", "train/inception_score_std_classes_*"]


class Red(nn.Module):
    """As sure as can be that a picture is of class 0 if it is dark in red, else of class 1."""

    def forward(self, images: Tensor) -> Tensor:
        bright = (images[:, 0].mean((1, 2)) > 0.5).float()
        return 1000 * torch.stack([1 - bright, bright], dim=1)


def test_sure_and_varied_pictures_have_as_many_points_as_classes(gallery: Gallery, tmp_path: Path) -> None:
    dark, light = np.zeros((SIDE, SIDE, 3), np.uint8), np.full((SIDE, SIDE, 3), 255, np.uint8)
    network = network_file(tmp_path, Red(), size=SIDE, name="red", **PLAIN)
    cfg = InceptionScoreConfig.model_validate({"network": network, "folds": 1})
    for name, shown, expected in (("both", [dark, light], 2), ("one", [dark, dark], 1)):
        of = gallery.shards({"train": [(image, "?") for image in shown * 3]}, kind="samples", name=name)
        found = measured(cfg, {"sample": of}, tmp_path / name)
        assert found["train/inception_score_red_6"] == pytest.approx(expected)


def test_folds_without_pictures_are_refused(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    network = network_file(tmp_path, Projection(SIDE, CLASSES), size=SIDE)
    with pytest.raises(ValueError, match=r"metrics\.inception_score\.folds: 23 train samples do not fill 24"):
        InceptionScoreConfig.model_validate({"network": network, "folds": 24}).check(evaluation(inputs))
