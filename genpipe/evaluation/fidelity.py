"""How close pictures are to others: of each to its original, and of one set to another.

B images, C channels; images are in [-1, 1]. N samples of a set, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from genpipe.models.precision import fp32

SSIM_WINDOW = 11
"""Pixels that one place of SSIM looks at, along each axis: the smallest side it is defined for."""


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, [B]; both [B, ...] in [-1, 1] (so the peak is 2).

    Equal images give 100 dB, the cap: a mean error of 2e-5 of the range is below any display.
    """
    mse = (images.float().clamp(-1, 1) - reference.float()).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / mse.clamp(min=1e-30))).clamp(max=100.0)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image, [B], 1 for equal ones (Wang et al. 2004, eq. 13, averaged as in eq. 17).

    Both [B, C, H, W], sides at least 11. Gaussian window of deviation 1.5, K = (0.01, 0.03), channel by channel, over
    the places where the window lies within the image.
    """
    channels = images.shape[1]
    x, y = images.float().clamp(-1, 1), reference.float()
    offsets = torch.arange(SSIM_WINDOW, device=x.device) - SSIM_WINDOW // 2
    bell = torch.softmax(-0.5 * (offsets / 1.5) ** 2, dim=0)
    window = torch.outer(bell, bell).expand(channels, 1, -1, -1)
    with fp32(x.device):
        moments = F.conv2d(torch.cat([x, y, x * x, y * y, x * y]), window, groups=channels)
    mean_x, mean_y, square_x, square_y, product = moments.chunk(5)
    c1, c2 = (2 * 0.01) ** 2, (2 * 0.03) ** 2
    spread = square_x - mean_x**2 + square_y - mean_y**2
    likeness = (2 * mean_x * mean_y + c1) * (2 * (product - mean_x * mean_y) + c2)
    return (likeness / ((mean_x**2 + mean_y**2 + c1) * (spread + c2))).flatten(1).mean(1)


class Moments(Protocol):
    """The mean [D] and the covariance [D, D] of a set's features."""

    @property
    def mean(self) -> Tensor:
        """[D]."""
        ...

    @property
    def covariance(self) -> Tensor:
        """[D, D]."""
        ...


@dataclass(frozen=True)
class StoredMoments:
    """Moments as they are published, `mu` and `sigma` of an FID's statistics: fp64."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class FeatureMoments:
    """Sums in fp64 over the features of a set, in memory that does not grow with it. Parts of a set are added."""

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Of features [N, D]."""
        wide = features.double()
        return cls(len(wide), wide.sum(0), wide.T @ wide)

    def __add__(self, other: FeatureMoments) -> FeatureMoments:
        return FeatureMoments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        """[D]."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """[D, D], of a sample (divided by N - 1). Raises ValueError for fewer than two."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two samples at least, got {self.count}")
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(one: Moments, other: Moments) -> float:
    """Squared Frechet distance of the Gaussians of two sets (Heusel et al. 2017, eq. 6): FID on Inception's features.

    It is biased upwards by about 1/N: compare only at equal N, and say N. The trace of (S1 S2)^(1/2) is taken from the
    symmetric S1^(1/2) S2 S1^(1/2), so that nothing turns complex where covariances are singular, as they are with
    fewer samples than features. Raises ValueError for a set of one.
    """
    covariances = [moments.covariance.double().cpu() for moments in (one, other)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = values.clamp(min=0).sqrt()[:, None] * vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root.T).clamp(min=0).sqrt().sum()
    means = (one.mean.double().cpu() - other.mean.double().cpu()).square().sum()
    return max(0.0, float(means + torch.trace(covariances[0]) + torch.trace(covariances[1]) - 2 * cross))
