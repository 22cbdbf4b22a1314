"""Image to image by strength, with a decoder whose probability flow is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from generation.gaussian_system import PIXELS, SCHEDULE, GaussianSystem, covariance

from genpipe.diffusion.process import SamplerConfig, sampling_times
from genpipe.diffusion.schedules import alpha_sigma
from genpipe.generation.conditions import Conditions
from genpipe.generation.image_to_image import redraw, times_from

MEAN, COUNT = 0.2, 3000


@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
def test_pictures_are_where_the_flow_leads_from_the_noised_picture(strength: float) -> None:
    """Along each principal axis the flow scales x_t as its deviation: from hypot(alpha s, sigma) at t0 to s."""
    variances, axes = torch.linalg.eigh(covariance())
    picture = torch.full((PIXELS,), -0.3).double() + 0.1 * torch.linspace(-1, 1, PIXELS).double()
    system = GaussianSystem(SamplerConfig(kind="heun", steps=60, timesteps="logsnr"), mean=MEAN)
    generator = torch.Generator().manual_seed(0)
    images = picture.float().view(1, *system.grid).expand(COUNT, -1, -1, -1)
    found = redraw(system, images, Conditions(COUNT), strength=strength, generator=generator).flatten(1).double()
    first = times_from(sampling_times(system.decoder_sampler, system.decoder_diffusion), strength)[0]
    alpha, sigma = (level.item() for level in alpha_sigma(first.double(), SCHEDULE))
    scales = variances.sqrt() / (alpha**2 * variances + sigma**2).sqrt()
    mean = MEAN + axes @ (scales * alpha * (axes.T @ (picture - MEAN)))
    deviations = scales * sigma
    assert (found.mean(0) - mean).abs().max() < 4 * deviations.max() / math.sqrt(COUNT) + 2e-3
    torch.testing.assert_close((found @ axes).std(0), deviations, rtol=0.08, atol=1e-4)


def test_the_strength_is_the_time_at_which_drawing_begins() -> None:
    ts = torch.linspace(1, 0, 11)
    torch.testing.assert_close(times_from(ts, 0.6), torch.linspace(0.6, 0, 7))
    torch.testing.assert_close(times_from(ts, 0.69), torch.linspace(0.6, 0, 7))
    assert torch.equal(times_from(ts, 1.0), ts)
    with pytest.raises(ValueError, match="leaves none of 10 steps"):
        times_from(ts, 0.05)
    for strength in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="strength lies between 0"):
            times_from(ts, strength)
