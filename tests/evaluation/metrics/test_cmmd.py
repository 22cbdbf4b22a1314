"""CMMD on committed pictures is that of a network's features, at unit length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gallery import measured
from scripted import projected
from torch.nn.functional import normalize

from genpipe.artifacts import Artifact
from genpipe.evaluation.kernels import cmmd
from genpipe.evaluation.metrics.cmmd import CmmdConfig


def test_it_is_that_of_the_features(two_sets: dict[str, Artifact], projection: dict[str, Any], tmp_path: Path) -> None:
    cfg = CmmdConfig.model_validate({"network": projection})
    drawn, real = (normalize(projected(seeds, dims=7), dim=1) for seeds in (range(100, 120), range(20)))
    assert measured(cfg, two_sets, tmp_path) == {"train/cmmd_other_20": pytest.approx(cmmd(drawn, real), rel=1e-4)}
    assert cfg.names(two_sets)[0] == "train/cmmd_other_*"
