"""Samplers of one step, one signature: sampler(denoise, x, ts, *, schedule, generator) -> x0.

`denoise(x_t, t_B)` is the model with its conditioning, guidance and parameterization inside: it gives x0 [B, C,
...], or [B, 2C, ...] with the fraction of a learned variance behind it. `x` [B, C, ...] is the state at ts[0] (noise,
if ts[0] = 1), `ts` [steps + 1] decreases. The state stays in fp32; the levels are fp64 numbers on the CPU, so that a
step never waits for the device. Samplers that draw nothing accept a `generator` for the common signature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from genpipe.diffusion.noise import normal
from genpipe.diffusion.parameterizations import SIGMA_DATA
from genpipe.diffusion.schedules import Schedule, alpha_sigma, expand_like, steps_of, time_at
from genpipe.diffusion.variance import Posterior, analytic_variance, interpolated_log_variance, posterior

Denoise = Callable[[Tensor, Tensor], Tensor]
Estimate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x [B, ...], the time [B] of its levels, the time [B] that the network is told) -> x0 and noise [B, ...]."""

Variance = Literal["small", "large", "learned", "analytic"]

MOST_CHURN = 2.0**0.5 - 1.0
"""No churn raises the noise by more than this share (Karras et al. 2022, alg. 2)."""


class Level(NamedTuple):
    """A time and its levels, fp64 [] on the CPU."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """lambda = ln(alpha / sigma), half the log-SNR; -inf at pure noise, inf at data."""
        return self.alpha.log() - self.sigma.log()

    @property
    def ratio(self) -> Tensor:
        """sigma / alpha, the sigma of Karras et al. 2022; inf at pure noise."""
        return self.sigma / self.alpha


def levels(ts: Tensor, schedule: Schedule) -> list[Level]:
    """The levels at each of the times `ts` [N]."""
    ts = ts.detach().to("cpu", torch.float64)
    return [Level(*parts) for parts in zip(ts, *alpha_sigma(ts, schedule), strict=True)]


def level_at(ratio: Tensor, schedule: Schedule, *, discrete: bool) -> Level:
    """The level where sigma / alpha is `ratio`, fp64 []; of the nearest step of the table if `discrete`."""
    t = time_at(torch.ones_like(ratio), ratio, schedule)
    if discrete:
        t = (t * steps_of(schedule)).round().clamp(min=1) / steps_of(schedule)
    return levels(t[None], schedule)[0]


def estimate(denoise: Denoise, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """x0 and the noise that the state `x` at `level` is taken apart into."""
    x0 = denoised(denoise, x, level)
    return x0, (x - level.alpha * x0) / level.sigma


@torch.no_grad()
def ddpm(
    denoise: Denoise,
    x: Tensor,
    ts: Tensor,
    *,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    variance: Variance = "small",
    sigma_data: float = SIGMA_DATA,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, alg. 2) over any times; no noise in a step that ends at t = 0.

    The variance of a step is DDPM's beta-tilde (small), its beta (large), or between them as the network says
    (learned; Nichol & Dhariwal 2021, eq. 15; needs the fraction behind x0), or the best for the size of x0 (analytic;
    Bao et al. 2022; for data of the deviation `sigma_data`).

    Raises ValueError without a generator, and for a learned variance of a model that learned none.
    """
    needs(generator, because="ddpm draws noise")
    x = x.float()
    for here, there in pairwise(levels(ts, schedule)):
        step = step_between(here, there)
        out = _told(denoise, x, here)
        x0, fraction = out[:, : x.shape[1]], out[:, x.shape[1] :]
        x = step.mean(x, x0)
        if there.sigma > 0:
            deviation = _deviation(step, x0, fraction, variance=variance, sigma_data=sigma_data)
            x = x + deviation * drawn(x, generator)
    return x


