"""Variational bounds against the entropy of 8-bit data whose best denoiser is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genpipe.diffusion.bounds import continuous_bound, stepwise_bound
from genpipe.diffusion.samplers import Denoise
from genpipe.diffusion.schedules import Schedule, Table, alpha_sigma

VALUES = torch.linspace(-1.0, 1.0, 256)
MEAN, STD = 0.1, 0.3
SHAPE = (256, 2, 16)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_chances() -> Tensor:
    """ln of a Gaussian's share in each of the 256 bins, fp32 [256]."""
    return torch.log_softmax(-0.5 * ((VALUES - MEAN) / STD).square(), dim=0)


def denoiser(schedule: Schedule) -> Denoise:
    """E[x0 | x_t] of values that are independent, each by its posterior over the 256."""
    log_p = log_chances()

    def denoise(x_t: Tensor, t_B: Tensor) -> Tensor:
        alpha, sigma = (level.view(-1, 1, 1, 1).float() for level in alpha_sigma(t_B.double(), schedule))
        off = (x_t[..., None] - alpha * VALUES) / sigma
        return torch.softmax(log_p - 0.5 * off.square(), dim=-1) @ VALUES

    return denoise


def with_fraction(denoise: Denoise, fraction: float) -> Denoise:
    """As of a network that learned its variance, and learned the same everywhere."""

    def both(x_t: Tensor, t_B: Tensor) -> Tensor:
        return torch.cat([denoise(x_t, t_B), torch.full_like(x_t, fraction)], dim=1)

    return both


@pytest.fixture(scope="module")
def data() -> Tensor:
    """Values of the distribution, fp32 of SHAPE."""
    chosen = torch.multinomial(log_chances().exp(), math.prod(SHAPE), replacement=True, generator=gen())
    return VALUES[chosen].view(SHAPE)


@pytest.fixture(scope="module")
def bits(data: Tensor) -> float:
    """-log2 p of the data, a value."""
    index = ((data + 1.0) * 127.5).round().long()
    return -log_chances()[index].mean().item() / math.log(2.0)


@pytest.mark.parametrize("schedule", ["cosine", "flow", "edm"])
def test_the_bound_of_infinitely_many_steps_is_tight(schedule: Schedule, data: Tensor, bits: float) -> None:
    """For the best denoiser, and but for what the least noise hides: 2 % of edm's are nearer to another value."""
    found = continuous_bound(denoiser(schedule), data, schedule=schedule, terms=48, generator=gen(1))
    assert found.shape == (len(data),)
    sem = found.std().item() / len(found) ** 0.5
    assert bits - 3 * sem < found.mean().item() < bits + 3 * sem + 0.02 and sem < 0.05


def test_more_steps_make_a_tighter_bound(data: Tensor, bits: float) -> None:
    """And none lies below. The first steps cost most, until all of them have less noise than a bin is wide."""
    gaps = []
    for steps in (250, 16_000, 256_000):
        schedule = Table("cosine_iddpm", steps)
        found = stepwise_bound(denoiser(schedule), data, schedule=schedule, terms=32, generator=gen(1))
        gaps.append(found.mean().item() - bits)
        assert gaps[-1] > -3 * found.std().item() / len(found) ** 0.5
    assert gaps[0] > gaps[1] + 0.1 and gaps[1] > gaps[2] + 0.1 and gaps[2] < 0.2


@pytest.mark.parametrize("schedule", ["linear", "linear_zsnr", "cosine"])
def test_steps_that_are_drawn_give_the_sum_of_all(schedule: Schedule, data: Tensor) -> None:
    """On average over many draws for the same eight values."""

    def of_copies(count: int, terms: int) -> Tensor:
        copies = data[:1, :1, :8].expand(count, 1, 8)
        return stepwise_bound(denoiser(schedule), copies, schedule=schedule, terms=terms, generator=gen())

    every, drawn = of_copies(96, 999), of_copies(4096, 24)
    sem = math.hypot(every.std().item() / 96**0.5, drawn.std().item() / 4096**0.5)
    assert sem < 0.3 and drawn.mean().item() == pytest.approx(every.mean().item(), abs=4 * sem)


@pytest.mark.parametrize(("fraction", "variance"), [(-1.0, "small"), (1.0, "large")])
def test_a_learned_variance_takes_the_place_of_a_fixed_one(fraction: float, variance: str, data: Tensor) -> None:
    few, schedule = data[:4], Table("linear", 50)
    denoise = denoiser(schedule)
    learned = with_fraction(denoise, fraction)
    found = stepwise_bound(learned, few, schedule=schedule, terms=49, generator=gen())
    fixed = stepwise_bound(denoise, few, schedule=schedule, terms=49, generator=gen(), variance=variance)  # type: ignore[arg-type]
    torch.testing.assert_close(found, fixed)


def test_estimates_are_clipped_to_where_the_data_is(data: Tensor) -> None:
    few = data[:4]

    def constant(value: float) -> Tensor:
        return continuous_bound(lambda x, t: torch.full_like(x, value), few, schedule="flow", terms=4, generator=gen())

    torch.testing.assert_close(constant(70.0), constant(1.0))
    assert not torch.allclose(constant(0.5), constant(1.0))
