"""One step of the reverse process: the posterior of x_s given x_t and x0, and a variance that is learned.

Times s < t. The step from t to s is Gaussian, and all of it follows from the levels at its ends (Ho et al. 2020,
eq. 6-7; for any alpha and sigma Kingma et al. 2021, VDM, appendix A). Shape legend: B batch; x is [B, ...].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from genpipe.diffusion.parameterizations import SIGMA_DATA
from genpipe.diffusion.schedules import Schedule, alpha_sigma, expand_like, steps_of


class Posterior(NamedTuple):
    """q(x_s | x_t, x0) = N(of_x x_t + of_x0 x0, small), and `large`, the variance of q(x_t | x_s).

    These are DDPM's beta-tilde, right for data at one point, and its beta, right for data of unit variance.
    """

    of_x: Tensor
    of_x0: Tensor
    small: Tensor
    large: Tensor

    def mean(self, x_t: Tensor, x0: Tensor) -> Tensor:
        """The Gaussian's mean [B, ...] for x_t, x0 [B, ...]; the levels are [B] or numbers []."""
        return expand_like(self.of_x, x_t) * x_t + expand_like(self.of_x0, x_t) * x0


def posterior(*, alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor) -> Posterior:
    """The step from the levels at t to those at s (`next`), which have less noise; all of one shape.

    Give them in fp64: their differences are small.
    """
    kept = alpha / alpha_next
    large = (sigma.square() - (kept * sigma_next).square()).clamp(min=0.0)
    share = sigma_next.square() / sigma.square()
    return Posterior(of_x=kept * share, of_x0=alpha_next * large / sigma.square(), small=share * large, large=large)


def interpolated_log_variance(fraction: Tensor, *, small: Tensor, large: Tensor) -> Tensor:
    """ln of the variance between `small` (fraction -1) and `large` (1), geometrically; [B, ...] for levels [B].

    Nichol & Dhariwal 2021, eq. 15, with their code's range of -1 to 1 for what the network gives.
    """
    share = (fraction + 1.0) / 2.0
    return share * expand_like(large, fraction).log() + (1.0 - share) * expand_like(small, fraction).log()


def analytic_variance(step: Posterior, x0: Tensor, *, sigma_data: float = SIGMA_DATA) -> Tensor:
    """The best variance of a step, as large as the error of the estimate `x0` [B, ...]; fp32 [B].

    Var(x_s | x_t) = small + of_x0^2 Var(x0 | x_t), and on average over the dimensions Var(x0 | x_t) is the data's mean
    square, `sigma_data`^2, less that of its estimate (Bao et al. 2022, Analytic-DPM, in terms of x0). Theirs is
    averaged over the data beforehand, ours over the dimensions of each sample: right for the many of an embedding or
    an image.
    """
    error = (sigma_data**2 - x0.square().flatten(1).mean(1)).clamp(min=0.0)
    return (step.small + step.of_x0.square() * error).float()


def variational_loss(
    *, x0: Tensor, x_t: Tensor, x0_pred: Tensor, fraction: Tensor, t_B: Tensor, schedule: Schedule
) -> Tensor:
    """The bound's term at `t_B` in bits per dimension, fp32 [B]: how far the model's step is from the posterior.

    KL(q(x_s | x_t, x0) || p(x_s | x_t)) for the step to s, one step of the table before t (t - 1/1000 where it has
    1,000), and for the last step, to 0, the negative log-likelihood of 8-bit data in [-1, 1] (Nichol & Dhariwal 2021,
    eq. 4-7). Give `x0_pred` detached: the gradient then reaches the variance's `fraction` alone (their section 3.1).
    All [B, ...] but t_B [B].
    """
    step = 1.0 / steps_of(schedule)
    t = t_B.double()
    last = t < 1.5 * step
    step_t = _step(t, torch.where(last, torch.zeros_like(t), t - step), schedule=schedule)
    # The last step's `small` is 0: as in their code, that of the step before it stands in.
    earlier = t.clamp(min=2 * step)
    small = torch.where(last, _step(earlier, earlier - step, schedule=schedule).small, step_t.small).float()
    step_t = Posterior(*(part.float() for part in step_t))
    log_variance = interpolated_log_variance(fraction.float(), small=small, large=step_t.large)
    mean = step_t.mean(x_t.float(), x0_pred.float())
    true_mean, true_log_variance = step_t.mean(x_t.float(), x0.float()), expand_like(small, x0).log()
    gap = true_log_variance - log_variance
    kl = 0.5 * (gap.exp() - gap - 1.0 + (true_mean - mean).square() * (-log_variance).exp())
    nll = -discretized_log_likelihood(x0.float(), mean=mean, log_std=0.5 * log_variance)
    return torch.where(last, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2.0)


def discretized_log_likelihood(x: Tensor, *, mean: Tensor, log_std: Tensor) -> Tensor:
    """ln of the probability that a Gaussian falls into the 8-bit bin around x in [-1, 1]; shape of x.

    Ho et al. 2020, eq. 13: bins are 2/255 wide, the outermost reach to infinity. From the logarithms of the
    Gaussian's distribution function and in its lower tail, so that it stays finite arbitrarily far out.
    """
    scale = (-log_std).exp()
    low, high = (x - mean - 1.0 / 255.0) * scale, (x - mean + 1.0 / 255.0) * scale
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    upto_high = torch.special.log_ndtr(high)
    # ln(e^b - e^a) = b + ln(1 - e^(a - b)); the ends of the scale are one-sided.
    inside = upto_high + torch.log(-torch.expm1((torch.special.log_ndtr(low) - upto_high).clamp(max=-1e-7)))
    below = torch.special.log_ndtr((x - mean + 1.0 / 255.0) * scale)
    above = torch.special.log_ndtr(-(x - mean - 1.0 / 255.0) * scale)
    return torch.where(x < -0.999, below, torch.where(x > 0.999, above, inside))


def _step(t: Tensor, s: Tensor, *, schedule: Schedule) -> Posterior:
    (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(t, schedule), alpha_sigma(s, schedule)
    return posterior(alpha=alpha, sigma=sigma, alpha_next=alpha_next, sigma_next=sigma_next)
