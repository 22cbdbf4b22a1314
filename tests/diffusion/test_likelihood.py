"""Likelihoods by the probability-flow ODE against densities known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import SCHEDULES, Mixture
from torch import Tensor

from genpipe.diffusion.likelihood import bits_per_dimension, log_likelihood
from genpipe.diffusion.schedules import Schedule, sigma_range

PLANE = Mixture(torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.3, -1.2]]), torch.tensor([0.2, 0.5, 0.3]), 0.4)
UNIT = Mixture(torch.zeros(1, 4), torch.ones(1), 1.0)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_least_noise(data: Mixture, schedule: Schedule) -> Mixture:
    """The data that the ODE starts from: with the schedule's least noise."""
    return Mixture(data.modes, data.weights, math.hypot(data.std, sigma_range(schedule)[0]))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("data", [PLANE, UNIT], ids=["mixture", "gaussian"])
def test_exact_likelihood(data: Mixture, schedule: Schedule) -> None:
    """At sigma / alpha = 80 a mixture is nearly the Gaussian that the ODE ends in, less so at scaled_linear's 15."""
    x = 0.8 * torch.randn(16, data.modes.shape[1], generator=gen())
    found = log_likelihood(data.denoiser(schedule), x, schedule=schedule, steps=60)
    expected = with_least_noise(data, schedule).log_density(x)
    tolerance = 2e-3 if data is UNIT else 0.1 if schedule == "scaled_linear" else 0.02
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_error_falls_with_the_fourth_power_of_the_step() -> None:
    x = torch.tensor([[0.2, 0.1], [0.9, 0.3], [-1.1, 0.4]])
    expected = log_likelihood(PLANE.denoiser("flow"), x, schedule="flow", steps=200)

    def error(steps: int) -> float:
        found = log_likelihood(PLANE.denoiser("flow"), x, schedule="flow", steps=steps)
        return (found - expected).abs().max().item()

    assert math.log2(error(15) / error(30)) > 3.4


def test_hutchinson_estimates_are_right_on_average() -> None:
    x = torch.tensor([[0.3, -0.4]])
    many = log_likelihood(
        PLANE.denoiser("cosine"), x.expand(512, 2).clone(), schedule="cosine", steps=25, generator=gen()
    )
    exact = log_likelihood(PLANE.denoiser("cosine"), x, schedule="cosine", steps=25)
    assert many.std() > 0.01
    assert many.mean() == pytest.approx(exact.item(), abs=4 * many.std().item() / 512**0.5)


def test_hutchinson_is_exact_where_the_dimensions_do_not_mix() -> None:
    """v^T J v is the trace for a diagonal J and signs v, whatever they are; an image's shape makes no difference."""
    x = 0.8 * torch.randn(5, 4, generator=gen())
    plain = UNIT.denoiser("flow")

    def of_images(x_t: Tensor, t: Tensor) -> Tensor:
        return plain(x_t.flatten(1), t).view(x_t.shape)

    images = x.view(5, 1, 2, 2)
    found = log_likelihood(of_images, images, schedule="flow", steps=60, generator=gen(1))
    torch.testing.assert_close(found, UNIT.log_density(x), atol=2e-3, rtol=0)
    exact = log_likelihood(of_images, images, schedule="flow", steps=60)
    torch.testing.assert_close(exact, found, atol=1e-4, rtol=0)


def test_no_graph_is_left_behind() -> None:
    weight = torch.ones((), requires_grad=True)
    found = log_likelihood(lambda x, t: weight * 0.5 * x, torch.zeros(2, 3), schedule="flow", steps=3)
    assert not found.requires_grad and weight.grad is None


def test_bits_of_uniform_pixels() -> None:
    """Density 1/2 on [-1, 1] is 8 bits per 256th of it; 2/255 bins are a little fewer."""
    log_p = torch.tensor([12 * math.log(0.5)])
    assert bits_per_dimension(log_p, dimensions=12, bin_width=2 / 256).item() == pytest.approx(8.0)
    assert bits_per_dimension(log_p, dimensions=12).item() == pytest.approx(math.log2(255))
