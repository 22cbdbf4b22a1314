"""The four shares on committed pictures are those of a network's features, of as many pictures of both sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gallery import evaluation, measured
from scripted import projected

from genpipe.artifacts import Artifact
from genpipe.evaluation.metrics.prdc import PrdcConfig
from genpipe.evaluation.neighbors import neighbor_shares


def config(network: dict[str, Any], **settings: Any) -> PrdcConfig:
    return PrdcConfig.model_validate({"network": network, **settings})


def test_they_are_those_of_the_features(
    two_sets: dict[str, Artifact], projection: dict[str, Any], tmp_path: Path
) -> None:
    shares = neighbor_shares(projected(range(100, 120), dims=7), projected(range(20), dims=7), k=3)
    assert 0 < shares["precision"] < 1 and 0 < shares["coverage"] < 1, "so that the sets could be told apart"
    expected = {f"train/{name}_other_20": pytest.approx(value) for name, value in shares.items()}
    assert measured(config(projection, k=3), two_sets, tmp_path) == expected


@pytest.mark.parametrize(("settings", "count"), [({"against": "heldout"}, 12), ({"pictures": 9}, 9)])
def test_there_are_as_many_of_both(
    two_sets: dict[str, Artifact], projection: dict[str, Any], tmp_path: Path, settings: dict[str, Any], count: int
) -> None:
    cfg = config(projection, k=3, **settings)
    expected = {f"train/{name}_other_{count}" for name in ("precision", "recall", "density", "coverage")}
    assert measured(cfg, two_sets, tmp_path).keys() == expected
    assert {name.replace("*", str(count)) for name in cfg.names(two_sets)} > expected


def test_too_few_pictures_are_found_before_anything_is_computed(
    two_sets: dict[str, Artifact], projection: dict[str, Any]
) -> None:
    for settings, message in (
        ({"k": 12, "against": "heldout"}, "k: needs 13 pictures, but heldout pictures of the reference are 12"),
        ({"pictures": 4}, r"k: needs 6 pictures, but metrics\.prdc\.pictures are 4"),
    ):
        with pytest.raises(ValueError, match=rf"metrics\.prdc\.{message}"):
            config(projection, **settings).check(evaluation(two_sets))
