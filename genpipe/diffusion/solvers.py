"""Multistep solvers in lambda = ln(alpha / sigma): the signature and terms of `samplers`, one evaluation a step.

With x0 held constant over a step from s to t, h = lambda_t - lambda_s, the solution of the probability-flow ODE is
x_t = sigma_t / sigma_s x_s + alpha_t (1 - e^-h) x0. These methods correct it by x0's slope in lambda, taken from the
step before. A step from pure noise or to t = 0 has h = inf and comes out right: 1 - e^-h is 1.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from genpipe.diffusion.samplers import Denoise, Level, drawn, estimate, levels, needs
from genpipe.diffusion.schedules import Schedule


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoise, x: Tensor, ts: Tensor, *, schedule: Schedule, generator: torch.Generator | None = None
) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022b, alg. 2; of first order in its first step and to t = 0."""
    return _dpmpp(denoise, x, ts, schedule=schedule, generator=None)


@torch.no_grad()
def dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, ts: Tensor, *, schedule: Schedule, generator: torch.Generator | None = None
) -> Tensor:
    """SDE-DPM-Solver++(2M), Lu et al. 2022b: the same for the diffusion SDE; draws noise in each step."""
    needs(generator, because="dpmpp_2m_sde draws noise")
    return _dpmpp(denoise, x, ts, schedule=schedule, generator=generator)


def _dpmpp(denoise: Denoise, x: Tensor, ts: Tensor, *, schedule: Schedule, generator: torch.Generator | None) -> Tensor:
    """The ODE's solver without a generator, the SDE's with one."""
    x = x.float()
    before: tuple[Level, Tensor] | None = None
    for here, there in pairwise(levels(ts, schedule)):
        x0, _ = estimate(denoise, x, here)
        h = there.log_ratio - here.log_ratio
        drift = x0
        if before is not None and there.sigma > 0:
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
def unipc(
    denoise: Denoise, x: Tensor, ts: Tensor, *, schedule: Schedule, generator: torch.Generator | None = None
) -> Tensor:
    """UniPC-2 (Zhao et al. 2023; multistep, predicting x0, B_2(h) = e^h - 1): a predictor, and a corrector for free.

    The prediction at a predicted state serves to correct that state, and then the next step. The predictor is of
    first order in the first step and to t = 0, else of the second, the corrector of one order more.
    """
    x = x.float()
    history: list[tuple[Level, Tensor]] = []
    start = x
    for here, there in pairwise(levels(ts, schedule)):
        x0, _ = estimate(denoise, x, here)
        if history:
            x = _corrected(start, x0, here, history=history)
        history = [*history[-1:], (here, x0)]
        start = x
        h = there.log_ratio - here.log_ratio
        drift = x0
        if len(history) == 2 and there.sigma > 0:
            drift = x0 + 0.5 * _slope(here, x0, history[0]) * h
        x = there.sigma / here.sigma * x + there.alpha * (1 - torch.exp(-h)) * drift
    return x


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
