"""Solvers in lambda = ln(alpha / sigma), with the signature and terms of `samplers`.

With x0 held constant over a step from s to t, h = lambda_t - lambda_s, the solution of the probability-flow ODE is
x_t = sigma_t / sigma_s x_s + alpha_t (1 - e^-h) x0. The multistep methods, of one evaluation a step, correct it by x0's
slope in lambda, taken from the step before. They are of first order in the first step and in a step to t = 0; with
`lower_order_final`, as their authors' code calls it, in the last step wherever it ends, which keeps few steps stable.
A step from pure noise or to t = 0 has h = inf and comes out right: 1 - e^-h is 1.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from genpipe.diffusion.samplers import Denoise, Level, denoised, drawn, level_at, levels, needs, step_between
from genpipe.diffusion.schedules import Schedule


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    ts: Tensor,
    *,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    lower_order_final: bool = False,
) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022b, alg. 2."""
    return _dpmpp(denoise, x, ts, schedule=schedule, generator=None, lower_order_final=lower_order_final)


@torch.no_grad()
def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    ts: Tensor,
    *,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    lower_order_final: bool = False,
) -> Tensor:
    """SDE-DPM-Solver++(2M), Lu et al. 2022b: the same for the diffusion SDE; draws noise in each step.

    Raises ValueError without a generator.
    """
    needs(generator, because="dpmpp_2m_sde draws noise")
    return _dpmpp(denoise, x, ts, schedule=schedule, generator=generator, lower_order_final=lower_order_final)


def _dpmpp(
    denoise: Denoise,
    x: Tensor,
    ts: Tensor,
    *,
    schedule: Schedule,
    generator: torch.Generator | None,
    lower_order_final: bool,
) -> Tensor:
    """The ODE's solver without a generator, the SDE's with one."""
    x = x.float()
    before: tuple[Level, Tensor] | None = None
    stops = levels(ts, schedule)
    for here, there in pairwise(stops):
        x0 = denoised(denoise, x, here)
        h = there.log_ratio - here.log_ratio
        drift = x0
        if before is not None and not _of_first_order(there, stops, lower_order_final):
            drift = x0 + 0.5 * _slope(here, x0, before) * h
        kept = torch.exp(-h)
        if generator is None:
            x = there.sigma / here.sigma * x + there.alpha * (1 - kept) * drift
        else:
            x = there.sigma / here.sigma * kept * x + there.alpha * (1 - kept.square()) * drift
            if there.sigma > 0:
                x = x + there.sigma * (1 - kept.square()).sqrt() * drawn(x, generator)
        before = here, x0
    return x


@torch.no_grad()
def dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    ts: Tensor,
    *,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    discrete: bool = False,
) -> Tensor:
    """DPM-Solver++ of second order for the diffusion SDE, of single steps: two evaluations and draws a step.

    A DDPM step to half-way in lambda (to the nearest step of the table if `discrete`), then one over the whole way with
    the prediction found there (Lu et al. 2022b, alg. 1, for the SDE, as k-diffusion's sample_dpmpp_sde). The two
    draws are of one Brownian path in sigma / alpha. One evaluation in a step from pure noise or to t = 0, or
    where there is no time half-way. Raises ValueError without a generator.
    """
    needs(generator, because="dpmpp_sde draws noise")
    x = x.float()
    for here, there in pairwise(levels(ts, schedule)):
        x0, noise = denoised(denoise, x, here), drawn(x, generator)
        if there.sigma > 0 and here.alpha > 0:
            half = level_at((here.ratio * there.ratio).sqrt(), schedule, discrete=discrete)
            way = (half.log_ratio - here.log_ratio) / (there.log_ratio - here.log_ratio)
            if way > 0:
                step = step_between(here, half)
                x0_half = denoised(denoise, step.mean(x, x0) + step.small.sqrt() * noise, half)
                x0 = x0 + (x0_half - x0) / (2.0 * way)
                seen = (here.ratio - half.ratio) / (here.ratio - there.ratio)
                noise = seen.sqrt() * noise + (1.0 - seen).clamp(min=0.0).sqrt() * drawn(x, generator)
        step = step_between(here, there)
        x = step.mean(x, x0) + step.small.sqrt() * noise
    return x


@torch.no_grad()
def unipc(
    denoise: Denoise,
    x: Tensor,
    ts: Tensor,
    *,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    lower_order_final: bool = False,
) -> Tensor:
    """UniPC-2 (Zhao et al. 2023; multistep, predicting x0, B_2(h) = e^h - 1): a predictor, and a corrector for free.

    The prediction at a predicted state serves to correct that state, and then the next step. The predictor is of the
    second order where not of the first, the corrector of one order more.
    """
    x = x.float()
    history: list[tuple[Level, Tensor]] = []
    start = x
    stops = levels(ts, schedule)
    for here, there in pairwise(stops):
        x0 = denoised(denoise, x, here)
        if history:
            x = _corrected(start, x0, here, history=history)
        history = [*history[-1:], (here, x0)]
        start = x
        h = there.log_ratio - here.log_ratio
        drift = x0
        if len(history) == 2 and not _of_first_order(there, stops, lower_order_final):
            drift = x0 + 0.5 * _slope(here, x0, history[0]) * h
        x = there.sigma / here.sigma * x + there.alpha * (1 - torch.exp(-h)) * drift
    return x


def _of_first_order(there: Level, stops: list[Level], lower_order_final: bool) -> bool:
    """Whether the step to `there` does without the slope, which a step to t = 0 multiplies by infinity."""
    return bool(there.sigma == 0) or (lower_order_final and there is stops[-1])


def _corrected(x: Tensor, x0_next: Tensor, there: Level, *, history: list[tuple[Level, Tensor]]) -> Tensor:
    """UniC: the step to `there` from `x`, the state of the newest in `history`, knowing the prediction at its end.

    Of order 2 it is the closed form of the paper's two linear equations R(h) a = phi(h) / B(h), whose right sides are
    `first` and `second`: `share` goes to the slope of the step before, the rest to the difference to the end.
    """
    here, x0 = history[-1]
    h = there.log_ratio - here.log_ratio
    drift = x0 + 0.5 * (x0_next - x0)
    if len(history) == 2:
        b = torch.expm1(-h)
        first = (b / -h - 1) / b
        second = 2 * ((b / -h - 1) / -h - 0.5) / b
        ratio = (history[0][0].log_ratio - here.log_ratio) / h
        share = (first - second) / (1 - ratio)
        drift = x0 + share * _slope(here, x0, history[0]) * h + (first - share) * (x0_next - x0)
    return there.sigma / here.sigma * x + there.alpha * (1 - torch.exp(-h)) * drift


def _slope(here: Level, x0: Tensor, before: tuple[Level, Tensor]) -> Tensor:
    """d x0 / d lambda between the step before and here; 0 when that started from pure noise, infinitely far away."""
    level, x0_before = before
    return (x0 - x0_before) / (here.log_ratio - level.log_ratio)
