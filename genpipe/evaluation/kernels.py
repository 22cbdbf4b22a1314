"""Maximum mean discrepancies of two sets of features, in fp64.

N real and M generated pictures, m of a subset, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genpipe.evaluation.neighbors import BLOCK, squared_distances
from genpipe.models.precision import fp32

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
"""Bandwidth and factor that CMMD is published with (Jayasumana et al. 2024)."""


def kid_estimates(drawn: Tensor, real: Tensor, *, subsets: int, size: int, generator: torch.Generator) -> Tensor:
    """fp64 [subsets]: KID of random subsets of `size` pictures of each set, drawn without replacement within a subset.

    drawn [M, D], real [N, D]. The kernel is (x y / D + 1)^3, the estimate the unbiased one of Binkowski et al. 2018, so
    that of equal distributions it is below 0 half of the time. The generator is a CPU's.
    """
    found = []
    for _ in range(subsets):
        chosen = (of[torch.randperm(len(of), generator=generator)[:size].to(of.device)] for of in (drawn, real))
        found.append(_polynomial_mmd2(*chosen))
    return torch.stack(found).cpu()


def _polynomial_mmd2(x: Tensor, y: Tensor) -> Tensor:
    """The U-statistic of two sets of equal size [m, D]: no picture is compared with itself."""
    m = len(x)
    with fp32(x.device):
        x, y = x.double(), y.double()
        own = sum(kernel.sum() - kernel.diagonal().sum() for kernel in (_cubic(x, x), _cubic(y, y)))
        return own / (m * (m - 1)) - 2 * _cubic(x, y).mean()


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def cmmd(drawn: Tensor, real: Tensor) -> float:
    """CMMD of unit embeddings [M, D] and [N, D] (Jayasumana et al. 2024): 1000 MMD^2, sigma of 10.

    As the authors' program computes it: each picture is compared with itself too, so that it is never below 0 and
    biased upwards by 1000 (1 - k) / N for each set, k being the mean kernel between two pictures of it.
    """
    own = _mean_gaussian(drawn, drawn) + _mean_gaussian(real, real)
    return CMMD_SCALE * (own - 2 * _mean_gaussian(drawn, real))


def _mean_gaussian(x: Tensor, y: Tensor) -> float:
    """The mean of exp(-|x - y|^2 / 2 sigma^2) over all pairs; `BLOCK` of them are held at a time."""
    total = 0.0
    for rows in x.split(max(1, BLOCK // len(y))):
        total += float(torch.exp(squared_distances(rows, y) / (-2 * CMMD_SIGMA**2)).sum())
    return total / (len(x) * len(y))
