"""Losses and weights against their papers' formulas, the learned variance against scipy and its own optimum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from analytic import SCHEDULES
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from genpipe.diffusion.losses import diffusion_loss, edm_weight, min_snr_weight
from genpipe.diffusion.parameterizations import Predict, target, to_x0
from genpipe.diffusion.schedules import Schedule, add_noise, alpha_sigma
from genpipe.diffusion.variance import discretized_log_likelihood, interpolated_log_variance, variational_loss

PREDICTS: list[Predict] = ["eps", "x0", "v", "flow", "edm"]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_loss_is_per_sample_in_fp32_and_weighted() -> None:
    pred, tgt = torch.zeros(3, 2, 4, dtype=torch.bfloat16), torch.ones(3, 2, 4)
    tgt[1] = 2.0
    loss = diffusion_loss(pred, tgt)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([1.0, 4.0, 1.0]))
    weighted = diffusion_loss(pred, tgt, weight=torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(weighted, torch.tensor([1.0, 2.0, 0.0]))


@given(t=st.floats(0.02, 0.98))
def test_min_snr_weights_of_the_paper(t: float) -> None:
    alpha, sigma = alpha_sigma(torch.tensor([t], dtype=torch.float64), "cosine")
    snr = (alpha / sigma) ** 2
    capped = snr.clamp(max=5.0)
    levels = {"alpha": alpha, "sigma": sigma}
    torch.testing.assert_close(min_snr_weight("x0", **levels), capped)
    torch.testing.assert_close(min_snr_weight("eps", **levels), capped / snr)
    torch.testing.assert_close(min_snr_weight("v", **levels), capped / (snr + 1))


def test_edm_weight_of_the_paper() -> None:
    """lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x0, lambda c_out^2 = 1 on F: table 1."""
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0], dtype=torch.float64)
    levels = {"alpha": torch.ones_like(sigma), "sigma": sigma, "sigma_data": 0.5}
    torch.testing.assert_close(edm_weight("x0", **levels), (sigma**2 + 0.25) / (sigma * 0.5) ** 2)
    torch.testing.assert_close(edm_weight("edm", **levels), torch.ones_like(sigma))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predict", PREDICTS)
@pytest.mark.parametrize("weight", [min_snr_weight, edm_weight])
def test_weights_weigh_the_same_error_alike(weight, predict: Predict, schedule: Schedule) -> None:  # type: ignore[no-untyped-def]
    """The weighted error of a prediction is the weighted error of the x0 that it implies."""
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    alpha, sigma = alpha_sigma(t, schedule)
    levels = {"alpha": alpha, "sigma": sigma, "sigma_data": 0.6}
    x0, noise, wrong = torch.randn(3, 9, 6, generator=gen(), dtype=torch.float64)
    x_t = add_noise(x0, noise=noise, t=t, schedule=schedule)
    tgt = target(predict, x0=x0, noise=noise, **levels)
    implied = to_x0(predict, pred=tgt + wrong, x_t=x_t, **levels)
    weighted = weight(predict, **levels) * wrong.square().mean(1)
    expected = weight("x0", **levels) * (implied - x0).square().mean(1)
    torch.testing.assert_close(weighted, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predict", PREDICTS)
def test_min_snr_is_finite_at_both_ends(predict: Predict, schedule: Schedule) -> None:
    alpha, sigma = alpha_sigma(torch.tensor([0.0, 1.0]), schedule)
    assert min_snr_weight(predict, alpha=alpha, sigma=sigma).isfinite().all()


# The learned variance. 1,000 steps; the step from t = (i + 1) / 1000 goes to i / 1000.


def posterior_of(schedule: Schedule, index: int) -> tuple[float, float, float, float]:
    """DDPM's beta-tilde, beta and coefficients of x0 and x_t at a step, from their formulas (Ho et al. 2020, eq. 7)."""
    (a_prev, a), _ = alpha_sigma(torch.tensor([index / 1000, (index + 1) / 1000], dtype=torch.float64), schedule)
    bar, bar_prev = a.item() ** 2, a_prev.item() ** 2
    beta = 1 - bar / bar_prev
    tilde = beta * (1 - bar_prev) / (1 - bar)
    return tilde, beta, bar_prev**0.5 * beta / (1 - bar), (1 - beta) ** 0.5 * (1 - bar_prev) / (1 - bar)


