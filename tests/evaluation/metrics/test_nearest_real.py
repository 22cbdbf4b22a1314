"""Nearest real pictures against distances of pixels by numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gallery import SIDE, Gallery, evaluation, measured, picture, pictures

from genpipe.artifacts import Artifact
from genpipe.evaluation.metrics import nearest_real
from genpipe.evaluation.metrics.nearest_real import NearestRealConfig

TRAIN, HELDOUT, DRAWN = list(range(17)), list(range(17, 24)), list(range(100, 111))
REAL = TRAIN + HELDOUT
NAMES = [f"kind {seed % 5}" for seed in REAL]
LABELS = [seed % 5 for seed in REAL]
ASKED = [3, 0, 1, 2, 4, 0, 2, 3, 1, 1, 0]
CLASSES = [f"kind {label}" for label in range(5)]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return Gallery(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def inputs(gallery: Gallery) -> dict[str, Artifact]:
    """Pictures of five kinds, which are class and caption alike."""
    cut = len(TRAIN)
    real = {"train": pictures(TRAIN, NAMES[:cut]), "heldout": pictures(HELDOUT, NAMES[cut:])}
    labels = {"train": LABELS[:cut], "heldout": LABELS[cut:]}
    drawn = {"train": pictures(DRAWN, [CLASSES[label] for label in ASKED])}
    of_class: dict[str, Any] = {"classes": CLASSES}
    return {
        "shard": gallery.shards(real, labels=labels, **of_class),  # type: ignore[arg-type]
        "sample": gallery.shards(drawn, kind="samples", labels={"train": ASKED}, **of_class),  # type: ignore[arg-type]
    }


def config(**settings: Any) -> NearestRealConfig:
    return NearestRealConfig.model_validate({"network": {"kind": "pixels", "side": SIDE}, **settings})


def flat(seeds: list[int]) -> np.ndarray:
    return np.stack([picture(seed) for seed in seeds]).reshape(len(seeds), -1).astype(np.float64)


def distances(queries: list[int]) -> np.ndarray:
    """[queries, all real pictures]."""
    return np.square(flat(queries)[:, None] - flat(REAL)[None]).sum(-1)


@pytest.mark.parametrize("by", ["caption", "class"])
def test_shares_by_numpy(inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    monkeypatch.setattr(nearest_real, "PIECE", 4)
    found = measured(config(by=by), inputs, tmp_path)
    nearest = distances(DRAWN).argmin(1)
    chosen = nearest_real.chosen_rows(len(TRAIN), most=len(DRAWN))
    of_real = distances([TRAIN[row] for row in chosen])
    of_real[np.arange(len(chosen)), chosen] = np.inf
    expected = {
        "train/nearest_real_pixels": np.mean([LABELS[at] == label for at, label in zip(nearest, ASKED, strict=True)]),
        "train/nearest_real_pixels_chance": np.mean([LABELS.count(label) / len(REAL) for label in ASKED]),
        "train/nearest_real_pixels_ceiling": np.mean(
            [LABELS[at] == LABELS[row] for at, row in zip(of_real.argmin(1), chosen, strict=True)]
        ),
    }
    assert found == pytest.approx(expected)
    assert set(config().names(inputs)) > set(found)


def test_real_pictures_are_right_and_those_of_another_kind_wrong(
    gallery: Gallery, inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    for name, shift, expected in (("right", 0, 1.0), ("wrong", 1, 0.0)):
        asked = [CLASSES[(LABELS[seed] + shift) % 5] for seed in TRAIN]
        copies = gallery.shards({"train": pictures(TRAIN, asked)}, kind="samples", name=name)
        found = measured(config(), inputs | {"sample": copies}, tmp_path / name)
        assert found["train/nearest_real_pixels"] == expected


def test_captions_that_only_one_picture_has_have_no_ceiling(gallery: Gallery, tmp_path: Path) -> None:
    """Its nearest other cannot be right."""
    names = [f"picture {seed}" for seed in TRAIN]
    shard = gallery.shards({"train": pictures(TRAIN, names)}, name="unique")
    sample = gallery.shards({"train": pictures(TRAIN[:5], names[:5])}, kind="samples", name="unique")
    found = measured(config(), {"shard": shard, "sample": sample}, tmp_path)
    assert found == {"train/nearest_real_pixels": 1, "train/nearest_real_pixels_chance": pytest.approx(1 / len(TRAIN))}


def test_what_no_real_picture_shows_is_refused(gallery: Gallery, inputs: dict[str, Artifact]) -> None:
    strange = gallery.shards({"train": pictures([0, 1], ["a horse", CLASSES[0]])}, kind="samples", name="horse")
    with pytest.raises(ValueError, match=r"metrics\.nearest_real: 1 of 2 prompts, the first 'a horse'"):
        config().check(evaluation(inputs | {"sample": strange}))
    with pytest.raises(ValueError, match=r"metrics\.nearest_real\.by: 2 of 2 train samples are of no class"):
        config(by="class").check(evaluation(inputs | {"sample": strange}))
    others = inputs["sample"].model_copy(update={"meta": {"classes": ["cat", "dog"]}})
    with pytest.raises(ValueError, match="do not have the same classes"):
        config(by="class").check_inputs(inputs | {"sample": others})
    config().check_inputs(inputs | {"sample": others})
