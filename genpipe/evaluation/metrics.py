"""Metrics as functions on features and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, [B]; both [B, ...] in [-1, 1] (so the peak is 2).

    Equal images give 100 dB, the cap: a mean error of 2e-5 of the range is below any display.
    """
    mse = (images.float().clamp(-1, 1) - reference.float()).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / mse.clamp(min=1e-30))).clamp(max=100.0)


def retrieval_ranks(queries: Tensor, pool: Tensor, target: Tensor) -> Tensor:
    """How many of the pool are more similar to each query than its own, int64 [B]; 0 is a first place.

    queries [B, D] and pool [N, D] are unit vectors, target [B] the pool's row that belongs to each query. Entries
    that tie with the own one count as ahead of it, so that a constant embedding scores worst and not best.
    """
    similarity = queries.float() @ pool.float().T
    own = similarity.gather(1, target[:, None])
    return (similarity >= own).sum(1) - 1


def recall_at(ranks: Tensor, k: int) -> float:
    """The share of queries whose own is among the first k."""
    return (ranks < k).float().mean().item()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of rows, [B]."""
    return torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)


def unrelated(rows: Tensor) -> Tensor:
    """The rows in another order in which none keeps its place: a baseline of mismatched pairs."""
    return rows.roll(1, 0)


def mean_losses(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The means over all samples of per-sample losses that came in batches."""
    return {name: torch.cat([batch[name] for batch in losses]).mean().item() for name in losses[0]}
