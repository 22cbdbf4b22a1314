"""RePaint on two correlated numbers, of which one is known; and its schedule as the paper's authors publish it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genpipe.diffusion.repaint import repaint, visits
from genpipe.diffusion.samplers import Denoise
from genpipe.diffusion.schedules import ScheduleName, alpha_sigma
from genpipe.diffusion.times import timesteps

MEAN = torch.tensor([0.3, -0.2])
COVARIANCE = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
KNOWN = 1.5
CONDITIONAL_MEAN, CONDITIONAL_STD = -0.2 + 0.8 * (KNOWN - 0.3), math.sqrt(1.0 - 0.8**2)


def denoiser(schedule: ScheduleName) -> Denoise:
    """E[x0 | x_t] of the Gaussian."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (level[0] for level in alpha_sigma(t, schedule))
        gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(2))
        return MEAN + (x - alpha * MEAN) @ gain.T

    return denoise


def repainted(schedule: ScheduleName, *, steps: int, jump: int, resamples: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return repaint(
        denoiser(schedule),
        torch.randn(4000, 2, generator=generator),
        timesteps(steps, schedule=schedule),
        schedule=schedule,
        known=torch.tensor([KNOWN, math.nan]).expand(4000, 2).nan_to_num(7.0),
        keep=torch.tensor([True, False]),
        generator=generator,
        jump=jump,
        resamples=resamples,
    )


@pytest.mark.parametrize("schedule", ["cosine", "flow", "linear"])
def test_the_rest_is_drawn_from_the_conditional_distribution(schedule: ScheduleName) -> None:
    """Up to the share that the resampling leaves; the value that stands where nothing is known does not count."""
    found = repainted(schedule, steps=100, jump=10, resamples=10)
    assert (found[:, 0] == KNOWN).all()
    assert found[:, 1].mean().item() == pytest.approx(CONDITIONAL_MEAN, abs=0.08)
    assert found[:, 1].std().item() == pytest.approx(CONDITIONAL_STD, abs=0.04)


def test_resampling_brings_the_rest_to_agree() -> None:
    """Without it most of what the known part says is missed (Lugmayr et al. 2022, section 4.2)."""
    gaps = [
        CONDITIONAL_MEAN - repainted("flow", steps=25, jump=5, resamples=times)[:, 1].mean().item()
        for times in (1, 3, 10)
    ]
    assert gaps[0] > 0.3 and gaps[0] > 2 * gaps[1] > 2 * gaps[2] > 0


def published(t_T: int, *, jump_length: int, jump_n_sample: int) -> list[int]:
    """`get_schedule_jump` of the authors' code (appendix B), from t_T - 1 to -1."""
    jumps = dict.fromkeys(range(0, t_T - jump_length, jump_length), jump_n_sample - 1)
    t, ts = t_T, []
    while t >= 1:
        t = t - 1
        ts.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] = jumps[t] - 1
            for _ in range(jump_length):
                t = t + 1
                ts.append(t)
    return [*ts, -1]


@pytest.mark.parametrize(("steps", "jump", "resamples"), [(250, 10, 10), (25, 5, 5), (7, 10, 4), (12, 1, 2)])
def test_the_schedule_is_the_published_one(steps: int, jump: int, resamples: int) -> None:
    theirs = published(steps, jump_length=jump, jump_n_sample=resamples)
    assert visits(steps, jump=jump, resamples=resamples) == [steps - 1 - t for t in theirs]