@torch.no_grad()
def ddim(
    denoise: Denoise,
    x: Tensor,
    ts: Tensor,
    *,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12); `eta` 0 is deterministic, 1 is ancestral sampling (needs a generator).

    The variance put back is eta^2 times that of q(x_next | x_t, x0). With eta 0 it is Euler's method on the
    probability-flow ODE, with eta 1 Euler's ancestral method and ddpm with the small variance; on the flow
    schedule, eta 0 is Euler on the velocity noise - x0. Raises ValueError for eta > 0 without a generator.
    """
    if eta > 0:
        needs(generator, because="ddim with eta > 0 draws noise")
    x = x.float()
    for here, there in pairwise(levels(ts, schedule)):
        x0, noise = estimate(denoise, x, here)
        variance = eta**2 * step_between(here, there).small
        x = there.alpha * x0 + (there.sigma.square() - variance).clamp(min=0.0).sqrt() * noise
        if variance > 0:
            x = x + variance.sqrt() * drawn(x, generator)
    return x


@torch.no_grad()
def invert(
    estimate_at: Estimate,
    x: Tensor,
    ts: Tensor,
    *,
    schedule: Schedule,
    bounded: Callable[[Tensor], Tensor] | None = None,
    refinements: int = 0,
) -> Tensor:
    """DDIM run backwards: the state at ts[-1] from which `ddim` over the same times leads back to `x`, at ts[0].

    `ts` [steps + 1] increases, for an image from 0. Each step asks for the state whose DDIM step ends here, and so
    for the prediction at a state not known yet. The usual inversion takes the state here for it, told the time there,
    and comes back to x up to the size of the steps; `bounded` keeps its x0 in bounds. Each of `refinements` (one
    evaluation a step) predicts again where that led (Pan et al. 2023, accelerated iterative diffusion inversion), and
    they converge to the exact state. One single step from data to pure noise has no such state.
    """
    x = x.float()
    bounded = bounded or (lambda x0: x0)
    for here, there in pairwise(levels(ts, schedule)):
        x0, noise = estimate_at(x, _times(x, here), _times(x, there))
        guess = there.alpha * bounded(x0) + there.sigma * noise
        # Solved on the straight line of x / (alpha + sigma), where the iteration contracts the most.
        size, size_next = here.alpha + here.sigma, there.alpha + there.sigma
        way = there.sigma / size_next - here.sigma / size
        for _ in range(refinements):
            x0, noise = estimate_at(guess, _times(x, there), _times(x, there))
            guess = size_next * (x / size + way * (noise - bounded(x0)))
        x = guess
    return x


@torch.no_grad()
def heun(
    denoise: Denoise,
    x: Tensor,
    ts: Tensor,
    *,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    discrete: bool = False,
) -> Tensor:
    """Heun's method on the probability-flow ODE; Karras et al. 2022, alg. 2. Two evaluations a step.

    On the flow schedule the ODE is dx/dt = noise - x0, on the others d(x / alpha) / d(sigma / alpha) = noise. One
    evaluation, Euler, in a step that ends at t = 0, or starts where sigma / alpha is infinite.

    `s_churn` adds noise before each step that starts at a sigma / alpha between `s_tmin` and `s_tmax`: s_churn / steps
    is the share by which sigma / alpha rises, of MOST_CHURN at most and to the schedule's end; to the nearest step of
    the table if `discrete`. `s_noise` scales the noise. Raises ValueError for churn without a generator.
    """
    if s_churn > 0:
        needs(generator, because="heun with s_churn > 0 draws noise")
    x = x.float()
    flow = schedule == "flow"
    churn = min(s_churn / (len(ts) - 1), MOST_CHURN)
    for here, there in pairwise(levels(ts, schedule)):
        if churn > 0 and here.alpha > 0 and s_tmin <= here.ratio <= s_tmax:
            raised = level_at((1.0 + churn) * here.ratio, schedule, discrete=discrete)
            added = (raised.ratio.square() - here.ratio.square()).clamp(min=0.0).sqrt()
            if added > 0:
                x = raised.alpha * (x / here.alpha + s_noise * added * drawn(x, generator))
                here = raised
        x0, noise = estimate(denoise, x, here)
        x_next = there.alpha * x0 + there.sigma * noise
        if there.sigma > 0 and (here.alpha > 0 or flow):
            x0_next, noise_next = estimate(denoise, x_next, there)
            if flow:
                x_next = x_next + 0.5 * (there.t - here.t) * ((noise_next - x0_next) - (noise - x0))
            else:
                x_next = x_next + 0.5 * there.alpha * (there.ratio - here.ratio) * (noise_next - noise)
        x = x_next
    return x


def needs(generator: torch.Generator | None, *, because: str) -> None:
    """Raise ValueError where there is no generator."""
    if generator is None:
        raise ValueError(f"{because}: give the sampler a generator")


def drawn(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of the shape of x, fp32."""
    return normal(tuple(x.shape), generator, device=x.device)


def denoised(denoise: Denoise, x: Tensor, level: Level) -> Tensor:
    """x0 at the state `x` [B, C, ...], fp32, without the fraction of a learned variance."""
    return _told(denoise, x, level)[:, : x.shape[1]]


def _told(denoise: Denoise, x: Tensor, level: Level) -> Tensor:
    return denoise(x, _times(x, level)).float()


def _times(x: Tensor, level: Level) -> Tensor:
    return x.new_full((len(x),), level.t.item())


def step_between(here: Level, there: Level) -> Posterior:
    """The step of the reverse process from `here` to `there`."""
    return posterior(alpha=here.alpha, sigma=here.sigma, alpha_next=there.alpha, sigma_next=there.sigma)


def _deviation(step: Posterior, x0: Tensor, fraction: Tensor, *, variance: Variance, sigma_data: float) -> Tensor:
    if variance == "analytic":
        return expand_like(analytic_variance(step, x0, sigma_data=sigma_data).sqrt(), x0)
    if variance == "small":
        return step.small.sqrt()
    if variance == "large":
        return step.large.sqrt()
    if fraction.shape[1] == 0:
        raise ValueError(
            "variance='learned' needs a model that learned it: use variance 'small' or 'large', or train with "
            "diffusion.variance='learned'"
        )
    return (0.5 * interpolated_log_variance(fraction, small=step.small, large=step.large)).exp()
