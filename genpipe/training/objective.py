"""What a training stage gives to the loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from genpipe.data.loader import Batch, Collate

Metrics = dict[str, Tensor]


class Split(NamedTuple):
    """`length` samples, and how to make a batch of some of them.

    `collate(indices, positions)` takes int64 arrays [B]: which samples, and at which global positions of the
    training stream they stand, so that a choice (caption, crop) can depend on the position alone. With loader
    processes it is pickled. `sources` are the ranges of indices that come from each source of a mix.
    """

    length: int
    collate: Collate
    sources: Mapping[str, range] = MappingProxyType({})


class Data(NamedTuple):
    train: Split
    heldout: Split


@dataclass(frozen=True)
class Step:
    """Where in training a micro-batch stands.

    `generator` is seeded from (seed, part, global position of the micro-batch's first sample): the same
    micro-batch sees the same noise whichever rank computes it, and a resumed run needs no RNG state.
    """

    samples_seen: int
    generator: torch.Generator


@dataclass(frozen=True)
class Validation:
    """What validation found: scalars, and sample pictures (uint8, HWC) by name."""

    metrics: dict[str, float]
    images: dict[str, np.ndarray] = field(default_factory=dict)


class Objective(Protocol):
    """What one optimizer step optimizes, and nothing else.

    `trainable` maps part names to modules; each part has its own optimizer. `parts(samples_seen)` names those
    that are updated at that point, in order.
    """

    trainable: dict[str, nn.Module]

    def parts(self, samples_seen: int) -> Sequence[str]: ...

    def loss(self, part: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        """The scalar to minimize for `part`, and detached scalars to report."""
        ...

    def after_step(self) -> None:
        """Called after every optimizer step, for constraints on parameters."""
        ...

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        """Held-out metrics at fixed noise; runs in eval mode, without gradients, with the EMA weights."""
        ...
