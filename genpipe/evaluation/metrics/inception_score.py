"""Inception score: does a classifier tell what each picture shows, and do the pictures show different things?

K classes, F folds, B pictures of a part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from genpipe.artifacts import Artifact, Role
from genpipe.config import Config
from genpipe.data.shards import SPLITS, Split
from genpipe.evaluation.metrics.feature_networks import TorchScriptNetwork, named
from genpipe.evaluation.metrics.features import Features, FeatureSet
from genpipe.evaluation.metrics.metric import SAMPLE, Evaluation

_STD = "inception_score_std"


class InceptionScoreConfig(Config):
    """The Inception score, `SPLIT/inception_score_NETWORK_N`, and `SPLIT/inception_score_std_NETWORK_N` over folds.

    Salimans et al. 2016; the network gives logits [B, K]. No real picture is looked at: a system that draws one perfect
    picture of each class, again and again, has the best score. So it is of use only beside others.
    """

    kind: Literal["inception_score"] = "inception_score"
    network: TorchScriptNetwork
    folds: int = Field(10, ge=1, description="in each of which it is measured by itself, as it is published")

    def roles(self) -> dict[str, Role]:
        """Pictures, and no others."""
        return {**SAMPLE, **self.network.roles()}

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """Both of each split, with the number of pictures at the end."""
        return [f"{split}/{named(name, self.network)}_*" for split in SPLITS for name in ("inception_score", _STD)]

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Raise ValueError if the network's file is here and not the one that the settings say."""
        self.network.check_inputs(inputs, setting="metrics.inception_score.network")

    def sets(self) -> Sequence[FeatureSet]:
        """The logits of the pictures."""
        return [FeatureSet(self.network, "sample")]

    def check(self, evaluation: Evaluation) -> None:
        """Raise ValueError unless each fold has a picture."""
        for split, dataset in evaluation.samples.items():
            if len(dataset) < self.folds:
                raise ValueError(
                    f"metrics.inception_score.folds: {len(dataset)} {split} samples do not fill {self.folds}; lower it"
                )

    def score(self, features: Features, evaluation: Evaluation, out: Path) -> dict[str, float]:
        """Mean and deviation over the folds; one part's logits are in memory at a time."""
        metrics: dict[str, float] = {}
        for split in features.splits(self.network):
            found, count = self._folds(features, split), features.count(self.network, "sample", split)
            metrics[f"{split}/{named('inception_score', self.network)}_{count}"] = float(found.mean())
            metrics[f"{split}/{named(_STD, self.network)}_{count}"] = float(found.std(correction=0))
        return metrics

    def _folds(self, features: Features, split: Split) -> Tensor:
        """fp64 [F]: exp of the mean KL divergence of p(y|x) from its mean p(y), fold by fold (section 4)."""
        count = features.count(self.network, "sample", split)
        sums = entropies = pictures = torch.zeros(())
        for first, logits in features.blocks(self.network, "sample", split):
            fold = torch.arange(first, first + len(logits)) * self.folds // count
            logs = logits.double().log_softmax(1)
            member = torch.nn.functional.one_hot(fold, self.folds).double().T
            sums, pictures = sums + member @ logs.exp(), pictures + member.sum(1)
            entropies = entropies + member @ (logs.exp() * logs).sum(1)
        marginal = sums / pictures[:, None]
        return (entropies / pictures - torch.special.xlogy(marginal, marginal).sum(1)).exp()
