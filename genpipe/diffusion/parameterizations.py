"""What the network predicts, and exact conversions between the predictions.

eps: the noise. x0: the clean sample. v: alpha noise - sigma x0 (Salimans & Ho 2022). flow: noise - x0, the
velocity dx_t/dt of the flow schedule (Liu et al. 2022). `alpha` and `sigma` broadcast against x, or are [B]
for x [B, ...].
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from genpipe.diffusion.schedules import Schedule, expand_like

Predict = Literal["eps", "x0", "v", "flow"]

MIN_ALPHA = 6e-3
"""Floor under alpha when an eps prediction is turned into x0 = (x_t - sigma eps) / alpha.

Both schedules end at alpha = 0, where this division has no answer. The floor is the last alpha of DDPM's
linear schedule, so the first sampling step is as well (and as badly) conditioned as in DDPM; v, x0 and flow
need no floor.
"""

MIN_SIGMA = 1e-6
"""Floor under sigma when an x0 prediction becomes noise = (x_t - alpha x0) / sigma, left open at t = 0."""


def check_predict(predict: Predict, *, schedule: Schedule) -> None:
    """Refuse a prediction that is not defined on the schedule.

    Raises ValueError for flow on the cosine schedule: noise - x0 is dx_t/dt only where alpha = 1 - t, sigma =
    t.
    """
    if predict == "flow" and schedule != "flow":
        raise ValueError(
            f"predict='flow' is the velocity of the flow schedule, not of schedule={schedule!r}: "
            "use schedule='flow', or predict='v' with this schedule"
        )


def target(predict: Predict, *, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The regression target for x_t = alpha x0 + sigma noise; shape of x0."""
    alpha, sigma = expand_like(alpha, x0), expand_like(sigma, x0)
    if predict == "eps":
        return noise
    if predict == "x0":
        return x0
    if predict == "v":
        return alpha * noise - sigma * x0
    if predict == "flow":
        return noise - x0
    raise _unknown(predict)


def to_x0(predict: Predict, *, pred: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x0 from a prediction at x_t; exact, except eps where alpha < MIN_ALPHA. Shape of x_t.

    v is inverted for any alpha, sigma (divided by alpha^2 + sigma^2, which is 1 when variance is preserved),
    flow likewise (divided by alpha + sigma, which is 1 on the flow schedule).
    """
    alpha, sigma = expand_like(alpha, x_t), expand_like(sigma, x_t)
    if predict == "eps":
        return (x_t - sigma * pred) / alpha.clamp(min=MIN_ALPHA)
    if predict == "x0":
        return pred
    if predict == "v":
        return (alpha * x_t - sigma * pred) / (alpha.square() + sigma.square())
    if predict == "flow":
        return (x_t - sigma * pred) / (alpha + sigma)
    raise _unknown(predict)


def to_noise(predict: Predict, *, pred: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise from a prediction at x_t; exact, except x0 where sigma < MIN_SIGMA. Shape of x_t."""
    alpha, sigma = expand_like(alpha, x_t), expand_like(sigma, x_t)
    if predict == "eps":
        return pred
    if predict == "x0":
        return (x_t - alpha * pred) / sigma.clamp(min=MIN_SIGMA)
    if predict == "v":
        return (sigma * x_t + alpha * pred) / (alpha.square() + sigma.square())
    if predict == "flow":
        return (x_t + alpha * pred) / (alpha + sigma)
    raise _unknown(predict)


def _unknown(predict: str) -> ValueError:
    return ValueError(f"unknown prediction {predict!r}: use 'eps', 'x0', 'v' or 'flow'")
