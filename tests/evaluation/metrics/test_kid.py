"""KID on committed pictures is that of the features that a network gives of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gallery import evaluation, measured
from scripted import projected

from genpipe.artifacts import Artifact
from genpipe.evaluation.kernels import kid_estimates
from genpipe.evaluation.metrics.kid import KidConfig


def test_the_mean_and_the_interval_of_the_estimates(
    two_sets: dict[str, Artifact], projection: dict[str, Any], tmp_path: Path
) -> None:
    cfg = KidConfig.model_validate({"network": projection, "subsets": 40, "subset_size": 10})
    drawn, real = projected(range(100, 120), dims=7), projected(range(20), dims=7)
    generator = torch.Generator().manual_seed(0)
    found = kid_estimates(drawn, real, subsets=40, size=10, generator=generator).numpy()
    expected = {
        "train/kid_other_20": found.mean(),
        "train/kid_std_other_20": found.std(ddof=1),
        "train/kid_low_other_20": np.quantile(found, 0.025),
        "train/kid_high_other_20": np.quantile(found, 0.975),
    }
    assert measured(cfg, two_sets, tmp_path) == pytest.approx(expected, rel=1e-4)
    assert [name.removesuffix("*") + "20" for name in cfg.names(two_sets)[:4]] == list(expected)


def test_subsets_that_are_no_smaller_than_the_sets_are_refused(
    two_sets: dict[str, Artifact], projection: dict[str, Any]
) -> None:
    """Before anything is computed: they would all be the same."""
    cfg = KidConfig.model_validate({"network": projection})
    with pytest.raises(ValueError, match=r"metrics\.kid\.subset_size: needs 1001 pictures, but train samples are 20"):
        cfg.check(evaluation(two_sets))
