"""Generated pictures beside the real ones that have their captions, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from genpipe.artifacts import Artifact, Role, committed
from genpipe.config import Config
from genpipe.data.image_batches import image_batch
from genpipe.data.shards import Split
from genpipe.evaluation.captions import check_captions, first_captions, rows_with_captions
from genpipe.evaluation.grids import hwc, labeled_grid
from genpipe.evaluation.metrics.metric import REFERENCE, SAMPLE, Evaluation, Measure, Partial
from genpipe.evaluation.reference import open_splits
from genpipe.storage import Storage

FILES: dict[Split, str] = {"train": "grid.png", "heldout": "heldout.png"}
EXAMPLES: dict[Split, str] = {"train": "training example", "heldout": "held-out example"}
CELL = 96
LOOKED_AT = 4096
"""Generated pictures among which the first distinct prompts are found."""


class GridConfig(Config):
    """`grid.png`, pictures of captions of training samples, and `heldout.png`, of others: a row for each caption."""

    kind: Literal["grid"] = "grid"
    captions: tuple[str, ...] = Field((), description="of grid.png; default: the first `rows` that were drawn")
    rows: int = Field(12, ge=1, description="captions of a picture whose captions are not named")
    each: int = Field(1, ge=1, description="generated pictures of each caption, as far as there are so many")

    def roles(self) -> dict[str, Role]:
        """Pictures and the reference."""
        return {**SAMPLE, **REFERENCE}

    def names(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """None: it is for people."""
        return []

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Raise ValueError for a caption that the data, or the pictures, do not have, once there are any."""
        for role in ("shard", "sample") if self.captions else ():
            if committed(inputs[role]) is not None and (splits := open_splits(inputs[role])):
                check_captions(
                    next(iter(splits.values())), self.captions, setting=f"metrics.grid.captions (role {role})"
                )

    def parts(self, evaluation: Evaluation) -> list[str]:
        """One for each split of the pictures."""
        return list(evaluation.samples)

    def measure(self, evaluation: Evaluation) -> Measure:
        """Draws one picture a part."""

        def drawn(part: str, out: Path) -> Partial:
            split: Split = "train" if part == "train" else "heldout"
            Image.fromarray(self._picture(split, evaluation)).save(out / FILES[split])
            return {}

        return drawn

    def merge(self, partials: Sequence[Partial], files: Storage) -> dict[str, float]:
        """Nothing to count."""
        return {}

    def _picture(self, split: Split, evaluation: Evaluation) -> np.ndarray:
        """uint8 [H, W, 3]."""
        size, reference = evaluation.size, evaluation.reference
        prompts, rows = self._chosen(split, evaluation)
        columns = {}
        positions = np.asarray([places[0] for places in rows])
        originals = reference.match(prompts).originals(positions, within=reference.range_of(split))
        if (originals >= 0).any():
            real = hwc(reference.images(np.maximum(originals, 0), size=size))
            columns[EXAMPLES[split]] = [
                image if row >= 0 else np.full_like(image, 255) for image, row in zip(real, originals, strict=True)
            ]
        for number in range(max(len(places) for places in rows)):
            chosen = np.asarray([places[min(number, len(places) - 1)] for places in rows])
            images = hwc(image_batch(evaluation.samples[split], chosen, size=size))
            columns["generated" if number == 0 else f"generated ({number + 1})"] = [
                image if number < len(places) else np.full_like(image, 255)
                for image, places in zip(images, rows, strict=True)
            ]
        cells = list(zip(*columns.values(), strict=True))
        return labeled_grid(cells, captions=prompts, columns=list(columns), cell=max(CELL, size))

    def _chosen(self, split: Split, evaluation: Evaluation) -> tuple[list[str], list[list[int]]]:
        """The captions, and the generated pictures of each."""
        dataset = evaluation.samples[split]
        first = next(iter(evaluation.samples))
        prompts = list(dict.fromkeys(self.captions)) if split == first else []
        if not prompts:
            prompts = list(dict.fromkeys(first_captions(dataset, range(min(len(dataset), LOOKED_AT)))))[: self.rows]
        samples, numbers = rows_with_captions(dataset, prompts)
        return prompts, [samples[numbers == number][: self.each].tolist() for number in range(len(prompts))]
