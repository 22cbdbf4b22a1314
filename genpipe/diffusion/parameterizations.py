"""What the network predicts, and exact conversions between the predictions.

eps: the noise. x0: the clean sample. v: alpha noise - sigma x0 (Salimans & Ho 2022). flow: noise - x0, the
velocity dx_t/dt of the flow schedule (Liu et al. 2022). edm: F of x0 = c_skip x_t + c_out F (Karras et al.
2022, table 1). `alpha` and `sigma` broadcast against x, or are [B] for x [B, ...].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from genpipe.diffusion.schedules import PURE_NOISE, Schedule, expand_like

Predict = Literal["eps", "x0", "v", "flow", "edm"]

SIGMA_DATA = 1.0
"""Standard deviation of the data in edm's preconditioning: 1 for what is standardized; the paper's pixels have 0.5."""

MIN_SIGMA = 1e-6
"""Floor under sigma when an x0 prediction becomes noise = (x_t - alpha x0) / sigma, left open at t = 0."""


def check_predict(predict: Predict, *, schedule: Schedule) -> None:
    """Raise ValueError for a prediction that is not defined, or cannot be turned into x0, on the schedule."""
    if predict == "flow" and schedule != "flow":
        raise ValueError(
            f"predict='flow' is the velocity of the flow schedule, not of schedule={schedule!r}: "
            "use schedule='flow', or predict='v' with this schedule"
        )
    if predict == "edm" and schedule != "edm":
        raise ValueError(
            f"predict='edm' is the preconditioning of schedule='edm', not of {schedule!r}: "
            "use schedule='edm', or predict='v' with this schedule"
        )
    if predict == "v" and schedule == "edm":
        raise ValueError(
            "predict='v' grows with sigma, which goes up to 80 on schedule='edm': use predict='edm', which stays of "
            "unit size there"
        )
    if predict == "eps" and schedule in PURE_NOISE:
        raise ValueError(
            f"predict='eps' says nothing about x0 where schedule={schedule!r} ends, in pure noise (zero terminal SNR; "
            "Lin et al. 2023, sec. 3.2): use predict='v' or 'x0', or schedule='linear', 'scaled_linear' or "
            "'cosine_iddpm'"
        )


def target(
    predict: Predict, *, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """The regression target for x_t = alpha x0 + sigma noise; shape of x0. ValueError for an unknown `predict`."""
    alpha, sigma = expand_like(alpha, x0), expand_like(sigma, x0)
    if predict == "eps":
        return noise
    if predict == "x0":
        return x0
    if predict == "v":
        return alpha * noise - sigma * x0
    if predict == "flow":
        return noise - x0
    if predict == "edm":
        # (x0 - c_skip x_t) / c_out, multiplied out so that nothing is divided by sigma.
        scale = sigma_data * torch.hypot(alpha * sigma_data, sigma)
        return (sigma * x0 - alpha * sigma_data**2 * noise) / scale
    raise _unknown(predict)


def to_x0(
    predict: Predict, *, pred: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """x0 from a prediction at x_t; shape of x_t. eps needs alpha > 0, see `check_predict`.

    v is inverted for any alpha, sigma (divided by alpha^2 + sigma^2, which is 1 when variance is preserved),
    flow likewise (divided by alpha + sigma, which is 1 on the flow schedule); so is edm, which with sigma_data
    = 1 and variance preserved is -v. Raises ValueError for an unknown `predict`.
    """
    alpha, sigma = expand_like(alpha, x_t), expand_like(sigma, x_t)
    if predict == "eps":
        return (x_t - sigma * pred) / alpha
    if predict == "x0":
        return pred
    if predict == "v":
        return (alpha * x_t - sigma * pred) / (alpha.square() + sigma.square())
    if predict == "flow":
        return (x_t - sigma * pred) / (alpha + sigma)
    if predict == "edm":
        size = torch.hypot(alpha * sigma_data, sigma)
        c_skip, c_out = alpha * (sigma_data / size).square(), sigma * sigma_data / size
        return c_skip * x_t + c_out * pred
    raise _unknown(predict)


def to_noise(
    predict: Predict, *, pred: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """The noise from a prediction at x_t; exact, except x0 where sigma < MIN_SIGMA. Shape of x_t.

    Raises ValueError for an unknown `predict`.
    """
    alpha, sigma = expand_like(alpha, x_t), expand_like(sigma, x_t)
    if predict == "eps":
        return pred
    if predict == "x0":
        return (x_t - alpha * pred) / sigma.clamp(min=MIN_SIGMA)
    if predict == "v":
        return (sigma * x_t + alpha * pred) / (alpha.square() + sigma.square())
    if predict == "flow":
        return (x_t + alpha * pred) / (alpha + sigma)
    if predict == "edm":
        size = torch.hypot(alpha * sigma_data, sigma)
        return sigma * x_t / size.square() - alpha * sigma_data / size * pred
    raise _unknown(predict)


def x0_gain(predict: Predict, *, alpha: Tensor, sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """How far x0 moves per unit of a prediction, |d x0 / d pred|; shape of alpha. Raises ValueError as `to_x0` does."""
    if predict == "eps":
        return sigma / alpha
    if predict == "x0":
        return torch.ones_like(sigma)
    if predict == "v":
        return sigma / (alpha.square() + sigma.square())
    if predict == "flow":
        return sigma / (alpha + sigma)
    if predict == "edm":
        return sigma * sigma_data / torch.hypot(alpha * sigma_data, sigma)
    raise _unknown(predict)


def network_input(x_t: Tensor, *, sigma: Tensor, schedule: Schedule, sigma_data: float = SIGMA_DATA) -> Tensor:
    """x_t as a network gets it, of bounded size: on edm times c_in = 1 / sqrt(sigma^2 + sigma_data^2), else x_t."""
    if schedule != "edm":
        return x_t
    return x_t / expand_like((sigma.square() + sigma_data**2).sqrt(), x_t)


def _unknown(predict: str) -> ValueError:
    return ValueError(f"unknown prediction {predict!r}: use 'eps', 'x0', 'v', 'flow' or 'edm'")
