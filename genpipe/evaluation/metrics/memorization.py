"""Are generated pictures copies of training pictures? Nearer to them than held-out pictures are, and by how much.

Held-out pictures show how near a picture comes that nobody copied: their distances to their nearest training picture
are the null distribution that those of generated pictures are held against.

N generated and H held-out pictures, W networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from genpipe.artifacts import Artifact, Role
from genpipe.config import Config
from genpipe.data.image_batches import image_batch
from genpipe.data.shards import SPLITS, Split
from genpipe.evaluation.captions import first_captions
from genpipe.evaluation.grids import hwc, labeled_grid
from genpipe.evaluation.metrics.feature_networks import AnyNetwork, Network
from genpipe.evaluation.metrics.features import Features, FeatureSet, chosen_rows
from genpipe.evaluation.metrics.metric import REFERENCE, SAMPLE, Evaluation
from genpipe.evaluation.neighbors import nearest
from genpipe.evaluation.per_sample import Better, write_values

CELL = 128


@dataclass(frozen=True)
class Neighbors:
    """Of each picture the nearest training picture: `distance` fp64 [N], and its `row` in the split, int64 [N]."""

    distance: np.ndarray
    row: np.ndarray

    @property
    def scale(self) -> float:
        """A distance that is usual among them."""
        return float(np.median(self.distance)) or 1.0


class MemorizationConfig(Config):
    """The share of pictures that lie nearer to a training picture than all but `level` of held-out pictures do.

    In the features of every one of `networks`, so give two that see different things. `SPLIT/memorized` is that share,
    `memorized_heldout` that of the held-out pictures by the same rule, each against the others: what to expect of
    pictures that are no copies, at most `level`. `SPLIT/copied` estimates the share that lies nearer to training
    pictures than held-out ones would, blurred and damaged copies among them (Storey 2002: 1 - pi_0 at lambda 0.5 of the
    `p` below); of what is drawn as new it is 0 or less in expectation, and cut off there. `SPLIT/copying_z_NETWORK` is
    how many deviations the distances lie above those of held-out pictures (Meehan et al. 2020): far below 0 where
    training pictures are copied.

    `memorization.parquet` has the nearest training picture of every generated one, its distance, and the `p` of it,
    the share of held-out pictures that are as near; `memorization-null.parquet` the distances of the held-out ones;
    `memorization-SPLIT.png` the worst pairs side by side.
    """

    kind: Literal["memorization"] = "memorization"
    networks: tuple[Network, ...] = Field(min_length=1, description="in the features of all of which a copy is near")
    level: float = Field(0.01, gt=0, lt=1, description="share of held-out pictures that may lie as near as a copy")
    heldout: int = Field(10_000, ge=1, description="held-out pictures, at most")
    shown: int = Field(12, ge=1, description="pairs in each picture")

    @field_validator("networks")
    @classmethod
    def _names_differ(cls, networks: tuple[AnyNetwork, ...]) -> tuple[AnyNetwork, ...]:
        names = [_name(network) for network in networks]
        if len(set(names)) < len(names):
            raise ValueError(f"{', '.join(names)}: two of one name; take networks that see different things")
        return networks

    def roles(self) -> dict[str, Role]:
        """Pictures, the reference, and what the networks take."""
        return {
            **SAMPLE,
            **REFERENCE,
            **{role: of for network in self.networks for role, of in network.roles().items()},
        }

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """All of them."""
        of_split = ["memorized", "copied", *(f"copying_z_{_name(network)}" for network in self.networks)]
        return ["memorized_heldout", *(f"{split}/{name}" for split in SPLITS for name in of_split)]

    def per_sample(self) -> dict[str, Better]:
        """Whether each picture is as near as a copy."""
        return {f"{split}/memorized": "lower" for split in SPLITS}

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Raise ValueError if a network may not be used."""
        for network in self.networks:
            network.check_inputs(inputs, setting="metrics.memorization.networks")

    def sets(self) -> Sequence[FeatureSet]:
        """The pictures, and what is trained on and held out of the reference, by each network."""
        return [FeatureSet(network, of) for network in self.networks for of in ("sample", "train", "heldout")]

    def check(self, evaluation: Evaluation) -> None:
        """Raise ValueError unless there are so many held-out pictures that one can lie below the level."""
        count, least = len(evaluation.reference.range_of("heldout")), math.ceil(1 / self.level) - 1
        if min(count, self.heldout) < least:
            raise ValueError(
                f"metrics.memorization.level: {self.level:g} needs {least} held-out pictures, but there are "
                f"{min(count, self.heldout)}; raise the level, or hold out more"
            )

    def score(self, features: Features, evaluation: Evaluation, out: Path) -> dict[str, float]:
        """The shares.

        In memory are the features of one part of training and one of generated pictures at a time, or of `heldout`
        held-out ones, and 24 bytes W a generated picture.
        """
        chosen = chosen_rows(len(evaluation.reference.range_of("heldout")), most=self.heldout)
        null = [self._of_heldout(features, evaluation, network, chosen) for network in self.networks]
        pq.write_table(self._table({"row": chosen}, null), out / "memorization-null.parquet")
        own = np.stack([_p_among_others(neighbors.distance) for neighbors in null])
        metrics = {"memorized_heldout": float((own.max(0) <= self.level).mean())}
        tables = []
        for split in features.splits(self.networks[0]):
            found = [self._of_samples(features, evaluation, network, split) for network in self.networks]
            p = np.stack([_p(of.distance, among.distance) for of, among in zip(found, null, strict=True)]).max(0)
            metrics[f"{split}/memorized"] = float((p <= self.level).mean())
            metrics[f"{split}/copied"] = copied(p)
            write_values(
                out,
                f"memorization-{split}",
                {f"{split}/memorized": p <= self.level},
                better=self.per_sample(),
                keys=first_captions(evaluation.samples[split], range(len(p))),
                rows=range(len(p)),
                seed=evaluation.seed,
            )
            for network, of, among in zip(self.networks, found, null, strict=True):
                metrics[f"{split}/copying_z_{_name(network)}"] = copying_z(of.distance, among.distance)
            near = np.sum([of.distance / among.scale for of, among in zip(found, null, strict=True)], axis=0)
            worst = np.lexsort((near, p))[: self.shown]
            Image.fromarray(self._shown(evaluation, split, worst, found, p)).save(out / f"memorization-{split}.png")
            tables.append(self._table({"split": [split] * len(p), "row": np.arange(len(p)), "p": p}, found))
        pq.write_table(pa.concat_tables(tables), out / "memorization.parquet")
        return metrics

    def _of_heldout(
        self, features: Features, evaluation: Evaluation, network: AnyNetwork, rows: np.ndarray
    ) -> Neighbors:
        block = features.rows(network, "heldout", "heldout", rows)
        return _neighbors(block.to(evaluation.device), features.blocks(network, "train", "train"))

    def _of_samples(self, features: Features, evaluation: Evaluation, network: AnyNetwork, split: Split) -> Neighbors:
        found = [
            _neighbors(block.to(evaluation.device), features.blocks(network, "train", "train"))
            for _, block in features.blocks(network, "sample", split)
        ]
        return Neighbors(np.concatenate([of.distance for of in found]), np.concatenate([of.row for of in found]))

    def _table(self, columns: Mapping[str, Any], found: Sequence[Neighbors]) -> pa.Table:
        """With the nearest training picture in the features of each network, and its distance."""
        of_networks = {
            f"{what}_{_name(network)}": values
            for network, of in zip(self.networks, found, strict=True)
            for what, values in (("nearest", of.row), ("distance", of.distance))
        }
        return pa.table({**columns, **of_networks})

    def _shown(
        self, evaluation: Evaluation, split: Split, rows: np.ndarray, found: Sequence[Neighbors], p: np.ndarray
    ) -> np.ndarray:
        """uint8 [H, W, 3]: a row for each of these pictures, the nearest training picture of each network beside it."""
        size, dataset = evaluation.size, evaluation.samples[split]
        columns = {"generated": image_batch(dataset, rows, size=size)}
        for network, of in zip(self.networks, found, strict=True):
            at = of.row[rows] + evaluation.reference.range_of("train").start
            columns[f"nearest training picture, {_name(network)}"] = evaluation.reference.images(at, size=size)
        captions = [f"p {p[row]:.2g}: {dataset.captions(int(row))[0]}" for row in rows]
        pictures = list(zip(*map(hwc, columns.values()), strict=True))
        return labeled_grid(pictures, captions=captions, columns=list(columns), cell=max(CELL, size))


