"""What a training stage gives to the loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from genpipe.data.loader import Batch
from genpipe.stage_config import Observe
from genpipe.training.checkpoint_store import KeepBest

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """Where in training a micro-batch stands.

    `generator` is seeded from (seed, name, global position of the micro-batch's first sample): the same
    micro-batch sees the same noise whichever rank computes it, and a resumed run needs no RNG state.
    """

    samples_seen: int
    generator: torch.Generator


@dataclass(frozen=True)
class Validation:
    """What validation found: scalars, and sample pictures (uint8, HWC) by name."""

    metrics: dict[str, float]
    images: dict[str, np.ndarray] = field(default_factory=dict)


class ObserveTraining(Observe):
    """How a training stage is watched."""

    log_every: int = Field(20, ge=1, description="steps between metrics")
    validate_every: int = Field(0, ge=0, description="samples between validations; 0: at the end only")
    heldout_samples: int = Field(256, ge=1, description="held-out samples of one validation")
    keep_best: KeepBest | None = Field(
        None, description="keep the best checkpoint, too, by this held-out metric; each validation is followed by one"
    )


class Objective(Protocol):
    """What one optimizer step optimizes, and nothing else."""

    trainable: dict[str, nn.Module]
    """The modules that are trained, by name; each has its own optimizer."""

    def active(self, samples_seen: int) -> Sequence[str]:
        """The names of those that are updated at this point of training, in order."""
        ...

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        """The scalar to minimize for the module `name`, and detached scalars to report."""
        ...

    def after_step(self) -> None:
        """Called after every optimizer step, for constraints on parameters."""
        ...

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        """Held-out metrics at fixed noise; runs in eval mode, without gradients, with the EMA weights."""
        ...
