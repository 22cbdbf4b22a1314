"""Guidance and thresholding by hand."""

from __future__ import annotations

import pytest
import torch
from scipy import integrate

from genpipe.diffusion.guidance import GuidanceSchedule, Threshold, guided, scale_at, thresholded


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_guidance_extrapolates() -> None:
    cond, uncond = torch.tensor([[2.0, 4.0]]), torch.tensor([[1.0, 1.0]])
    assert torch.equal(guided(cond, uncond, scale=1.0), cond)
    assert torch.equal(guided(cond, uncond, scale=0.0), uncond)
    expected = torch.tensor([[4.0, 10.0]])
    assert torch.equal(guided(cond, uncond, scale=3.0), expected)
    assert torch.equal(guided(cond, uncond, scale=torch.tensor([[3.0]])), expected)


def test_full_rescale_restores_the_conditional_deviation() -> None:
    cond, uncond = torch.randn(2, 5, 3, 8, 8, generator=gen())
    out = guided(cond, uncond, scale=6.0, rescale=1.0)
    torch.testing.assert_close(out.std((1, 2, 3)), cond.std((1, 2, 3)))


def test_guidance_only_inside_the_interval() -> None:
    t = torch.tensor([0.1, 0.5, 0.9])
    assert scale_at(t, scale=4.0, interval=(0.2, 0.8)).tolist() == [1.0, 4.0, 1.0]
    assert scale_at(t, scale=0.0, interval=(0.2, 1.0)).tolist() == [1.0, 0.0, 0.0]


def test_guidance_grows_as_the_noise_goes() -> None:
    """Of a scale of 5: 1 + 4 * 2 (1 - t), and 1 + 4 (1 + cos(pi t))."""
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(scale_at(t, scale=5.0, schedule="linear"), torch.tensor([9.0, 7.0, 5.0, 1.0]))
    expected = torch.tensor([9.0, 5.0 + 4.0 * 0.5**0.5, 5.0, 1.0])
    torch.testing.assert_close(scale_at(t, scale=5.0, schedule="cosine"), expected)
    with pytest.raises(ValueError, match="'cosine'"):
        scale_at(t, scale=5.0, schedule="sine")  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_mean_scale_is_the_scale(schedule: GuidanceSchedule) -> None:
    mean, _ = integrate.quad(lambda t: scale_at(torch.tensor(t), scale=7.5, schedule=schedule).item(), 0, 1)
    assert mean == pytest.approx(7.5, rel=1e-5)


def test_static_threshold_clips() -> None:
    x0 = torch.tensor([[-3.0, 0.5, 1.2]])
    assert thresholded(x0, kind="static", bound=1.0, percentile=0.9).tolist() == [[-1.0, 0.5, 1.0]]
    assert thresholded(x0, kind="none", bound=1.0, percentile=0.9) is x0
    with pytest.raises(ValueError, match="'dynamic'"):
        thresholded(x0, kind="soft", bound=1.0, percentile=0.9)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(3, 1), (3, 2), (2, 3, 8, 8)])
def test_dynamic_threshold_is_by_each_samples_quantile(shape: tuple[int, ...], share: float) -> None:
    x0 = 3 * torch.randn(shape, generator=gen())
    limit = torch.quantile(x0.abs().flatten(1), share, dim=1).clamp(min=1.0).view(-1, *[1] * (x0.ndim - 1))
    found = thresholded(x0, kind="dynamic", bound=1.0, percentile=share)
    torch.testing.assert_close(found, torch.clamp(x0, -limit, limit) / limit)


@pytest.mark.parametrize("kind", ["none", "static", "dynamic"])
def test_what_is_in_bounds_stays(kind: Threshold) -> None:
    x0 = torch.rand(4, 3, 8, 8, generator=gen()) * 2 - 1
    torch.testing.assert_close(thresholded(x0, kind=kind, bound=1.0, percentile=0.995), x0)


def test_dynamic_threshold_of_many_large_images() -> None:
    """More elements than torch.quantile takes."""
    x0 = torch.ones(17, 1000, 1000)
    x0[:, 0] = 3.0
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x0, 0.5)
    found = thresholded(x0, kind="dynamic", bound=1.0, percentile=1.0)
    assert found[:, 0].eq(1.0).all() and torch.allclose(found[:, 1:], torch.tensor(1 / 3))