def copied(p: np.ndarray) -> float:
    """The share of [N] that is not as far from training pictures as held-out ones, by its p, in [0, 1].

    Of pictures that are, p is even over (0, 1], so that twice those above a half are all of them (Storey 2002, eq. 6).
    Its standard deviation is at most 1 / sqrt(N).
    """
    return max(0.0, 1.0 - 2.0 * float((p > 0.5).mean()))


def copying_z(drawn: np.ndarray, heldout: np.ndarray) -> float:
    """How far above held-out pictures' distances [H] to training pictures those of generated ones [N] lie.

    The standardized Mann-Whitney statistic: 0 in expectation where both are alike, with a deviation of 1; below -3 or
    so where training pictures are copied (Z_U of Meehan et al. 2020, of the whole space).
    """
    null, n, h = np.sort(heldout), len(drawn), len(heldout)
    above = (np.searchsorted(null, drawn, "left") + np.searchsorted(null, drawn, "right")).sum() / 2
    return float((above - n * h / 2) / math.sqrt(n * h * (n + h + 1) / 12))


def _neighbors(block: Tensor, training: Iterable[tuple[int, Tensor]]) -> Neighbors:
    squared, rows = nearest(block, training)
    return Neighbors(squared.sqrt().cpu().numpy(), rows.cpu().numpy())


def _p(distances: np.ndarray, null: np.ndarray) -> np.ndarray:
    """[N]: the share of held-out pictures, and the picture itself, that are as near: never 0, as of a permutation."""
    as_near = np.searchsorted(np.sort(null), distances, "right")
    return np.asarray((1 + as_near) / (1 + len(null)))


def _p_among_others(null: np.ndarray) -> np.ndarray:
    """[H]: the same of each held-out picture among all of them."""
    return np.searchsorted(np.sort(null), null, "right") / len(null)


def _name(network: AnyNetwork) -> str:
    return network.label or network.kind
