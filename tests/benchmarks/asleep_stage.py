"""The features stage with encoders that sleep: a process whose accelerator works waits and leaves its cores to others.

The stats of a part have when its worker has slept so far: `asleep`, [start, end] in seconds, in order.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor

from genpipe.artifacts import Artifact
from genpipe.stages import features
from genpipe.stages.features import HEADLINES, MAKES, VERSION, Captions, check_inputs, finalize, parts, roles

__all__ = ["HEADLINES", "MAKES", "VERSION", "Config", "Worker", "check_inputs", "finalize", "parts", "roles"]

WIDTH = 512


class Config(features.Config):
    seconds: float = Field(0.1, description="for which the encoders work on a batch")


class Worker(features.Worker):
    def __init__(self, cfg: Config, inputs: Mapping[str, Artifact]) -> None:
        super().__init__(cfg, inputs)
        self.seconds = cfg.seconds
        self.asleep: list[tuple[float, float]] = []

    def __call__(self, part: str, out: Path) -> dict[str, Any]:
        return {**super().__call__(part, out), "asleep": list(self.asleep)}

    def _encoded(self, images: Sequence[Tensor]) -> dict[str, np.ndarray]:
        self._sleep()
        return {"image_embeds": np.zeros((len(images[0]), 1, WIDTH), np.float16)}

    def _text(self, captions: Captions) -> dict[str, np.ndarray]:
        self._sleep()
        count = len(captions.texts)
        encodings = np.zeros((8 * count, WIDTH), np.float16)
        return {"text_encodings": encodings, "text_embeds": encodings[:count], "lengths": np.full(count, 8)}

    def _sleep(self) -> None:
        began = time.monotonic()
        time.sleep(self.seconds)
        self.asleep.append((began, time.monotonic()))
