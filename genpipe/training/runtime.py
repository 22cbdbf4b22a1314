"""The seam between the loop and whatever launched it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from genpipe.training.averages import AverageStore
from genpipe.training.checkpoint_store import CheckpointStore
from genpipe.training.handover import HandOverStore

Phase = Literal[
    "start", "compile", "data", "forward", "backward", "optimizer", "validation", "checkpoint", "export", "end"
]
"""What a rank is busy with. The pass through a micro-batch and the update are quick; all others may take their time."""


class Runtime(Protocol):
    """Where this process stands among the ranks, and where its records go.

    Only rank 0 logs, and logging must not block on a network.
    """

    rank: int
    world_size: int
    device: torch.device
    checkpoints: CheckpointStore
    """The checkpoints of this training, and this rank's way to put one there."""

    averages: AverageStore
    """The averages of this training that are kept, and rank 0's way to keep one."""

    handovers: HandOverStore
    """Averages of this training that a process beside the ranks validates, if there is one, and what it finds."""

    round_seconds: float
    """How long ranks go on before they tell one another of stops and checkpoints that are due; 0: every step."""

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

    def log_event(self, message: str, *, samples_seen: int) -> None:
        """Record something out of the ordinary that people should know of. Any thread may call it."""
        ...

    def should_stop(self) -> bool:
        """Whether to stop, with a checkpoint, after this step. Asked at every step, so it must cost nothing."""
        ...

    def enter(self, phase: Phase) -> None:
        """Take note of what this rank begins to do, so that one that hangs can be told from one that works.

        All ranks enter the same phases in the same order. Called several times a step, so it must cost nothing.
        """
        ...
