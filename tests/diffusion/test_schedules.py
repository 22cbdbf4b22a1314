"""Schedules, times and conversions against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genpipe.diffusion.losses import diffusion_loss, min_snr_weight
from genpipe.diffusion.parameterizations import MIN_ALPHA, Predict, check_predict, target, to_noise, to_x0
from genpipe.diffusion.schedules import (
    Schedule,
    add_noise,
    alpha_sigma,
    alpha_sigma_slopes,
    sample_t,
    timesteps,
)

SCHEDULES: list[Schedule] = ["cosine", "flow"]
PREDICTS: list[Predict] = ["eps", "x0", "v", "flow"]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ends_of_the_schedule(schedule: Schedule) -> None:
    alpha, sigma = alpha_sigma(torch.tensor([0.0, 1.0]), schedule)
    torch.testing.assert_close(alpha, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(sigma, torch.tensor([0.0, 1.0]))
    assert (alpha >= 0).all()


def test_cosine_preserves_variance_and_flow_is_a_straight_line() -> None:
    t = torch.linspace(0, 1, 11)
    alpha, sigma = alpha_sigma(t, "cosine")
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(11))
    alpha, sigma = alpha_sigma(t, "flow")
    torch.testing.assert_close(alpha + sigma, torch.ones(11))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_slopes_are_derivatives(schedule: Schedule) -> None:
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64, requires_grad=True)
    for level, slope in zip(alpha_sigma(t, schedule), alpha_sigma_slopes(t, schedule), strict=True):
        (expected,) = torch.autograd.grad(level.sum(), t, retain_graph=True)
        torch.testing.assert_close(slope, expected)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="cosine"):
        alpha_sigma(torch.zeros(1), "linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logit_normal"):
        sample_t(1, kind="beta", generator=gen(), device="cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'flow'"):
        target("score", x0=torch.zeros(1), noise=torch.zeros(1), alpha=torch.ones(1), sigma=torch.ones(1))  # type: ignore[arg-type]


def test_training_times_have_their_distribution() -> None:
    uniform = sample_t(20_000, kind="uniform", generator=gen(), device="cpu")
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    assert uniform.std() == pytest.approx(math.sqrt(1 / 12), abs=0.01)
    normal = torch.logit(sample_t(20_000, kind="logit_normal", generator=gen(), device="cpu"))
    assert normal.mean() == pytest.approx(0.0, abs=0.03)
    assert normal.std() == pytest.approx(1.0, abs=0.03)
    again = sample_t(20_000, kind="uniform", generator=gen(), device="cpu")
    assert torch.equal(uniform, again)


@given(steps=st.integers(1, 60), shift=st.floats(0.2, 8.0))
def test_timesteps_fall_from_one_to_zero(steps: int, shift: float) -> None:
    ts = timesteps(steps, shift=shift)
    assert ts.shape == (steps + 1,)
    assert ts[0] == 1.0 and ts[-1] == 0.0
    assert (ts.diff() < 0).all()


def test_shift_of_three_sends_one_half_to_three_quarters() -> None:
    assert timesteps(2, shift=3.0)[1] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="shift"):
        timesteps(2, shift=0.0)
    with pytest.raises(ValueError, match="steps"):
        timesteps(0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predict", PREDICTS)
@given(t=st.floats(0.0, 1.0), seed=st.integers(0, 1000))
def test_conversions_invert_the_target(predict: Predict, schedule: Schedule, t: float, seed: int) -> None:
    x0, noise = torch.randn(2, 3, 4, 5, generator=gen(seed), dtype=torch.float64)
    times = torch.full((3,), t, dtype=torch.float64)
    alpha, sigma = alpha_sigma(times, schedule)
    x_t = add_noise(x0, noise=noise, t=times, schedule=schedule)
    tgt = target(predict, x0=x0, noise=noise, alpha=alpha, sigma=sigma)
    levels = {"x_t": x_t, "alpha": alpha, "sigma": sigma}
    if predict != "eps" or alpha.min() > MIN_ALPHA:
        torch.testing.assert_close(to_x0(predict, pred=tgt, **levels), x0)
    if predict != "x0" or sigma.min() > 1e-4:
        torch.testing.assert_close(to_noise(predict, pred=tgt, **levels), noise)


def test_eps_stays_finite_where_alpha_is_zero() -> None:
    x_t, eps = torch.randn(2, 1, 8, generator=gen())
    zero, one = torch.zeros(1), torch.ones(1)
    assert to_x0("eps", pred=eps, x_t=x_t, alpha=zero, sigma=one).isfinite().all()


def test_flow_velocity_is_refused_on_the_cosine_schedule() -> None:
    with pytest.raises(ValueError, match="predict='v'"):
        check_predict("flow", schedule="cosine")
    for predict in PREDICTS:
        check_predict(predict, schedule="flow")


@given(t=st.floats(0.02, 0.98))
def test_min_snr_weights_of_the_paper(t: float) -> None:
    alpha, sigma = alpha_sigma(torch.tensor([t], dtype=torch.float64), "cosine")
    snr = (alpha / sigma) ** 2
    capped = snr.clamp(max=5.0)
    levels = {"alpha": alpha, "sigma": sigma}
    torch.testing.assert_close(min_snr_weight("x0", **levels), capped)
    torch.testing.assert_close(min_snr_weight("eps", **levels), capped / snr)
    torch.testing.assert_close(min_snr_weight("v", **levels), capped / (snr + 1))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predict", PREDICTS)
def test_min_snr_weighs_the_same_error_alike(predict: Predict, schedule: Schedule) -> None:
    """The weighted error of a prediction is the weighted error of the x0 that it implies."""
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    alpha, sigma = alpha_sigma(t, schedule)
    levels = {"alpha": alpha, "sigma": sigma}
    x0, noise, wrong = torch.randn(3, 9, 6, generator=gen(), dtype=torch.float64)
    x_t = add_noise(x0, noise=noise, t=t, schedule=schedule)
    tgt = target(predict, x0=x0, noise=noise, **levels)
    implied = to_x0(predict, pred=tgt + wrong, x_t=x_t, **levels)
    weighted = min_snr_weight(predict, **levels) * wrong.square().mean(1)
    expected = min_snr_weight("x0", **levels) * (implied - x0).square().mean(1)
    torch.testing.assert_close(weighted, expected)


@pytest.mark.parametrize("predict", PREDICTS)
def test_min_snr_is_finite_at_both_ends(predict: Predict) -> None:
    alpha, sigma = alpha_sigma(torch.tensor([0.0, 1.0]), "cosine")
    assert min_snr_weight(predict, alpha=alpha, sigma=sigma).isfinite().all()


def test_loss_is_per_sample_in_fp32_and_weighted() -> None:
    pred, tgt = torch.zeros(3, 2, 4, dtype=torch.bfloat16), torch.ones(3, 2, 4)
    tgt[1] = 2.0
    loss = diffusion_loss(pred, tgt)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([1.0, 4.0, 1.0]))
    weighted = diffusion_loss(pred, tgt, weight=torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(weighted, torch.tensor([1.0, 2.0, 0.0]))
