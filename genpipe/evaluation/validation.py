"""What the validations of several stages share: similarities of rows, and means over batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of rows, [B]."""
    return torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)


def unrelated(rows: Tensor) -> Tensor:
    """The rows in another order in which none keeps its place: a baseline of mismatched pairs."""
    return rows.roll(1, 0)


def mean_losses(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The means over all samples of per-sample losses that came in batches."""
    return {name: torch.cat([batch[name] for batch in losses]).mean().item() for name in losses[0]}
