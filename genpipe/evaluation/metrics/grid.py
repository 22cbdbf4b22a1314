"""Generated pictures beside the real ones that have their captions, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from genpipe.artifacts import Artifact, Role
from genpipe.config import Config
from genpipe.data.image_batches import image_batch
from genpipe.data.shard_dataset import ShardDataset, open_splits
from genpipe.data.shards import SPLITS, Split
from genpipe.evaluation.captions import first_captions, rows_with_captions
from genpipe.evaluation.grids import beside, hwc, labeled_grid
from genpipe.evaluation.metrics.metric import REFERENCE, SAMPLE, Evaluation, Measure, Partial
from genpipe.storage import Storage

CHOSEN = "grid_sample"
FILE = "grid.png"
TITLES: dict[Split, str] = {"train": "trained on", "combinations": "unseen combinations", "heldout": "held out"}
EXAMPLES: dict[Split, str] = {
    "train": "training example",
    "combinations": "held-out example",
    "heldout": "held-out example",
}
CELL = 96
LOOKED_AT = 4096
"""Generated pictures among which the first distinct prompts are found."""


class GridConfig(Config):
    """`grid.png`: a row for each caption, those of each split beside those of the others, under its name.

    They are the first captions of the samples, or those of the role `grid_sample` where that has some of a split: its
    own instance of `sample` can draw captions that the configuration names.
    """

    kind: Literal["grid"] = "grid"
    rows: int = Field(12, ge=1, description="captions of each split")
    each: int = Field(1, ge=1, description="generated pictures of each caption, as far as there are so many")

    def roles(self) -> dict[str, Role]:
        """Pictures, chosen ones perhaps, and the reference."""
        return {**SAMPLE, **REFERENCE, CHOSEN: Role("samples", optional=True)}

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """None: it is for people."""
        return []

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Any pictures can be shown."""

    def parts(self, evaluation: Evaluation) -> list[str]:
        """One: it is a single picture."""
        return ["picture"]

    def measure(self, evaluation: Evaluation) -> Measure:
        """Makes the picture."""

        def drawn(part: str, out: Path) -> Partial:
            shown = _shown(evaluation).items()
            Image.fromarray(beside([self._picture(*of, evaluation) for of in shown])).save(out / FILE)
            return {}

        return drawn

    def merge(self, partials: Sequence[Partial], files: Storage) -> dict[str, float]:
        """Nothing to count."""
        return {}

    def _picture(self, split: Split, dataset: ShardDataset, evaluation: Evaluation) -> np.ndarray:
        """uint8 [H, W, 3]."""
        looked_at = range(min(len(dataset), LOOKED_AT))
        prompts = list(dict.fromkeys(first_captions(dataset, looked_at)))[: self.rows]
        samples, numbers = rows_with_captions(dataset, prompts)
        generated = [samples[numbers == number][: self.each].tolist() for number in range(len(prompts))]
        size = min(dataset.image(0).shape[:2])
        columns = dict(_real(split, prompts, generated, evaluation, size=size))
        for number in range(max(map(len, generated))):
            there = [number < len(rows) for rows in generated]
            images = image_batch(
                dataset, np.asarray([rows[min(number, len(rows) - 1)] for rows in generated]), size=size
            )
            columns["generated" if number == 0 else f"generated ({number + 1})"] = _blanked(hwc(images), there)
        rows = list(zip(*columns.values(), strict=True))
        return labeled_grid(rows, captions=prompts, columns=list(columns), cell=max(CELL, size), title=TITLES[split])


def _shown(evaluation: Evaluation) -> dict[Split, ShardDataset]:
    """The generated pictures of each split, in the order of SPLITS: the chosen ones where there are some."""
    chosen = open_splits(evaluation.inputs[CHOSEN]) if CHOSEN in evaluation.inputs else {}
    every = {**evaluation.samples, **chosen}
    return {split: every[split] for split in SPLITS if split in every}


def _real(
    split: Split, prompts: Sequence[str], generated: Sequence[Sequence[int]], evaluation: Evaluation, *, size: int
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """The column of real pictures, if any of the prompts is a caption of the reference."""
    reference = evaluation.reference
    positions = np.asarray([rows[0] for rows in generated])
    originals = reference.match(prompts).originals(positions, within=reference.range_of(split))
    if (originals >= 0).any():
        images = hwc(reference.images(np.maximum(originals, 0), size=size))
        yield EXAMPLES[split], _blanked(images, (originals >= 0).tolist())


def _blanked(images: Sequence[np.ndarray], there: Sequence[bool]) -> list[np.ndarray]:
    """White where there is no picture."""
    return [image if is_there else np.full_like(image, 255) for image, is_there in zip(images, there, strict=True)]
