"""Principal components and buckets against scikit-learn and numpy, and what is lost on the way to codes and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor

from genpipe.models.pca_quantizer import PrincipalCodes, equal_buckets, principal_components

D, COUNT, BUCKETS = 12, 3000, 32


def embeddings() -> Tensor:
    """Unit vectors [COUNT, D] around a mean, of very unequal variances in directions that are no axes."""
    gen = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(D, D, generator=gen))[0]
    x = (torch.randn(COUNT, D, generator=gen) * 0.6 ** torch.arange(D)) @ turn + torch.randn(D, generator=gen)
    return torch.nn.functional.normalize(x, dim=-1)


def fitted(*, variance: float, buckets: int = BUCKETS) -> PrincipalCodes:
    chunks = embeddings().split(700)
    mean, basis = principal_components(chunks, variance=variance)
    codes = PrincipalCodes(embed_dim=D, components=len(basis), buckets=buckets, dot_buckets=4)
    codes.fit(mean, basis, embeds=chunks, dot_F=torch.linspace(-1, 1, 1000))
    return codes


@pytest.mark.parametrize("variance", [0.5, 0.9, 0.99, 1.0])
def test_components_are_scikit_learns(variance: float) -> None:
    mean, basis = principal_components(embeddings().split(700), variance=variance)
    reference = PCA(svd_solver="full").fit(embeddings().double().numpy())
    kept = int((np.cumsum(reference.explained_variance_ratio_) < variance - 1e-12).sum()) + 1
    assert basis.shape == (kept, D) and basis.dtype == torch.float64
    np.testing.assert_allclose(mean, reference.mean_, atol=1e-12)
    aligned = (basis.numpy() * reference.components_[:kept]).sum(1)  # cosines of unit vectors, up to sign
    np.testing.assert_allclose(np.abs(aligned), 1.0, atol=1e-8)
    assert (basis.gather(1, basis.abs().argmax(1, keepdim=True)) > 0).all()


def test_components_do_not_depend_on_the_chunks_and_are_at_most_so_many() -> None:
    whole = principal_components([embeddings()], variance=0.99)[1]
    torch.testing.assert_close(principal_components(embeddings().split(1), variance=0.99)[1], whole)
    torch.testing.assert_close(principal_components([embeddings()], variance=0.99, at_most=3)[1], whole[:3])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=8, max_size=60, unique=True), st.integers(2, 8))
def test_buckets_hold_as_many_each_and_their_means(values: list[float], buckets: int) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    edges, centers = equal_buckets(x, buckets)
    members = np.digitize(x.numpy(), edges.numpy(), right=True)
    counts = np.bincount(members, minlength=buckets)
    assert len(counts) == buckets and counts.max() - counts.min() <= 1
    means = [x.numpy()[members == bucket].mean() for bucket in range(buckets)]
    np.testing.assert_allclose(centers, means, atol=1e-12)


def test_too_few_values_for_the_buckets_are_refused() -> None:
    with pytest.raises(ValueError, match="3 values do not fill 4 buckets"):
        equal_buckets(torch.arange(3.0), 4)


def test_a_code_stands_for_its_buckets_mean_and_errs_by_no_more_than_its_width() -> None:
    x, codes = embeddings(), fitted(variance=1.0)
    found = codes.encode(x)
    assert found.dtype == torch.int64 and found.shape == (COUNT, D)
    reference = PCA(svd_solver="full").fit(x.double().numpy())
    projected = reference.transform(x.double().numpy())
    restored = reference.transform(codes.decode(found).double().numpy())
    for k in range(D):
        code = found[:, k].numpy()
        assert np.bincount(code, minlength=BUCKETS).tolist() == pytest.approx([COUNT / BUCKETS] * BUCKETS, abs=1)
        for bucket in range(BUCKETS):
            inside = projected[code == bucket, k]
            np.testing.assert_allclose(restored[code == bucket, k], inside.mean(), atol=1e-5)
            assert np.abs(restored[code == bucket, k] - inside).max() <= np.ptp(inside) + 1e-5


@pytest.mark.parametrize(("variance", "buckets"), [(1.0, 1024), (0.9, 1024), (1.0, 16)])
def test_what_is_lost_is_the_variance_left_out_and_the_variance_inside_buckets(variance: float, buckets: int) -> None:
    """A thousand buckets lose next to nothing; sixteen of equal probability about a fiftieth of the variance."""
    x, codes = embeddings(), fitted(variance=variance, buckets=buckets)
    lost = (codes.decode(codes.encode(x)) - x).square().sum() / (x - x.mean(0)).square().sum()
    inside = 1e-3 if buckets == 1024 else 0.05
    left_out = 1 - PCA(svd_solver="full").fit(x.numpy()).explained_variance_ratio_[: len(codes.basis_KD)].sum()
    assert left_out - 1e-6 <= lost <= left_out + inside


def test_codes_are_their_own_codes() -> None:
    """Decoded and encoded again, an embedding keeps its codes; what lies far outside gets the outermost."""
    codes = fitted(variance=0.99)
    found = codes.encode(embeddings())
    assert torch.equal(codes.encode(codes.decode(found)), found)
    far = codes.mean_D + torch.tensor([[-9.0], [9.0]]) * codes.basis_KD[0]
    assert codes.encode(far)[:, 0].tolist() == [0, BUCKETS - 1]


def test_autocast_does_not_blur_the_codes() -> None:
    x, codes = embeddings(), fitted(variance=0.99, buckets=1024)
    plain = codes.encode(x)
    decoded = codes.decode(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codes.encode(x), plain)
        assert torch.equal(codes.decode(plain), decoded)
    assert decoded.dtype == torch.float32


def test_dot_products_are_quartiles() -> None:
    dots = torch.tensor([-1.0, -0.4, 0.4, 0.6, 1.0])
    assert fitted(variance=0.9).encode_dot(dots).tolist() == [0, 1, 2, 3, 3]


def test_the_fit_travels_in_the_state() -> None:
    codes = fitted(variance=0.99)
    other = PrincipalCodes(embed_dim=D, components=len(codes.basis_KD), buckets=BUCKETS, dot_buckets=4)
    other.load_state_dict(codes.state_dict())
    assert torch.equal(other.encode(embeddings()), codes.encode(embeddings()))
    assert not list(codes.parameters()), "the fit is not trained"
