"""The pictures that generated ones are measured against, and which of them have a prompt among their captions.

B pictures, M matches, n samples of a chunk. The samples of a reference are numbered through: training ones first,
then the held-out ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genpipe.data.image_batches import image_batch
from genpipe.data.order import uniform
from genpipe.data.shard_dataset import ShardDataset
from genpipe.data.shards import NO_LABEL, Split
from genpipe.evaluation.captions import rows_with_captions

_ORIGINAL = 0x5851F42D4C957F2D  # keeps its draws apart from others at the same position


@dataclass(frozen=True)
class Matches:
    """The samples of a reference that have the prompts of B pictures among their captions.

    `prompt` int64 [B] numbers the distinct prompts; `rows` and `prompts`, int64 [M], are the samples, in order, and
    the prompt that each has.
    """

    prompt: np.ndarray
    rows: np.ndarray
    prompts: np.ndarray

    def own(self, chunk: range) -> Tensor:
        """bool [B, n]: which samples of a chunk have the prompt of each picture."""
        first, stop = np.searchsorted(self.rows, (chunk.start, chunk.stop))
        has = torch.zeros(int(self.prompt.max()) + 1, len(chunk), dtype=torch.bool)
        has[torch.from_numpy(self.prompts[first:stop]), torch.from_numpy(self.rows[first:stop] - chunk.start)] = True
        return has[torch.from_numpy(self.prompt)]

    def originals(self, positions: np.ndarray, *, within: range) -> np.ndarray:
        """int64 [B]: a sample that has the prompt of each picture, -1 where none has.

        Of several one is drawn by the picture's position, one of those `within` if there are such.
        """
        inside = (self.rows >= within.start) & (self.rows < within.stop)
        count = int(self.prompt.max()) + 1
        inner, every = (np.bincount(self.prompts[mask], minlength=count) for mask in (inside, inside | True))
        by_prompt = self.rows[np.lexsort((~inside, self.prompts))]
        starts = np.cumsum(every) - every
        choices = np.where(inner, inner, every)[self.prompt]
        drawn = (uniform(positions, seed=0, salt=_ORIGINAL) * choices).astype(np.int64)
        places = np.where(choices, starts[self.prompt] + drawn, 0)
        return np.where(choices, by_prompt[places] if len(by_prompt) else 0, -1)


class Reference:
    """Shards as one row of samples."""

    def __init__(self, datasets: Mapping[Split, ShardDataset]) -> None:
        self.datasets = dict(datasets)
        self.ranges: dict[Split, range] = {}
        start = 0
        for split, dataset in self.datasets.items():
            self.ranges[split] = range(start, start + len(dataset))
            start += len(dataset)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.ranges.values())

    def range_of(self, split: Split) -> range:
        """The samples of a split; empty if it has none."""
        return self.ranges.get(split, range(0))

    def gather(self, rows: np.ndarray, read: Callable[[Split, np.ndarray], Tensor]) -> Tensor:
        """[B, ...]: what `read` gives of each split's own indices, in the order of `rows` [B]."""
        order, parts = [], []
        for split, here in self.ranges.items():
            [at] = np.nonzero((rows >= here.start) & (rows < here.stop))
            if len(at):
                order.append(at)
                parts.append(read(split, rows[at] - here.start))
        return torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(order)))]

    def images(self, rows: np.ndarray, *, size: int) -> Tensor:
        """uint8 [B, 3, size, size]: the centers of these images."""
        return self.gather(rows, lambda split, own: image_batch(self.datasets[split], own, size=size))

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """int64 [B]: the places of these samples' classes in the list `classes` of the artifact's meta, -1 for none."""
        if not len(rows):
            return np.zeros(0, np.int64)
        labels = self.gather(rows, lambda split, own: torch.from_numpy(self.datasets[split].labels(own)))
        return np.asarray(labels.numpy())

    def class_counts(self) -> np.ndarray:
        """int64 [classes]: how many samples there are of each class, up to the last that has some."""
        counts = np.zeros(1, np.int64)
        for dataset in self.datasets.values():
            for shard in dataset.shards():
                labels = dataset.labels(np.asarray(dataset.rows(shard)))
                here = np.bincount(labels[labels != NO_LABEL], minlength=len(counts))
                here[: len(counts)] += counts
                counts = here
        return counts

    def match(self, prompts: Sequence[str]) -> Matches:
        """Where the prompts of B pictures are captions; one pass over the captions of the reference."""
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        found = [
            (rows + here.start, having)
            for here, dataset in zip(self.ranges.values(), self.datasets.values(), strict=True)
            for rows, having in [rows_with_captions(dataset, list(numbers))]
        ]
        rows, having = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return Matches(np.asarray([numbers[prompt] for prompt in prompts], np.int64), rows, having)


def check_matched(originals: np.ndarray, prompts: Sequence[str], *, setting: str) -> None:
    """Raise ValueError if a picture's prompt is no caption of the reference (-1 among `originals`)."""
    if (without := np.flatnonzero(originals < 0)).size:
        raise ValueError(
            f"{setting}: {without.size} of {len(prompts)} prompts, the first {prompts[without[0]]!r}, are not captions "
            "of the reference (role shard); draw samples of its captions, or map the shards that the prompts are from"
        )
