"""What networks say of pictures, in files of one part each: computed once for all metrics that want the same.

B pictures of a part, N of a set, D features.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from genpipe.artifacts import Artifact, Role
from genpipe.data.order import order
from genpipe.data.shards import SPLITS, Split
from genpipe.evaluation.captions import first_captions
from genpipe.evaluation.fidelity import FeatureMoments
from genpipe.evaluation.metrics.feature_networks import AnyNetwork, Encode, key_of
from genpipe.evaluation.metrics.metric import Evaluation, Partial, part_of
from genpipe.evaluation.reference import check_matched
from genpipe.storage import Storage

FOLDER = "features"
Of = Literal["sample", "originals"] | Split
"""`sample`: the generated pictures; `originals`: for each a real one with its caption; or a split of the reference."""
Wanted = Of | Literal["reference"]
"""`reference`: all splits of it that there are."""


class FeatureSet(NamedTuple):
    """What a network says of some pictures."""

    network: AnyNetwork
    of: Wanted


@runtime_checkable
class FeatureMetric(Protocol):
    """The settings of a metric on features: other than a `Metric` it has no parts of its own, but names sets."""

    @property
    def kind(self) -> str:
        """The metric's name in the union, and by default in the results."""
        ...

    def roles(self) -> dict[str, Role]:
        """What it takes; never a role that another metric takes otherwise."""
        ...

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """The numbers that it gives, as far as they are known before: patterns of `fnmatch`."""
        ...

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Raise ValueError where inputs do not fit, those that are only planned by their `meta` alone."""
        ...

    def sets(self) -> Sequence[FeatureSet]:
        """The features that it reads."""
        ...

    def check(self, evaluation: Evaluation) -> None:
        """Raise ValueError for pictures that do not fit, before any feature is computed."""
        ...

    def score(self, features: Features, evaluation: Evaluation, out: Path) -> dict[str, float]:
        """The numbers; files for people go into `out`. Features of one part are in memory at a time, or as many
        pictures as the settings say."""
        ...


def parts_of_sets(sets: Iterable[FeatureSet], evaluation: Evaluation) -> list[str]:
    """Parts of all sets, each once: `KEY OF SPLIT FIRST STOP`. Raises ValueError for a split that there is not."""
    named = [f"{key_of(network)} {part}" for network, of in sets for part in _parts_of(of, evaluation)]
    return list(dict.fromkeys(named))


def _parts_of(of: Wanted, evaluation: Evaluation) -> Iterator[str]:
    if of == "reference":
        for split in evaluation.reference.ranges:
            yield from _parts_of(split, evaluation)
    elif of == "sample" or of == "originals":
        yield from (f"{of} {part}" for part in evaluation.sample_parts())
    else:
        yield from (f"{of} {part}" for part in _reference_parts(of, evaluation))


def _reference_parts(split: Split, evaluation: Evaluation) -> list[str]:
    length = len(evaluation.reference.range_of(split))
    if not length:
        raise ValueError(f"metrics: the reference (role shard) has no {split} split, which one of them is to read")
    return evaluation.parts_of(split, length)


class FeatureWorker:
    """Computes parts of sets, several at a time; a network is loaded at the first part of it.

    Whoever has `turn` has the device: the threads of other parts read and decode meanwhile.
    """

    def __init__(self, networks: Iterable[AnyNetwork], evaluation: Evaluation) -> None:
        self.turn = threading.Lock()
        self.networks = {key_of(network): network for network in networks}
        self.evaluation = evaluation
        self.loaded: dict[str, Encode] = {}

    @torch.no_grad()
    def __call__(self, part: str, out: Path) -> Partial:
        """Write the features of a part; how many pictures there are of which set."""
        key, of, rest = part.split(" ", 2)
        split, rows = part_of(rest)
        network = self.networks[key]
        with self.turn:
            if key not in self.loaded:
                self.loaded[key] = network.load(self.evaluation)
        (folder := out / FOLDER / key).mkdir(parents=True, exist_ok=True)
        size, encode = network.reads_at(self.evaluation), self.loaded[key]
        features = []
        for images in self._pictures(of, split, rows, size=size):
            with self.turn:
                features.append(encode(images))
        save_features(folder / f"{of}-{split}-{rows.start:09d}.npy", features)
        return {"key": key, "of": of, "split": split, "pictures": len(rows), "size": size}

    def _pictures(self, of: str, split: Split, rows: range, *, size: int) -> Iterator[Tensor]:
        if of == "sample":
            return (self.evaluation.pictures(split, batch, size=size) for batch in self.evaluation.batches(rows))
        if of == "originals":
            real = originals_of(self.evaluation, split, rows)
        else:
            real = np.asarray(rows, np.int64) + self.evaluation.reference.range_of(split).start
        places = self.evaluation.batches(range(len(rows)))
        return (self.evaluation.originals(real[batch], size=size) for batch in places)


def originals_of(evaluation: Evaluation, split: Split, rows: range) -> np.ndarray:
    """int64 [B]: for each generated picture a real one that has its caption. Raises ValueError where none has."""
    prompts = first_captions(evaluation.samples[split], rows)
    matches = evaluation.reference.match(prompts)
    found = matches.originals(np.asarray(rows), within=evaluation.reference.range_of(split))
    check_matched(found, prompts, setting="metrics")
    return found


@dataclass(frozen=True)
class Features:
    """The features that were computed, read from their files; `counts` is what the parts found."""

    files: Storage
    counts: Sequence[Partial]

    def splits(self, network: AnyNetwork, of: Of = "sample") -> list[Split]:
        """Those that a set has pictures of."""
        return [split for split in SPLITS if self.count(network, of, split)]

    def count(self, network: AnyNetwork, of: Of, split: Split) -> int:
        """N of a split of a set."""
        place = (key_of(network), of, split)
        return sum(c["pictures"] for c in self.counts if (c["key"], c["of"], c["split"]) == place)

    def blocks(self, network: AnyNetwork, of: Of, split: Split) -> Iterator[tuple[int, Tensor]]:
        """fp32 [B, D] of one part after the other, in order, each with the row of its first."""
        prefix = f"{FOLDER}/{key_of(network)}/{of}-{split}-"
        for key in sorted(entry.key for entry in self.files.list(prefix)):
            array = np.load(io.BytesIO(self.files.read(key)), allow_pickle=False)
            yield int(key.removeprefix(prefix).removesuffix(".npy")), torch.from_numpy(array)

    def moments(self, network: AnyNetwork, of: Of, split: Split) -> FeatureMoments:
        """Of all features of a split; one part is in memory at a time."""
        return reduce(add, (FeatureMoments.of(block) for _, block in self.blocks(network, of, split)))

    def chosen(self, network: AnyNetwork, of: Of, split: Split, *, most: int) -> Tensor:
        """fp32 [min(N, most), D]: features of pictures that are chosen at random, always the same."""
        return self.rows(network, of, split, chosen_rows(self.count(network, of, split), most=most))

    def rows(self, network: AnyNetwork, of: Of, split: Split, rows: np.ndarray) -> Tensor:
        """fp32 [B, D] of these rows, int64 [B] in rising order."""
        found = []
        for first, block in self.blocks(network, of, split):
            start, stop = np.searchsorted(rows, (first, first + len(block)))
            found.append(block[torch.from_numpy(rows[start:stop] - first)])
        return torch.cat(found)

    def protocol(self, networks: Iterable[AnyNetwork], inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        """What others need to measure the same, by network: its digest, the resizing, how many pictures."""
        described = {}
        for network in networks:
            own = [c for c in self.counts if c["key"] == key_of(network)]
            totals: dict[str, int] = {}
            for count in own:
                name = f"{count['of']}/{count['split']}"
                totals[name] = totals.get(name, 0) + count["pictures"]
            sizes = {"read_at": own[0]["size"], "pictures": totals}
            described[key_of(network)] = {**network.protocol(inputs), **sizes}
        return described


def chosen_rows(count: int, *, most: int) -> np.ndarray:
    """int64 [min(count, most)], rising: which of `count` rows are chosen at random, always the same."""
    return np.sort(order(np.arange(min(count, most)), n=count, seed=0))


def save_features(path: Path, batches: Iterable[Tensor]) -> None:
    """Write the features of a part, batches [B, D] of them, as a .npy file. Raises ValueError for infinite ones."""
    array = np.concatenate([batch.float().cpu().numpy() for batch in batches])
    if not np.isfinite(array).all():
        raise ValueError(
            f"{path.parent.name}: the network gave features that are not finite; look at its inputs' range"
        )
    np.save(path, array)


def moments_of_files(files: Storage, prefix: str) -> FeatureMoments:
    """Of the features in all files whose names begin so; one of them is in memory at a time."""
    arrays = (np.load(io.BytesIO(files.read(entry.key)), allow_pickle=False) for entry in files.list(prefix))
    return reduce(add, (FeatureMoments.of(torch.from_numpy(array)) for array in arrays))
