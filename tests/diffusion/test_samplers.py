"""Samplers and guidance against distributions whose denoiser is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from genpipe.diffusion.guidance import guided, scale_in_interval
from genpipe.diffusion.samplers import Denoise, ddim, heun
from genpipe.diffusion.schedules import Schedule, alpha_sigma, timesteps

SCHEDULES: list[Schedule] = ["cosine", "flow"]
MEAN, STD = 0.7, 0.6


def gaussian(schedule: Schedule) -> Denoise:
    """E[x0 | x_t] when x0 is N(MEAN, STD^2)."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (level[:, None] for level in alpha_sigma(t.to(x.dtype), schedule))
        gain = alpha * STD**2 / (alpha.square() * STD**2 + sigma.square())
        return MEAN + gain * (x - alpha * MEAN)

    return denoise


def mixture(schedule: Schedule, *, modes: tuple[float, ...], weights: tuple[float, ...], std: float) -> Denoise:
    """E[x0 | x_t] when x0 is a mixture of N(mode, std^2)."""
    mode, weight = torch.tensor(modes), torch.tensor(weights)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (level[:, None] for level in alpha_sigma(t, schedule))
        variance = alpha.square() * std**2 + sigma.square()
        posterior = torch.softmax(weight.log() - (x - alpha * mode).square() / (2 * variance), dim=1)
        means = mode + alpha * std**2 / variance * (x - alpha * mode)
        return (posterior * means).sum(1, keepdim=True)

    return denoise


def end_error(sampler: Callable[..., Tensor], *, steps: int, schedule: Schedule) -> float:
    """Error at t = 0 against the exact flow of a Gaussian, which maps noise z to MEAN + STD z."""
    z = torch.linspace(-2, 2, 9)[:, None]
    x = sampler(gaussian(schedule), z, timesteps(steps), schedule=schedule)
    return (x - (MEAN + STD * z)).abs().max().item()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (heun, 2)])
def test_samplers_converge_at_their_order(sampler: Callable[..., Tensor], order: int, schedule: Schedule) -> None:
    coarse = end_error(sampler, steps=32, schedule=schedule)
    fine = end_error(sampler, steps=64, schedule=schedule)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)
    assert fine < 0.03


def test_ddim_on_the_flow_schedule_is_euler_on_the_velocity() -> None:
    z = torch.randn(16, 1, generator=torch.Generator().manual_seed(0))
    ts = timesteps(7, shift=2.0)
    denoise = gaussian("flow")
    x = z
    for t, t_next in pairwise(ts):
        x0 = denoise(x, t.expand(16))
        x = x + (t_next - t) * (x - x0) / t  # noise - x0 = (x_t - x0) / t
    torch.testing.assert_close(ddim(denoise, z, ts, schedule="flow"), x)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("sampler", "options"), [(ddim, {}), (ddim, {"eta": 1.0}), (heun, {})])
def test_samplers_reach_a_mixture(
    sampler: Callable[..., Tensor], options: dict[str, float], schedule: Schedule
) -> None:
    gen = torch.Generator().manual_seed(0)
    denoise = mixture(schedule, modes=(-1.0, 1.0), weights=(0.3, 0.7), std=0.1)
    z = torch.randn(4000, 1, generator=gen)
    x = sampler(denoise, z, timesteps(100), schedule=schedule, generator=gen, **options)
    right = x > 0
    assert right.float().mean() == pytest.approx(0.7, abs=0.03)
    assert x[right].mean() == pytest.approx(1.0, abs=0.02)
    assert x[right].std() == pytest.approx(0.1, abs=0.02)


def test_ancestral_ddim_needs_a_generator_and_repeats_with_it() -> None:
    z = torch.zeros(4, 1)
    with pytest.raises(ValueError, match="generator"):
        ddim(gaussian("cosine"), z, timesteps(3), schedule="cosine", eta=1.0)

    def draw() -> Tensor:
        gen = torch.Generator().manual_seed(3)
        return ddim(gaussian("cosine"), z, timesteps(3), schedule="cosine", eta=1.0, generator=gen)

    assert torch.equal(draw(), draw())
    assert draw().std() > 0


def test_guidance_extrapolates() -> None:
    cond, uncond = torch.tensor([[2.0, 4.0]]), torch.tensor([[1.0, 1.0]])
    assert torch.equal(guided(cond, uncond, scale=1.0), cond)
    assert torch.equal(guided(cond, uncond, scale=0.0), uncond)
    expected = torch.tensor([[4.0, 10.0]])
    assert torch.equal(guided(cond, uncond, scale=3.0), expected)
    assert torch.equal(guided(cond, uncond, scale=torch.tensor([[3.0]])), expected)


def test_full_rescale_restores_the_conditional_deviation() -> None:
    gen = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 5, 3, 8, 8, generator=gen)
    out = guided(cond, uncond, scale=6.0, rescale=1.0)
    torch.testing.assert_close(out.std((1, 2, 3)), cond.std((1, 2, 3)))


def test_guidance_only_inside_the_interval() -> None:
    t = torch.tensor([0.1, 0.5, 0.9])
    assert scale_in_interval(t, scale=4.0, interval=(0.2, 0.8)).tolist() == [1.0, 4.0, 1.0]
