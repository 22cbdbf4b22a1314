from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from genpipe.training.statistics import LEAST_DEVIATION, Moments


def moments(*parts: np.ndarray) -> Moments:
    found = Moments()
    for part in parts:
        found.add(torch.from_numpy(part))
    return found


def test_batches_add_up_to_the_whole() -> None:
    x = np.random.default_rng(0).normal(3, [[[1.0]], [[2.0]], [[0.7]]], size=(50, 3, 4, 5)).astype(np.float32)
    found = moments(x[:7], x[7:30], x[30:])
    np.testing.assert_allclose(found.mean(), x.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found.std(), x.std((0, 2, 3)), rtol=1e-5)


def test_samples_vary_by_means_and_by_spread() -> None:
    """Against a million draws."""
    random = np.random.default_rng(1)
    mean, variance = random.normal(size=(1000, 2)), random.uniform(0.1, 2, size=(1000, 2))
    draws = mean + variance**0.5 * random.normal(size=(1000, 1000, 2))
    found = Moments()
    found.add(torch.from_numpy(mean), variance=torch.from_numpy(variance))
    np.testing.assert_allclose(found.std(), draws.std((0, 1)), rtol=5e-3)
    np.testing.assert_allclose(found.mean(), mean.mean(0), rtol=1e-9)


@pytest.mark.parametrize("level", [0.0, 0.3, 1e4])
def test_a_channel_that_never_varies_has_a_deviation_to_divide_by(level: float) -> None:
    """A tenth of all channels' together, even where its level is far from 0. Of constants alone: scikit-learn's 1."""
    x = np.random.default_rng(2).normal(5, 2, size=(400, 3))
    x[:, 1] = level
    floor = LEAST_DEVIATION * np.sqrt(x.var(0).mean())
    np.testing.assert_allclose(moments(x).std(), [x[:, 0].std(), floor, x[:, 2].std()], rtol=1e-9)
    constant = np.full((40, 3), level)
    assert moments(constant).std() == StandardScaler().fit(constant).scale_.tolist() == [1.0] * 3
