"""Means and deviations by channel, measured over many batches: what latents and embeddings are standardized with."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_DEVIATION = 0.1
"""Floor under a channel's deviation, as a share of that of all channels together."""


class Moments:
    """Mean and deviation of each channel of what is added, in fp64.

    `add` takes x [B, C, ...] and, where x are the means of distributions that are sampled from, their variances: the
    deviation is then that of the samples, by the law of total variance.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # [3, C]: of x, x^2 and the variances
        self._count = 0

    def add(self, x: Tensor, *, variance: Tensor | None = None) -> None:
        """Take in x and `variance` of x's shape."""
        x = x.double()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        spread = torch.zeros_like(x) if variance is None else variance.double()
        sums = torch.stack([x.sum(axes), x.square().sum(axes), spread.sum(axes)])
        self._sums = sums if self._sums is None else self._sums + sums
        self._count += x.numel() // x.shape[1]

    def mean(self) -> list[float]:
        """Of each channel."""
        mean: list[float] = self._means()[0].tolist()
        return mean

    def std(self) -> list[float]:
        """Of each channel, never below the floor.

        The floor is `LEAST_DEVIATION` of the deviation of all channels together, which is the one number that LDM
        divides its latents by (Rombach et al. 2022, appendix G): what a channel that hardly varied here does elsewhere
        comes out at most ten times as large as there. Where nothing varies at all it is 1, as scikit-learn has it.
        """
        mean, square, spread = self._means()
        variance = (square - mean.square()).clamp(min=0) + spread
        # Differences of large squares leave rounding errors where the variance is 0.
        variance = torch.where(variance > 1e-12 * square, variance, 0.0)
        floor = LEAST_DEVIATION * variance.mean().sqrt()
        std: list[float] = variance.sqrt().clamp(min=floor if floor > 0 else 1.0).tolist()
        return std

    def _means(self) -> Tensor:
        assert self._sums is not None, "there is no deviation of nothing"
        return self._sums / self._count
