"""The seam between the loop and whatever launched it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch


class Runtime(Protocol):
    """Where this process stands among the ranks, and where its records go.

    `log` and `log_images` take host values, `log_file` reads the file before it returns; they must not block on a
    network and only rank 0 calls them. `save`
    commits a folder as the checkpoint at `samples_seen`; `latest` gives the newest checkpoint that is whole,
    as a local copy that the caller removes. `should_stop` asks for an orderly stop when metrics are next due.
    """

    rank: int
    world_size: int
    device: torch.device

    def log(self, metrics: dict[str, float], *, samples_seen: int) -> None: ...
    def log_images(self, images: dict[str, np.ndarray], *, samples_seen: int) -> None: ...
    def log_file(self, path: Path) -> None: ...
    def save(self, folder: Path, *, samples_seen: int) -> None: ...
    def latest(self) -> Path | None: ...
    def should_stop(self) -> bool: ...
