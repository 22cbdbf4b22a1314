"""Nearest neighbors against scikit-learn, and the four shares against their definitions written out as loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from genpipe.evaluation import neighbors
from genpipe.evaluation.neighbors import nearest, neighbor_shares, radii


def gaussian(seed: int, n: int, *, dims: int = 5, shift: float = 0.0) -> Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed)) + shift


def by_definition(drawn: np.ndarray, real: np.ndarray, *, k: int) -> dict[str, float]:
    """Kynkaanniemi et al. 2019 and Naeem et al. 2020, picture by picture."""

    def radius(own: np.ndarray, i: int) -> float:
        return sorted(float(np.linalg.norm(own[i] - own[j])) for j in range(len(own)) if j != i)[k - 1]

    real_radii, drawn_radii = ([radius(of, i) for i in range(len(of))] for of in (real, drawn))
    precise = density = recalled = covered = 0
    for y in drawn:
        balls = sum(float(np.linalg.norm(y - x)) < r for x, r in zip(real, real_radii, strict=True))
        precise, density = precise + (balls > 0), density + balls
    for x, r in zip(real, real_radii, strict=True):
        distances = [float(np.linalg.norm(x - y)) for y in drawn]
        recalled += any(d < s for d, s in zip(distances, drawn_radii, strict=True))
        covered += min(distances) < r
    return {
        "precision": precise / len(drawn),
        "recall": recalled / len(real),
        "density": density / (k * len(drawn)),
        "coverage": covered / len(real),
    }


@settings(max_examples=30)
@given(
    st.integers(0, 10**6), st.integers(7, 40), st.integers(7, 40), st.integers(1, 6), st.sampled_from([0.0, 0.7, 3.0])
)
def test_the_shares_are_those_of_their_definitions(seed: int, n: int, m: int, k: int, shift: float) -> None:
    real, drawn = gaussian(seed, n), gaussian(seed + 1, m, shift=shift)
    expected = by_definition(drawn.double().numpy(), real.double().numpy(), k=k)
    assert neighbor_shares(drawn, real, k=k) == pytest.approx(expected, abs=1e-6)


def test_the_pictures_themselves_and_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collapsed system is precise and recalls nothing; one that draws something else is neither."""
    real = gaussian(0, 60)
    monkeypatch.setattr(neighbors, "BLOCK", 200)
    copied = neighbor_shares(real.clone(), real, k=3)
    assert (copied["precision"], copied["recall"], copied["coverage"]) == (1, 1, 1)
    collapsed = neighbor_shares(real[:1] + 1e-3 * gaussian(1, 60), real, k=3)
    assert collapsed["precision"] == 1 and collapsed["recall"] <= 1 / 60 and collapsed["coverage"] < 0.2
    assert set(neighbor_shares(gaussian(2, 60, shift=100), real, k=3).values()) == {0.0}


def test_shares_of_one_gaussian_are_near_those_of_large_sets() -> None:
    """Naeem et al. 2020: of equal distributions density is 1 in expectation, and coverage 1 - (N-1)...(N-k) /
    (2N-1)...(2N-k)."""
    n, k = 1500, 5
    found = neighbor_shares(gaussian(0, n, dims=8), gaussian(1, n, dims=8), k=k)
    missed = np.prod([(n - i) / (2 * n - i) for i in range(1, k + 1)])
    assert found["density"] == pytest.approx(1, abs=0.08)
    assert found["coverage"] == pytest.approx(1 - missed, abs=0.02)


@pytest.mark.parametrize("block", [1, 50, 2**22])
def test_neighbors_are_scikit_learns(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(neighbors, "BLOCK", block)
    queries, pool = gaussian(0, 13), gaussian(1, 31)
    pieces = [(first, pool[first : first + 7]) for first in range(0, 31, 7)]
    distances, rows = nearest(queries, pieces)
    expected, where = NearestNeighbors(n_neighbors=1).fit(pool.numpy()).kneighbors(queries.numpy())
    np.testing.assert_allclose(distances.sqrt().numpy(), expected[:, 0], rtol=1e-5)
    assert rows.tolist() == where[:, 0].tolist()
    far, _ = NearestNeighbors(n_neighbors=4).fit(pool.numpy()).kneighbors()
    np.testing.assert_allclose(radii(pool, k=4).sqrt().numpy(), far[:, 3], rtol=1e-5)


def test_a_query_is_not_its_own_neighbor() -> None:
    pool = gaussian(0, 9)
    _, rows = nearest(pool, [(0, pool[:4]), (4, pool[4:])], without=torch.arange(9))
    _, where = NearestNeighbors(n_neighbors=1).fit(pool.numpy()).kneighbors()
    assert rows.tolist() == where[:, 0].tolist()
    distances, rows = nearest(pool[:1], [(0, pool[:1])], without=torch.tensor([0]))
    assert (distances.tolist(), rows.tolist()) == ([float("inf")], [-1])


def test_equal_pictures_are_told_from_near_ones() -> None:
    """At the size of Inception's features fp32 could not."""
    pool = 20 + 0.4 * gaussian(0, 50, dims=2048)
    distances, rows = nearest(pool[[3]] + torch.eye(1, 2048) * 1e-3, [(0, pool)])
    assert rows.tolist() == [3] and distances.sqrt().item() == pytest.approx(1e-3, rel=0.02)


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="the 3-th nearest other of 3 pictures"):
        radii(gaussian(0, 3), k=3)
