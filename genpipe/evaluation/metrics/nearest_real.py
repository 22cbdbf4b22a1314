"""Do pictures show what was asked for, by no text model's word? What the most similar real picture was called.

B pictures of a part, N real pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from genpipe.artifacts import Artifact, Role
from genpipe.config import Config
from genpipe.data.shard_dataset import ShardDataset
from genpipe.data.shards import NO_LABEL, SPLITS, Split
from genpipe.evaluation.captions import first_captions
from genpipe.evaluation.metrics.feature_networks import Network, named
from genpipe.evaluation.metrics.features import Features, FeatureSet, chosen_rows
from genpipe.evaluation.metrics.metric import REFERENCE, SAMPLE, Evaluation, check_classes
from genpipe.evaluation.neighbors import nearest
from genpipe.evaluation.per_sample import Better, write_values
from genpipe.evaluation.reference import check_matched

PIECE = 1024
"""Pictures whose neighbors are sought in one pass over the features of the reference."""

ENDS = ("", "_ceiling", "_chance")
By = Literal["caption", "class"]


class NearestRealConfig(Config):
    """The share of pictures whose nearest real picture, of the whole reference, has the caption that was asked for.

    `SPLIT/nearest_real`, in the features of Inception (`nearest_real_NETWORK` of another network). Beside it
    `nearest_real_ceiling`, the same of as many real pictures of the split, their first captions and all others,
    among those whose caption another one has (left out if there are none), and `nearest_real_chance`, that of
    neighbors which are drawn blindly. With `by: class` it is the class that has to be the same.
    """

    kind: Literal["nearest_real"] = "nearest_real"
    network: Network = Field(description="what turns a picture into features")
    by: By = Field("caption", description="what the nearest real picture must share with what was asked for")

    def roles(self) -> dict[str, Role]:
        """Pictures, the reference, and what the network takes."""
        return {**SAMPLE, **REFERENCE, **self.network.roles()}

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """All three of each split."""
        return [f"{split}/{named('nearest_real', self.network)}{end}" for split in SPLITS for end in ENDS]

    def per_sample(self) -> dict[str, Better]:
        """Whether each picture's nearest real one is right."""
        return {f"{split}/{named('nearest_real', self.network)}": "higher" for split in SPLITS}

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Raise ValueError if the network may not be used, or if classes are asked for that are others, or none."""
        self.network.check_inputs(inputs, setting="metrics.nearest_real.network")
        if self.by == "class":
            check_classes(inputs, setting="metrics.nearest_real.by")

    def sets(self) -> Sequence[FeatureSet]:
        """The pictures, and all real ones."""
        return [FeatureSet(self.network, "sample"), FeatureSet(self.network, "reference")]

    def check(self, evaluation: Evaluation) -> None:
        """Raise ValueError for pictures whose caption or class no real picture has."""
        for dataset in evaluation.samples.values():
            for rows in _pieces(np.arange(len(dataset))):
                asked = _asked(dataset, rows, self.by)
                _, counts = _compared(evaluation, asked, np.full(len(rows), -1))
                if isinstance(asked, list):
                    check_matched(np.where(counts, 0, -1), asked, setting="metrics.nearest_real")
                elif not counts.all():
                    without = int((counts == 0).sum())
                    raise ValueError(
                        f"metrics.nearest_real.by: {without} of {len(rows)} {dataset.split} samples are of no class "
                        "that the reference (role shard) has pictures of; use by: caption"
                    )

    def score(self, features: Features, evaluation: Evaluation, out: Path) -> dict[str, float]:
        """The shares. In memory are the features of `PIECE` pictures and of one part of the reference at a time."""
        metrics: dict[str, float] = {}
        for split in features.splits(self.network):
            name = f"{split}/{named('nearest_real', self.network)}"
            rows = np.arange(features.count(self.network, "sample", split))
            right, counts = self._compare(features, evaluation, split, rows, real=False)
            metrics |= {name: right.mean(), f"{name}_chance": counts.mean() / len(evaluation.reference)}
            write_values(
                out,
                f"nearest_real-{split}",
                {name: right},
                better=self.per_sample(),
                keys=first_captions(evaluation.samples[split], range(len(rows))),
                rows=range(len(rows)),
                seed=evaluation.seed,
            )
            of_split = len(evaluation.reference.range_of(split))
            if of_split:
                right, counts = self._compare(
                    features, evaluation, split, chosen_rows(of_split, most=len(rows)), real=True
                )
                if (others := counts > 1).any():
                    metrics[f"{name}_ceiling"] = right[others].mean()
        return {name: float(value) for name, value in metrics.items()}

    def _compare(
        self, features: Features, evaluation: Evaluation, split: Split, rows: np.ndarray, *, real: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `_compared` finds of generated pictures, or of real ones and all others, at these rows of a split."""
        dataset = evaluation.reference.datasets[split] if real else evaluation.samples[split]
        found = []
        for piece in _pieces(rows):
            block = features.rows(self.network, split if real else "sample", split, piece).to(evaluation.device)
            own = torch.from_numpy(piece + evaluation.reference.range_of(split).start).to(evaluation.device)
            _, at = nearest(block, self._pool(features, evaluation), without=own if real else None)
            found.append(_compared(evaluation, _asked(dataset, piece, self.by), at.cpu().numpy()))
        right, counts = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return right, counts

    def _pool(self, features: Features, evaluation: Evaluation) -> Iterator[tuple[int, Tensor]]:
        """All real pictures, numbered as the reference numbers them."""
        for split, rows in evaluation.reference.ranges.items():
            for first, block in features.blocks(self.network, split, split):
                yield rows.start + first, block


def _pieces(rows: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(rows), PIECE):
        yield rows[first : first + PIECE]


def _asked(dataset: ShardDataset, rows: np.ndarray, by: By) -> list[str] | np.ndarray:
    """What pictures are to show: their first captions, or their classes, int64 [B]."""
    return dataset.labels(rows) if by == "class" else [dataset.captions(int(row))[0] for row in rows]


def _compared(
    evaluation: Evaluation, asked: list[str] | np.ndarray, found: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether real pictures, int64 [B], have what was asked for, bool [B], and how many have it, int64 [B].

    A found one of -1 has nothing.
    """
    reference, there = evaluation.reference, found >= 0
    if isinstance(asked, np.ndarray):
        counts, labels = reference.class_counts(), np.full(len(found), NO_LABEL)
        labels[there] = reference.labels(found[there])
        known = (asked != NO_LABEL) & (asked < len(counts))
        return (labels == asked) & known, np.where(known, counts[np.where(known, asked, 0)], 0)
    matches = reference.match(asked)
    pairs = matches.prompts * len(reference) + matches.rows
    right = np.isin(matches.prompt * len(reference) + found, pairs) & there
    return right, np.bincount(matches.prompts, minlength=int(matches.prompt.max()) + 1)[matches.prompt]