@pytest.mark.parametrize("schedule", ["linear", "cosine_iddpm", "scaled_linear_zsnr"])
@pytest.mark.parametrize("index", [1, 10, 500, 998, 999])
def test_bound_of_a_step_is_the_divergence_of_two_gaussians(schedule: Schedule, index: int) -> None:
    x0, x_t, x0_pred, fraction = torch.randn(4, 2, 3, 5, 5, generator=gen())
    tilde, beta, of_x0, of_x = posterior_of(schedule, index)
    share = (fraction.double() + 1) / 2
    learned = share * math.log(beta) + (1 - share) * math.log(tilde)
    mean, true_mean = (of_x0 * x.double() + of_x * x_t.double() for x in (x0_pred, x0))
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(true_mean, tilde**0.5),
        torch.distributions.Normal(mean, (0.5 * learned).exp()),
    )
    found = variational_loss(
        x0=x0,
        x_t=x_t,
        x0_pred=x0_pred,
        fraction=fraction,
        t_B=torch.full((2,), (index + 1) / 1000),
        schedule=schedule,
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), kl.flatten(1).mean(1) / math.log(2), atol=1e-6, rtol=1e-4)


def test_bound_of_the_last_step_is_the_likelihood_of_8_bit_data() -> None:
    x0 = torch.randint(0, 256, (2, 3, 4, 4), generator=gen()) / 127.5 - 1
    fraction = torch.randn(2, 3, 4, 4, generator=gen(1))
    x0_pred = x0 + 0.02 * torch.randn(2, 3, 4, 4, generator=gen(2))
    _, beta, _, _ = posterior_of("linear", 0)
    tilde, _, _, _ = posterior_of("linear", 1)  # that of the next step, as its own is 0
    share = (fraction.double() + 1) / 2
    std = (0.5 * (share * math.log(beta) + (1 - share) * math.log(tilde))).exp()
    expected = -exact_bin(x0.double(), mean=x0_pred.double(), std=std).flatten(1).mean(1) / math.log(2)
    found = variational_loss(
        x0=x0,
        x_t=torch.randn_like(x0),
        x0_pred=x0_pred,
        fraction=fraction,
        t_B=torch.full((2,), 1 / 1000),
        schedule="linear",
    )
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def exact_bin(x: Tensor, *, mean: Tensor, std: Tensor) -> Tensor:
    """ln of the Gaussian's mass in the bin, by scipy in fp64, in whichever tail is exact."""
    low, high = ((x - mean + shift / 255) / std for shift in (-1.0, 1.0))
    low = torch.where(x < -0.999, torch.full_like(low, -math.inf), low).numpy()
    high = torch.where(x > 0.999, torch.full_like(high, math.inf), high).numpy()
    a, b = np.where(low > 0, -high, low), np.where(low > 0, -low, high)
    with np.errstate(divide="ignore"):
        upper, lower = stats.norm.logcdf(b), stats.norm.logcdf(a)
    return torch.from_numpy(upper + np.log1p(-np.exp(lower - upper)))


