"""A source that draws its pictures: a few colored shapes with captions that are exactly right (`data.shape_scenes`)."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from genpipe.config import Config
from genpipe.data.samples import Reject, Sample
from genpipe.data.shape_scenes import TASKS, Task, askable, caption_of, render, scene_of, subject_of
from genpipe.data.sources.listing import part_names

DRAWING = 1
"""Goes up whenever the same seed draws other pictures."""


class ShapesConfig(Config):
    """Pictures of one to four shapes whose captions name shapes, colors, numbers or places; as many of every task.

    Captions that mean the same are one group, so that those of held-out samples were never trained on.
    """

    kind: Literal["shapes"]
    count: int = Field(6000, ge=1, description="pictures")
    size: int = Field(64, ge=32, le=1024, description="side of the pictures, in pixels")
    tasks: tuple[Task, ...] = Field(TASKS, min_length=1, description="what captions ask for, in turn")
    seed: int = Field(0, ge=0, description="of captions and pictures")


class ShapesSource:
    """Every picture follows from the seed and its number alone."""

    def __init__(self, cfg: ShapesConfig, *, part_size: int) -> None:
        self.cfg, self.part_size = cfg, part_size

    def parts(self) -> list[str]:
        """`00000`, `00001`, ...: of `part_size` pictures each."""
        return part_names(-(-self.cfg.count // self.part_size))

    def read(self, part: str) -> Iterator[Sample | Reject]:
        """Draw the pictures of a part, as PNG."""
        first = int(part) * self.part_size
        for number in range(first, min(first + self.part_size, self.cfg.count)):
            yield self.sample(number)

    def sample(self, number: int) -> Sample:
        """The picture of a number."""
        rng = np.random.default_rng([self.cfg.seed, number])
        task = self.cfg.tasks[number % len(self.cfg.tasks)]
        every = askable(task)
        asked = every[rng.integers(len(every))]
        file = io.BytesIO()
        Image.fromarray(render(scene_of(asked, rng), size=self.cfg.size)).save(file, "PNG")
        return Sample(f"{number:08d}", subject_of(asked), file.getvalue(), (caption_of(asked),), {"task": task})

    def classes(self) -> tuple[str, ...]:
        """None."""
        return ()

    def digest(self) -> str:
        """sha256 of the configuration, and of how it is drawn."""
        identity = {"drawing": DRAWING, "config": self.cfg.model_dump(mode="json")}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
