"""Variational bounds on the negative log-likelihood of 8-bit data, in bits per dimension.

Of a process of steps the sum over them (Ho et al. 2020, eq. 5; Nichol & Dhariwal 2021, eq. 4-7), of a continuous one
the integral that this sum becomes with ever more steps (Kingma et al. 2021, VDM, sec. 4-5). Both are estimated from
`terms` times a sample, one in each of as many strata, without bias. Estimates of x0 are clipped to [-1, 1], where the
data is.

Shape legend: B batch, C channels, K terms; x is [B, C, ...].
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from genpipe.diffusion.samplers import Denoise
from genpipe.diffusion.schedules import Schedule, add_noise, alpha_sigma, sigma_range, steps_of, time_at
from genpipe.diffusion.variance import variational_loss

FixedVariance = Literal["small", "large"]

FRACTIONS: dict[FixedVariance, float] = {"small": -1.0, "large": 1.0}
"""A variance that is not learned, as a model would say it that learned it (`variance.interpolated_log_variance`)."""


@torch.no_grad()
def stepwise_bound(
    denoise: Denoise,
    x0: Tensor,
    *,
    schedule: Schedule,
    terms: int,
    generator: torch.Generator,
    variance: FixedVariance = "small",
) -> Tensor:
    """L_T + sum of L_t + L_0 over the steps i / N of a schedule, i = 1 ... N, in bits per dimension, fp32 [B].

    `x0` [B, C, ...] is 8-bit data in [-1, 1]. The steps' variance is what `denoise` gives behind the estimate of x0,
    if it does, else `variance`. L_T and L_0 are always there. With N - 1 `terms` or more each L_t is measured once, as
    the papers do; with fewer, steps are drawn half in proportion to their share of ln(sigma / alpha), over which the
    bound spreads nearly evenly, and half evenly.
    """
    steps, count = steps_of(schedule), len(x0)

    def term(t_B: Tensor) -> Tensor:
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        x_t = add_noise(x0, noise=noise, t=t_B, schedule=schedule)
        estimate, fraction = _estimate(denoise, x_t, t_B)
        if not fraction.shape[1]:
            fraction = torch.full_like(estimate, FRACTIONS[variance])
        return variational_loss(x0=x0, x_t=x_t, x0_pred=estimate, fraction=fraction, t_B=t_B, schedule=schedule)

    if terms >= steps - 1:
        index = torch.arange(steps - 1, device=x0.device)[:, None].expand(-1, count)
        weight = torch.ones(index.shape, device=x0.device)
    else:
        chance = _chances(schedule, device=x0.device)
        index = torch.searchsorted(chance.cumsum(0), _stratified(terms, count, generator), right=True)
        index = index.clamp(max=steps - 2)
        weight = (1.0 / (terms * chance[index])).float()
    bits = _prior(x0, *_end(schedule)) / math.log(2.0) + term(x0.new_full((count,), 1.0 / steps))
    for index_B, weight_B in zip(index, weight, strict=True):
        bits = bits + weight_B * term(((index_B + 2).double() / steps).float())
    return bits


@torch.no_grad()
def continuous_bound(
    denoise: Denoise, x0: Tensor, *, schedule: Schedule, terms: int, generator: torch.Generator
) -> Tensor:
    """The bound of infinitely many steps, in bits per dimension, fp32 [B], for 8-bit data `x0` [B, C, ...] in [-1, 1].

    From the most noise of `sigma_range` to the least: the prior's KL, the integral of SNR |x0 - estimate|^2 over
    ln(sigma / alpha), which is the same on every schedule, and the data's reconstruction from what has the least noise,
    each value for itself and by the noise alone (their sec. 3.3).
    """
    low, high = sigma_range(schedule)
    width = math.log(high / low)
    nats = _prior(x0, 1.0, high) + _reconstruction(x0, low, generator)
    for share_B in _stratified(terms, len(x0), generator):
        ratio = low * (width * share_B).exp()
        t_B = time_at(torch.ones_like(ratio), ratio, schedule).float()
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        estimate, _ = _estimate(denoise, add_noise(x0, noise=noise, t=t_B, schedule=schedule), t_B)
        alpha, sigma = alpha_sigma(t_B.double(), schedule)
        error = (x0 - estimate).square().flatten(1).mean(1)
        nats = nats + width / terms * (alpha / sigma).square().float() * error
    return nats / math.log(2.0)


def _estimate(denoise: Denoise, x_t: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """The estimate of x0 in [-1, 1], and the fraction of a learned variance, of no channels where there is none."""
    out, channels = denoise(x_t, t_B).float(), x_t.shape[1]
    return out[:, :channels].clamp(-1.0, 1.0), out[:, channels:]


def _stratified(terms: int, count: int, generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1), fp64 [terms, count]: one of each row in each of as many strata."""
    drawn = torch.rand(terms, count, generator=generator, device=generator.device, dtype=torch.float64)
    return (torch.arange(terms, device=generator.device)[:, None] + drawn) / terms


def _chances(schedule: Schedule, *, device: torch.device) -> Tensor:
    """How likely each of the steps 2 ... N is drawn, fp64 [N - 1]."""
    steps = steps_of(schedule)
    alpha, sigma = alpha_sigma(torch.arange(1, steps + 1, dtype=torch.float64, device=device) / steps, schedule)
    width = (sigma / alpha).clamp(max=sigma_range(schedule)[1]).log().diff()
    return 0.5 * width / width.sum() + 0.5 / (steps - 1)


def _end(schedule: Schedule) -> tuple[float, float]:
    alpha, sigma = alpha_sigma(torch.ones((), dtype=torch.float64, device="cpu"), schedule)
    return alpha.item(), sigma.item()


def _prior(x0: Tensor, alpha: float, sigma: float) -> Tensor:
    """KL(q(x_1 | x0) || N(0, alpha^2 + sigma^2)) in nats per dimension, [B]: samplers start from the latter."""
    variance = alpha**2 + sigma**2
    squares = (alpha * x0.float()).square().flatten(1).mean(1)
    return 0.5 * ((sigma**2 + squares) / variance - 1.0 + math.log(variance / sigma**2))


def _reconstruction(x0: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    """-ln p(x0 | x0 + ratio noise) in nats per dimension, [B], if all 256 values were as likely before."""
    noisy = x0 + ratio * torch.randn(x0.shape, generator=generator, device=x0.device)
    total = torch.full_like(noisy, -math.inf)
    for value in torch.linspace(-1.0, 1.0, 256).tolist():
        total = torch.logaddexp(total, -((noisy - value) / ratio).square() / 2.0)
    return (total + ((noisy - x0) / ratio).square() / 2.0).flatten(1).mean(1)
