"""Can a classifier learn the classes from generated pictures alone? Those that it then tells of real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from genpipe.artifacts import Artifact, Role
from genpipe.config import Config
from genpipe.data.shard_dataset import ShardDataset
from genpipe.data.shards import NO_LABEL, SPLITS
from genpipe.evaluation.metrics.feature_networks import Network, named
from genpipe.evaluation.metrics.features import Features, FeatureSet, Of, chosen_rows
from genpipe.evaluation.metrics.metric import REFERENCE, SAMPLE, Evaluation, check_classes
from genpipe.evaluation.probes import linear_accuracy

ENDS = ("", "_real", "_chance")


class ClassificationConfig(Config):
    """The accuracy on held-out pictures of a classifier that learned from generated ones: `SPLIT/classification`.

    After the classification accuracy score of Ravuri & Vinyals 2019, who train a ResNet-50 on the pictures; here it is
    a linear classifier on the features of Inception (`classification_NETWORK` on those of another network), so it is
    to be held against `classification_real`, that of one that learned from as many real training pictures, and
    `classification_chance`, the share of the commonest class.
    """

    kind: Literal["classification"] = "classification"
    network: Network = Field(description="what turns a picture into features")
    pictures: int = Field(20_000, ge=2, description="to learn from, and to be tested on, at most")
    l2: float = Field(1e-3, gt=0, description="of the classifier's weights, on standardized features")

    def roles(self) -> dict[str, Role]:
        """Pictures, the reference, and what the network takes."""
        return {**SAMPLE, **REFERENCE, **self.network.roles()}

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """All three of each split."""
        return [f"{split}/{named('classification', self.network)}{end}" for split in SPLITS for end in ENDS]

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Raise ValueError if the network may not be used, or classes are others, or none."""
        self.network.check_inputs(inputs, setting="metrics.classification.network")
        check_classes(inputs, setting="metrics.classification")

    def sets(self) -> Sequence[FeatureSet]:
        """The pictures, and both splits of the reference."""
        return [FeatureSet(self.network, of) for of in ("sample", "train", "heldout")]

    def check(self, evaluation: Evaluation) -> None:
        """Raise ValueError if there is nothing with a class to learn from, or to be tested on."""
        datasets = {f"{split} samples": dataset for split, dataset in evaluation.samples.items()}
        datasets |= {f"{split} pictures of the reference": of for split, of in evaluation.reference.datasets.items()}
        for name, dataset in datasets.items():
            if not len(self._labeled(dataset)[0]):
                raise ValueError(f"metrics.classification: the {name} have no class labels; leave the metric out")

    def score(self, features: Features, evaluation: Evaluation, out: Path) -> dict[str, float]:
        """The accuracies. In memory are the features of `pictures` of each of two sets."""
        tested, expected = self._read(features, evaluation, evaluation.reference.datasets["heldout"], "heldout")
        metrics: dict[str, float] = {}
        for split in features.splits(self.network):
            drawn = self._read(features, evaluation, evaluation.samples[split], "sample")
            count = len(drawn[1])
            real = self._read(features, evaluation, evaluation.reference.datasets["train"], "train", most=count)
            name = f"{split}/{named('classification', self.network)}"
            metrics[name] = linear_accuracy(*drawn, tested, expected, l2=self.l2)
            metrics[f"{name}_real"] = linear_accuracy(*real, tested, expected, l2=self.l2)
            metrics[f"{name}_chance"] = float(expected.bincount().max()) / len(expected)
        return metrics

    def _labeled(self, dataset: ShardDataset, *, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows and labels, int64 [N] each, of at most so many samples that have a class, chosen at random."""
        rows = chosen_rows(len(dataset), most=min(self.pictures, most or self.pictures))
        labels = dataset.labels(rows)
        return rows[labels != NO_LABEL], labels[labels != NO_LABEL]

    def _read(
        self, features: Features, evaluation: Evaluation, dataset: ShardDataset, of: Of, *, most: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features fp32 [N, D] and labels int64 [N]."""
        rows, labels = self._labeled(dataset, most=most)
        found = features.rows(self.network, of, dataset.split, rows)
        return found.to(evaluation.device), torch.from_numpy(labels).to(evaluation.device)
