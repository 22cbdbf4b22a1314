"""CMMD of the generated pictures to real ones: a kernel distance of CLIP's image embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch.nn.functional as F

from genpipe.evaluation.kernels import cmmd
from genpipe.evaluation.metrics.features import Features
from genpipe.evaluation.metrics.metric import Evaluation
from genpipe.evaluation.metrics.two_sets import TwoSetsConfig


class CmmdConfig(TwoSetsConfig):
    """CMMD (Jayasumana et al. 2024), `SPLIT/cmmd_NETWORK_N`, on features that are brought to unit length.

    Published numbers are on CLIP ViT-L/14 at 336 px: give its image tower as `network: {kind: torchscript, ...}`.
    """

    NUMBERS: ClassVar[tuple[str, ...]] = ("cmmd",)

    kind: Literal["cmmd"] = "cmmd"

    def check(self, evaluation: Evaluation) -> None:
        """Any number of pictures has a distance."""

    def score(self, features: Features, evaluation: Evaluation, out: Path) -> dict[str, float]:
        """The number of each split."""
        metrics: dict[str, float] = {}
        for split, drawn, real in self.pairs(features, evaluation):
            found = cmmd(F.normalize(drawn, dim=1), F.normalize(real, dim=1))
            metrics |= self.numbered(split, {"cmmd": found}, count=len(drawn))
        return metrics
