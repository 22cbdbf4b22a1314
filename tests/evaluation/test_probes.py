"""The linear classifier against scikit-learn's, and against the best that there is for Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from genpipe.evaluation.probes import linear_accuracy


def blobs(seed: int, n: int, *, classes: int, distance: float, dims: int = 6) -> tuple[Tensor, Tensor]:
    """Unit Gaussians around scaled unit vectors, and which is whose."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return torch.randn(n, dims, generator=generator) + distance * torch.eye(classes, dims)[labels], labels


@pytest.mark.parametrize("l2", [1e-3, 0.3])
def test_it_tells_what_scikit_learns_tells(l2: float) -> None:
    (x, labels), (y, expected) = blobs(0, 90, classes=4, distance=1.5), blobs(1, 400, classes=4, distance=1.5)
    x, y = 10 * x + 3, 10 * y + 3
    scaler = StandardScaler().fit(x.double())
    model = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=10_000).fit(
        scaler.transform(x.double()), labels
    )
    reference = float((model.predict(scaler.transform(y.double())) == expected.numpy()).mean())
    assert linear_accuracy(x, labels, y, expected, l2=l2) == pytest.approx(reference, abs=1 / 400 + 1e-9)


def test_of_two_gaussians_it_comes_near_the_best_there_is() -> None:
    """Whose error is that of half their distance in deviations."""
    distance = 2.0
    (x, labels), (y, expected) = (
        blobs(0, 4000, classes=2, distance=distance),
        blobs(1, 20_000, classes=2, distance=distance),
    )
    best = 0.5 * (1 + math.erf(distance * math.sqrt(2) / 2 / math.sqrt(2)))
    assert linear_accuracy(x, labels, y, expected, l2=1e-4) == pytest.approx(best, abs=0.01)


def test_a_class_that_was_never_shown_is_never_told() -> None:
    x, labels = blobs(0, 300, classes=3, distance=8)
    shown = labels < 2
    found = linear_accuracy(x[shown], labels[shown], x, labels, l2=1e-3)
    assert found == pytest.approx(shown.double().mean().item(), abs=0.01)
