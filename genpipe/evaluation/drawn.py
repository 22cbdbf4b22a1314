"""Pictures that a system drew: what each was drawn from, what metrics say of it, and what it is like in training."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow.parquet as pq

from genpipe.artifacts import Artifact, Manifest, ManifestError, find, read_manifest
from genpipe.data.shard_dataset import ShardDataset, open_shards
from genpipe.data.shards import SPLITS, Split
from genpipe.evaluation.per_sample import read_values
from genpipe.storage import join, open_storage, read_file

NEAREST, DISTANCE = "nearest_", "distance_"
MEMORIZATION = "memorization.parquet"


@dataclass(frozen=True)
class Neighbor:
    """A training picture: its `row` in the shards, as near as no other in the features of a network."""

    network: str
    row: int
    distance: float


@dataclass(frozen=True)
class Drawn:
    """A picture of a samples artifact.

    `values` are those of metrics that have one for each picture, by the metrics' numbers without the split. `p` is the
    share of held-out pictures that are as close to a training picture, where memorization was measured.
    """

    id: int
    key: str
    split: Split
    row: int
    caption: str
    seed: int | None
    samples: str
    run_id: str
    values: Mapping[str, float] = field(default_factory=dict)
    neighbors: tuple[Neighbor, ...] = ()
    p: float | None = None


@dataclass
class Drawings:
    """Every picture that a system has drawn in its store, and the training pictures to hold them against."""

    pictures: list[Drawn] = field(default_factory=list)
    _shards: dict[tuple[str, Split], ShardDataset] = field(default_factory=dict)
    _training: dict[str, Artifact] = field(default_factory=dict)

    @classmethod
    def of(cls, system: Artifact) -> Drawings:
        """Look through the store of a system; nothing where it lies in none, as a release does."""
        drawings = cls()
        store, found, _ = system.uri.rpartition("/artifacts/system/")
        if found:
            scores = list(_manifests(join(store, "artifacts", "scores")))
            for samples in _manifests(join(store, "artifacts", "samples")):
                if samples.inputs["system"].fingerprint == system.fingerprint:
                    drawings._add(samples, scores)
        return drawings

    @classmethod
    def of_samples(cls, samples: Manifest, scores: Sequence[Manifest]) -> Drawings:
        """Those of one samples artifact, with what those of the scores say of them that measured it."""
        drawings = cls()
        drawings._add(samples, scores)
        return drawings

    def image(self, number: int) -> bytes:
        """A picture's file, as it is stored. Raises IndexError."""
        drawn = self.pictures[number]
        return self._shards[drawn.samples, drawn.split].image_bytes(drawn.row)

    def training(self, number: int, neighbor: int) -> tuple[bytes, str]:
        """The file and caption of the training picture that is a picture's neighbor. Raises IndexError."""
        drawn = self.pictures[number]
        row, shards = drawn.neighbors[neighbor].row, self._open(self._training[drawn.samples], "train")
        return shards.image_bytes(row), " | ".join(shards.captions(row))

    def training_key(self, number: int, neighbor: int) -> str:
        """The key of the training picture that is a picture's neighbor. Raises IndexError."""
        drawn = self.pictures[number]
        return self._open(self._training[drawn.samples], "train").key(drawn.neighbors[neighbor].row)

    def _add(self, samples: Manifest, scores: Sequence[Manifest]) -> None:
        artifact = samples.artifact
        near: Mapping[tuple[str, int], tuple[float, tuple[Neighbor, ...]]] = {}
        values: dict[tuple[str, int], dict[str, float]] = {}
        for manifest in scores:
            judged = manifest.inputs.get("sample")
            if judged is None or judged.fingerprint != artifact.fingerprint:
                continue
            for place, found in _values(manifest).items():
                values.setdefault(place, {}).update(found)
            if of := _neighbors(manifest):
                near, self._training[artifact.uri] = of, manifest.inputs["shard"]
        for split in SPLITS:
            if not artifact.meta["samples"].get(split):
                continue
            shards = self._open(artifact, split)
            for row in range(len(shards)):
                p, neighbors = near.get((split, row), (None, ()))
                self.pictures.append(
                    Drawn(
                        id=len(self.pictures),
                        key=shards.key(row),
                        split=split,
                        row=row,
                        caption=" | ".join(shards.captions(row)),
                        seed=samples.config.get("seed"),
                        samples=artifact.uri,
                        run_id=samples.run_id,
                        values=values.get((split, row), {}),
                        neighbors=neighbors,
                        p=p,
                    )
                )

    def _open(self, artifact: Artifact, split: Split) -> ShardDataset:
        key = artifact.uri, split
        if key not in self._shards:
            self._shards[key] = open_shards(artifact, split=split)
        return self._shards[key]


def _manifests(folder: str) -> Iterator[Manifest]:
    """Of the artifacts in a folder, the last made first, less those that are damaged."""
    found = []
    for name in open_storage(folder).folders():
        try:
            manifest = read_manifest(join(folder, name))
        except ManifestError:
            continue
        if manifest is not None:
            found.append(manifest)
    return iter(sorted(found, key=lambda manifest: manifest.created, reverse=True))


def _values(scores: Manifest) -> dict[tuple[str, int], dict[str, float]]:
    """By split and row: the values of metrics, by their numbers less the split in them."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for number, of in read_values(scores.artifact).items():
        parts = number.split("/")
        split = next((part for part in parts if part in SPLITS), None)
        if split is not None:  # else of real pictures
            name = "/".join(part for part in parts if part != split)
            for row, value in zip(of.rows, of.values.tolist(), strict=True):
                if math.isfinite(value):
                    found.setdefault((split, row), {})[name] = value
    return found


def _neighbors(scores: Manifest) -> dict[tuple[str, int], tuple[float, tuple[Neighbor, ...]]]:
    """By split and row: what the metric `memorization` measured, empty where it was not asked for."""
    if MEMORIZATION not in {file.path for file in scores.files} or find(scores.inputs["shard"].uri) is None:
        return {}
    rows = pq.read_table(io.BytesIO(read_file(join(scores.artifact.uri, MEMORIZATION)))).to_pylist()
    return {
        (row["split"], row["row"]): (
            row["p"],
            tuple(
                Neighbor(name.removeprefix(NEAREST), value, row[DISTANCE + name.removeprefix(NEAREST)])
                for name, value in row.items()
                if name.startswith(NEAREST)
            ),
        )
        for row in rows
    }
