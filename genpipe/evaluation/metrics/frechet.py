"""How far the generated pictures, as a set, are from real ones: FID, and its like with other networks.

D features.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Discriminator, Field, Tag

from genpipe.artifacts import Artifact, Role
from genpipe.config import Config
from genpipe.data.shards import SPLITS, Split
from genpipe.evaluation.fidelity import FeatureMoments, Moments, StoredMoments, frechet_distance
from genpipe.evaluation.metrics.feature_networks import AnyNetwork, Network
from genpipe.evaluation.metrics.features import Features, FeatureSet
from genpipe.evaluation.metrics.metric import REFERENCE, SAMPLE, Evaluation, check_file
from genpipe.pinned_files import PinnedFile, read_pinned

Against = Annotated[
    Annotated[Literal["originals"] | Split, Tag("split")] | Annotated[PinnedFile, Tag("file")],
    Discriminator(lambda value: "split" if isinstance(value, str) else "file"),
]


class FrechetConfig(Config):
    """The Frechet distance of N pictures, `SPLIT/fid_N`, for each split with samples.

    `against` is what they are held against: `originals`, as many real pictures that have their captions; all of a
    split of the reference; or stored statistics, a .npz file with `mu` [D] and `sigma` [D, D] as they are published.
    On another network than Inception it is called `frechet_NETWORK_N`.
    """

    kind: Literal["frechet"] = "frechet"
    network: Network = Field(description="whose features of the pictures are compared")
    against: Against = Field(
        "originals", description="real pictures with the same captions, a split of the data, or published statistics"
    )

    def roles(self) -> dict[str, Role]:
        """Pictures; the reference unless its statistics are stored; what the network takes."""
        return {**SAMPLE, **({} if isinstance(self.against, PinnedFile) else REFERENCE), **self.network.roles()}

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """One for each split, with the number of pictures at its end."""
        return [f"{split}/{_name(self.network)}_*" for split in SPLITS]

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Raise ValueError if the network may not be used, or the statistics' file is here and holds something else."""
        self.network.check_inputs(inputs, setting="metrics.frechet.network")
        if isinstance(self.against, PinnedFile):
            check_file(self.against, stored_moments, setting="metrics.frechet.against")

    def sets(self) -> Sequence[FeatureSet]:
        """The pictures, and what they are held against."""
        sample = FeatureSet(self.network, "sample")
        return [sample] if isinstance(self.against, PinnedFile) else [sample, FeatureSet(self.network, self.against)]

    def check(self, evaluation: Evaluation) -> None:
        """Any number of pictures from two on has a distance."""

    def score(self, features: Features, evaluation: Evaluation, out: Path) -> dict[str, float]:
        """The distances. Raises ValueError where features do not fit the statistics, or for a set of one."""
        metrics: dict[str, float] = {}
        for split in features.splits(self.network):
            drawn = features.moments(self.network, "sample", split)
            distance = frechet_distance(drawn, self._real(split, drawn, features))
            metrics[f"{split}/{_name(self.network)}_{drawn.count}"] = distance
        return metrics

    def _real(self, split: Split, drawn: FeatureMoments, features: Features) -> Moments:
        if not isinstance(self.against, PinnedFile):
            of_split = split if self.against == "originals" else self.against
            return features.moments(self.network, self.against, of_split)
        stored = stored_moments(self.against)
        if stored.mean.shape != drawn.mean.shape:
            raise ValueError(
                f"metrics.frechet.against: {self.against.weights} holds statistics of {len(stored.mean)} features, but "
                f"the network gives {len(drawn.mean)}; use statistics of the same network"
            )
        return stored


def _name(network: AnyNetwork) -> str:
    return f"frechet_{network.label}" if network.label else "fid"


def stored_moments(file: PinnedFile) -> StoredMoments:
    """The statistics of a .npz file: `mu` [D] and `sigma` [D, D]. Raises ValueError if it holds others."""
    data = read_pinned(file)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in ("mu", "sigma"))
    except (KeyError, ValueError, OSError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.weights}: no .npz file of statistics with `mu` and `sigma`: {error}") from None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{file.weights}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not fit")
    return StoredMoments(mean, covariance)
