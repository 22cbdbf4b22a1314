"""What several systems drew for the same prompts: a row for each prompt, a column for each system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from genpipe.artifacts import Artifact
from genpipe.data.image_batches import image_batch
from genpipe.data.shard_dataset import ShardDataset, open_splits
from genpipe.data.shards import SPLITS
from genpipe.evaluation.captions import first_captions, rows_with_captions
from genpipe.evaluation.grids import hwc, labeled_grid

CELL = 128
LOOKED_AT = 4096
"""Pictures of the first system among which prompts are looked for."""


def side_by_side(samples: Mapping[str, Artifact], *, rows: int) -> np.ndarray | None:
    """uint8 [H, W, 3]: the first picture of each of the first `rows` prompts that all have of each split.

    `samples` are by the title of their column. None where they have no prompt in common.
    """
    opened = {title: open_splits(artifact) for title, artifact in samples.items()}
    captions: list[str] = []
    columns: dict[str, list[np.ndarray]] = {title: [] for title in opened}
    for split in SPLITS:
        if all(split in datasets for datasets in opened.values()):
            of_split = [datasets[split] for datasets in opened.values()]
            prompts = _common(of_split, rows=rows)
            captions += [f"{prompt} ({'held out' if split == 'heldout' else 'trained on'})" for prompt in prompts]
            for column, dataset in zip(columns.values(), of_split, strict=True):
                column += _pictures(dataset, prompts)
    if not captions:
        return None
    cell = max(CELL, *(len(picture) for column in columns.values() for picture in column[:1]))
    pictures = list(zip(*columns.values(), strict=True))
    return labeled_grid(pictures, captions=captions, columns=list(columns), cell=cell)


def _common(datasets: Sequence[ShardDataset], *, rows: int) -> list[str]:
    """The first prompts of the first system that all others drew, too."""
    first, *others = datasets
    prompts = list(dict.fromkeys(first_captions(first, range(min(len(first), LOOKED_AT)))))
    for dataset in others:
        _, found = rows_with_captions(dataset, prompts)
        drawn = set(found.tolist())
        prompts = [prompt for number, prompt in enumerate(prompts) if number in drawn]
    return prompts[:rows]


def _pictures(dataset: ShardDataset, prompts: Sequence[str]) -> list[np.ndarray]:
    """uint8 [S, S, 3]: the first picture of each prompt, its center if it is not square."""
    if not prompts:
        return []
    rows, numbers = rows_with_captions(dataset, prompts)
    first = np.asarray([rows[numbers == number][0] for number in range(len(prompts))])
    return hwc(image_batch(dataset, first, size=min(dataset.image(0).shape[:2])))
