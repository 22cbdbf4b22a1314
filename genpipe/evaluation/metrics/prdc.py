"""Fidelity and variety apart: do generated pictures lie where real ones do, and are real ones all reached?"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from genpipe.evaluation.metrics.features import Features
from genpipe.evaluation.metrics.metric import Evaluation
from genpipe.evaluation.metrics.two_sets import TwoSetsConfig
from genpipe.evaluation.neighbors import neighbor_shares


class PrdcConfig(TwoSetsConfig):
    """`SPLIT/precision_N`, `SPLIT/recall_N`, `SPLIT/density_N`, `SPLIT/coverage_N` of N pictures and N real ones.

    Precision and recall are those of Kynkaanniemi et al. 2019 (k of 3 there), density and coverage those of Naeem et
    al. 2020 (k of 5). On another network than Inception `precision_NETWORK_N`, and so on.
    """

    NUMBERS: ClassVar[tuple[str, ...]] = ("precision", "recall", "density", "coverage")

    kind: Literal["prdc"] = "prdc"
    k: int = Field(5, ge=1, description="a picture's ball reaches to its k-th nearest other")

    def check(self, evaluation: Evaluation) -> None:
        """Raise ValueError unless every picture has a k-th nearest other."""
        self.check_pictures(evaluation, least=self.k + 1, setting="k")

    def score(self, features: Features, evaluation: Evaluation, out: Path) -> dict[str, float]:
        """The numbers of each split."""
        metrics: dict[str, float] = {}
        for split, drawn, real in self.pairs(features, evaluation):
            metrics |= self.numbered(split, neighbor_shares(drawn, real, k=self.k), count=len(drawn))
        return metrics
