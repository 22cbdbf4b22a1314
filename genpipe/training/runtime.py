"""The seam between the loop and whatever launched it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch


class Runtime(Protocol):
    """Where this process stands among the ranks, and where its records go.

    Only rank 0 logs, and logging must not block on a network.
    """

    rank: int
    world_size: int
    device: torch.device

    def log(self, metrics: dict[str, float], *, samples_seen: int) -> None:
        """Record host values by name."""
        ...

    def log_images(self, images: dict[str, np.ndarray], *, samples_seen: int) -> None:
        """Record pictures (uint8, HWC) by name."""
        ...

    def log_file(self, path: Path) -> None:
        """Record a file under its own name; it is read before this returns."""
        ...

    def log_environment(self, facts: dict[str, str]) -> None:
        """Record what this run found out about its machine, in the run and in the artifact's manifest."""
        ...

    def save(self, folder: Path, *, samples_seen: int) -> None:
        """Commit a folder as the checkpoint at `samples_seen`."""
        ...

    def latest(self) -> Path | None:
        """A local copy, which the caller removes, of the newest intact checkpoint; None if there is none."""
        ...

    def rewind(self, *, samples_seen: int) -> None:
        """Forget the checkpoints beyond `samples_seen`, or all but the oldest if all are beyond it."""
        ...

    def should_stop(self) -> bool:
        """Whether to stop, with a checkpoint, when metrics are next due."""
        ...
