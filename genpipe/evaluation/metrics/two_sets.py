"""What metrics of two sets of features share: pictures, real ones, and how many of each are held in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from genpipe.artifacts import Artifact, Role
from genpipe.config import Config
from genpipe.data.shards import SPLITS, Split
from genpipe.evaluation.metrics.feature_networks import Network, named
from genpipe.evaluation.metrics.features import Features, FeatureSet
from genpipe.evaluation.metrics.metric import REFERENCE, SAMPLE, Evaluation


class TwoSetsConfig(Config):
    """Generated pictures against real ones, in the features of a network.

    Of each set at most `pictures` are held in memory, chosen at random and always the same: 20 bytes a feature.
    """

    NUMBERS: ClassVar[tuple[str, ...]]
    """What it measures."""

    kind: str
    network: Network = Field(description="what turns a picture into features")
    against: Literal["originals"] | Split = Field(
        "originals", description="as many real pictures that have the captions, or those of a split"
    )
    pictures: int = Field(10_000, ge=2, description="of each set, at most")

    def roles(self) -> dict[str, Role]:
        """Pictures, the reference, and what the network takes."""
        return {**SAMPLE, **REFERENCE, **self.network.roles()}

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """Its numbers of each split, with how many pictures there were at the end."""
        return [f"{split}/{named(number, self.network)}_*" for split in SPLITS for number in self.NUMBERS]

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Raise ValueError if the network may not be used."""
        self.network.check_inputs(inputs, setting=f"metrics.{self.kind}.network")

    def sets(self) -> Sequence[FeatureSet]:
        """The pictures, and those that they are held against."""
        return [FeatureSet(self.network, "sample"), FeatureSet(self.network, self.against)]

    def check_pictures(self, evaluation: Evaluation, *, least: int, setting: str) -> None:
        """Raise ValueError if one of the sets has fewer than `least` pictures, or fewer are to be held."""
        counts = {f"{split} samples": len(dataset) for split, dataset in evaluation.samples.items()}
        if self.against != "originals":
            counts[f"{self.against} pictures of the reference"] = len(evaluation.reference.range_of(self.against))
        for name, count in {**counts, f"metrics.{self.kind}.pictures": self.pictures}.items():
            if count < least:
                raise ValueError(
                    f"metrics.{self.kind}.{setting}: needs {least} pictures, but {name} are {count}; lower it"
                )

    def pairs(self, features: Features, evaluation: Evaluation) -> Iterator[tuple[Split, Tensor, Tensor]]:
        """The features [M, D] and [M, D] of each split that has samples, as many of both, on the device."""
        for split in features.splits(self.network):
            real_split = split if self.against == "originals" else self.against
            counts = (
                features.count(self.network, "sample", split),
                features.count(self.network, self.against, real_split),
            )
            most = min(self.pictures, *counts)
            drawn = features.chosen(self.network, "sample", split, most=most)
            real = features.chosen(self.network, self.against, real_split, most=most)
            yield split, drawn.to(evaluation.device), real.to(evaluation.device)

    def numbered(self, split: Split, found: Mapping[str, float], *, count: int) -> dict[str, float]:
        """Numbers by their whole names."""
        return {f"{split}/{named(number, self.network)}_{count}": value for number, value in found.items()}
