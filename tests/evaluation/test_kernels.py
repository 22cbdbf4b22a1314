"""Kernel distances against sums written out, and against their values for Gaussians."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from torch import Tensor

from genpipe.evaluation import kernels
from genpipe.evaluation.kernels import CMMD_SIGMA, cmmd, kid_estimates


def gaussian(seed: int, n: int, *, dims: int = 6, mean: float = 0.0) -> Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed)) + mean


def estimates(drawn: Tensor, real: Tensor, *, subsets: int, size: int) -> Tensor:
    return kid_estimates(drawn, real, subsets=subsets, size=size, generator=torch.Generator().manual_seed(0))


def test_an_estimate_is_the_unbiased_one_of_scikit_learns_kernel() -> None:
    """Of subsets that are the whole sets, so that the order in them does not matter."""
    x, y = gaussian(0, 12), gaussian(1, 12, mean=0.5)
    kernel = {"degree": 3, "gamma": 1 / 6, "coef0": 1}
    xx, yy, xy = (polynomial_kernel(a.double(), b.double(), **kernel) for a, b in ((x, x), (y, y), (x, y)))
    off = [(k.sum() - np.trace(k)) / (12 * 11) for k in (xx, yy)]
    expected = sum(off) - 2 * xy.mean()
    np.testing.assert_allclose(estimates(x, y, subsets=3, size=12).numpy(), [expected] * 3, rtol=1e-9)


@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_the_mean_is_that_of_gaussians(mean: float) -> None:
    """In one dimension E (x y + 1)^3 is 1 + 3 m1 m1' + 3 m2 m2' + m3 m3', of the raw moments of x and y."""

    def moments(mu: float) -> tuple[float, float, float]:
        return mu, mu**2 + 1, mu**3 + 3 * mu

    def kernel(a: float, b: float) -> float:
        return 1 + sum(c * p * q for c, p, q in zip((3, 3, 1), moments(a), moments(b), strict=True))

    expected = kernel(mean, mean) + kernel(0, 0) - 2 * kernel(mean, 0)
    found = estimates(gaussian(0, 40_000, dims=1, mean=mean), gaussian(1, 40_000, dims=1), subsets=200, size=200)
    error = float(found.std()) / math.sqrt(200)
    assert abs(float(found.mean()) - expected) < 5 * error
    assert mean == 0 or expected > 20 * error, "so it is told from 0"


def test_cmmd_is_that_of_scikit_learns_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (torch.nn.functional.normalize(gaussian(seed, n), dim=1) for seed, n in ((0, 11), (1, 17)))
    xx, yy, xy = (rbf_kernel(a.double(), b.double(), gamma=1 / (2 * 10**2)).mean() for a, b in ((x, x), (y, y), (x, y)))
    assert cmmd(x, y) == pytest.approx(1000 * (xx + yy - 2 * xy), rel=1e-6)
    monkeypatch.setattr(kernels, "BLOCK", 40)
    assert cmmd(x, y) == pytest.approx(1000 * (xx + yy - 2 * xy), rel=1e-6)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_cmmd_is_that_of_gaussians() -> None:
    """x - y is N(d, 2 I), so E k(x, y) is (s / (s + 2))^(D / 2) exp(-|d|^2 / 2 (s + 2)) with s the squared sigma."""
    dims, n, mean = 4, 3000, 2.0
    s = CMMD_SIGMA**2
    within = (s / (s + 2)) ** (dims / 2)
    expected = 1000 * 2 * within * (1 - math.exp(-dims * mean**2 / (2 * (s + 2))))
    bias = 1000 * 2 * (1 - within) / n
    found = cmmd(gaussian(0, n, dims=dims, mean=mean), gaussian(1, n, dims=dims))
    assert found == pytest.approx(expected + bias, rel=0.03)
