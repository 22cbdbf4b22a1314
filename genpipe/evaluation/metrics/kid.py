"""Kernel distance of the generated pictures to real ones: unbiased, so sets of different sizes compare."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from genpipe.evaluation.kernels import kid_estimates
from genpipe.evaluation.metrics.features import Features
from genpipe.evaluation.metrics.metric import Evaluation
from genpipe.evaluation.metrics.two_sets import TwoSetsConfig

TAIL = 0.025


class KidConfig(TwoSetsConfig):
    """KID over random subsets (Binkowski et al. 2018), `SPLIT/kid_N`, and how far its estimates scatter.

    `SPLIT/kid_std_N` is the deviation over the subsets, as it is published; between `SPLIT/kid_low_N` and
    `SPLIT/kid_high_N` lie 95 % of their estimates. On another network than Inception `kid_NETWORK_N`, and so on.
    """

    NUMBERS: ClassVar[tuple[str, ...]] = ("kid", "kid_std", "kid_low", "kid_high")

    kind: Literal["kid"] = "kid"
    subsets: int = Field(100, ge=2, description="random subsets")
    subset_size: int = Field(1000, ge=2, description="pictures of each set in a subset")

    def check(self, evaluation: Evaluation) -> None:
        """Raise ValueError unless there are pictures for more than one subset."""
        self.check_pictures(evaluation, least=self.subset_size + 1, setting="subset_size")

    def score(self, features: Features, evaluation: Evaluation, out: Path) -> dict[str, float]:
        """The numbers of each split."""
        metrics: dict[str, float] = {}
        for split, drawn, real in self.pairs(features, evaluation):
            generator = torch.Generator().manual_seed(0)
            found = kid_estimates(drawn, real, subsets=self.subsets, size=self.subset_size, generator=generator)
            low, high = found.quantile(torch.tensor([TAIL, 1 - TAIL], dtype=torch.float64)).tolist()
            of = {"kid": float(found.mean()), "kid_std": float(found.std()), "kid_low": low, "kid_high": high}
            metrics |= self.numbered(split, of, count=len(drawn))
        return metrics