@given(x=st.integers(0, 255), mean=st.floats(-1.5, 1.5), log_std=st.floats(-4.5, 1.0))
def test_likelihood_of_a_bin_is_the_gaussians_mass_in_it(x: int, mean: float, log_std: float) -> None:
    """From the middle of the Gaussian to 200 deviations out."""
    value, center, width = (torch.tensor([v], dtype=torch.float64) for v in (x / 127.5 - 1, mean, log_std))
    expected = exact_bin(value, mean=center, std=width.exp())
    found = discretized_log_likelihood(value.float(), mean=center.float(), log_std=width.float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("mean", [-0.4, 0.03, 1.2])
def test_likelihoods_of_all_bins_sum_to_one(mean: float) -> None:
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for std in (1e-3, 0.1, 2.0):
        mass = discretized_log_likelihood(
            x, mean=torch.full_like(x, mean), log_std=torch.full_like(x, math.log(std))
        ).exp()
        assert mass.sum() == pytest.approx(1.0, abs=1e-9)


def test_gradients_are_right_and_finite_far_out() -> None:
    x = torch.tensor([-1.0, -0.5, 0.2, 1.0], dtype=torch.float64)
    mean = torch.tensor([-0.9, -0.45, 0.9, 0.5], dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor([-2.0, -3.0, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, s: discretized_log_likelihood(x, mean=m, log_std=s), (mean, log_std))
    far = torch.tensor([-1.0, -1.0, 0.3, 1.0], requires_grad=True)
    narrow = torch.full((4,), -5.0, requires_grad=True)
    discretized_log_likelihood(-far.detach(), mean=far, log_std=narrow).sum().backward()
    assert far.grad is not None and far.grad.isfinite().all()
    assert narrow.grad is not None and narrow.grad.isfinite().all()


@pytest.mark.parametrize("predict", PREDICTS)
def test_gradients_of_the_squared_error(predict: Predict) -> None:
    alpha, sigma = alpha_sigma(torch.linspace(0.2, 0.8, 3, dtype=torch.float64), "cosine")
    levels = {"alpha": alpha, "sigma": sigma}
    x0, noise, pred = torch.randn(3, 3, 4, generator=gen(), dtype=torch.float64)
    weight = min_snr_weight(predict, **levels).float().double()

    def loss(pred: Tensor) -> Tensor:
        per_sample = (pred - target(predict, x0=x0, noise=noise, **levels)).square().mean(1)
        return per_sample * weight

    pred.requires_grad_()
    assert torch.autograd.gradcheck(loss, (pred,))
    (ours,) = torch.autograd.grad(
        diffusion_loss(pred, target(predict, x0=x0, noise=noise, **levels), weight=weight.float()).sum(), pred
    )
    (expected,) = torch.autograd.grad(loss(pred).sum(), pred)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_gradient_of_the_bound_by_the_variance() -> None:
    """In fp32 against a difference quotient of the divergence in fp64; nothing reaches a detached mean."""
    x0, x_t, x0_pred, fraction = torch.randn(4, 1, 2, 3, generator=gen())
    fraction.requires_grad_()
    tilde, beta, of_x0, _ = posterior_of("linear", 300)
    given = {"x0": x0, "x_t": x_t, "x0_pred": x0_pred, "t_B": torch.tensor([0.301]), "schedule": "linear"}
    variational_loss(fraction=fraction, **given).sum().backward()  # type: ignore[arg-type]
    # KL(N(m, s) || N(n, v)) = (ln v - ln s + (s + (m - n)^2) / v - 1) / 2, and d ln v / d fraction = ln(beta / s) / 2.
    share = (fraction.detach().double() + 1) / 2
    variance = (share * math.log(beta) + (1 - share) * math.log(tilde)).exp()
    gap = (of_x0 * (x0 - x0_pred).double()).square()
    by_log = 0.5 * (1 - (tilde + gap) / variance)
    expected = by_log * 0.5 * math.log(beta / tilde) / math.log(2) / 6
    assert fraction.grad is not None
    torch.testing.assert_close(fraction.grad.double(), expected, rtol=1e-3, atol=1e-7)


def test_bound_is_finite_for_bf16_networks_at_all_times() -> None:
    t_B = (torch.arange(1000) + 1) / 1000
    for schedule in ("linear", "cosine", "cosine_iddpm", "linear_zsnr", "scaled_linear"):
        x0, x_t, x0_pred, fraction = torch.randn(4, 1000, 4, generator=gen())
        fraction = (3 * fraction).bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = variational_loss(
                x0=x0,
                x_t=x_t,
                x0_pred=x0_pred.bfloat16(),
                fraction=fraction,
                t_B=t_B,
                schedule=schedule,  # type: ignore[arg-type]
            )
        assert loss.dtype == torch.float32 and loss.isfinite().all()
        loss.sum().backward()
        assert fraction.grad is not None and fraction.grad.isfinite().all()


def test_variances_at_the_ends_of_the_fraction() -> None:
    small, large = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.8])
    fraction = torch.tensor([[-1.0, 0.0, 1.0]]).repeat(2, 1)
    found = interpolated_log_variance(fraction, small=small, large=large).exp()
    torch.testing.assert_close(found, torch.stack([small, (small * large).sqrt(), large], dim=1))
