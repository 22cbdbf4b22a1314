"""Distributions whose denoiser, probability flow and density are known in closed form, and a schedule's names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from genpipe.diffusion.samplers import Denoise, Estimate
from genpipe.diffusion.schedules import Schedule, ScheduleName, alpha_sigma, time_at

SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)


@dataclass(frozen=True)
class Mixture:
    """sum_k weights[k] N(modes[k], std^2 I); modes [K, D]."""

    modes: Tensor
    weights: Tensor
    std: float

    def log_density(self, x: Tensor) -> Tensor:
        """ln p(x) [B] of x [B, D]."""
        squares = (x[:, None] - self.modes).square().sum(-1) / self.std**2
        dims = self.modes.shape[1]
        return torch.logsumexp(
            self.weights.log() - 0.5 * squares - dims * math.log(self.std * math.sqrt(2 * math.pi)), 1
        )

    def denoiser(self, schedule: Schedule) -> Denoise:
        """E[x0 | x_t] for x [B, D]: of every mode its posterior mean, by the posterior weight of the mode."""

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = (level[:, None, None] for level in alpha_sigma(t, schedule))
            variance = alpha.square() * self.std**2 + sigma.square()
            off = x[:, None] - alpha * self.modes.to(x.dtype)
            posterior = torch.softmax(self.weights.log() - (off.square() / (2 * variance)).sum(-1), dim=1)
            means = self.modes + alpha * self.std**2 / variance * off
            return (posterior[..., None] * means).sum(1)

        return denoise

    def estimator(self, schedule: Schedule) -> Estimate:
        """That of a network that predicts the noise: E[noise | x_t] at the time it is told, and x0 at that of x."""
        denoise = self.denoiser(schedule)

        def estimate(x: Tensor, t: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
            x0, (alpha, sigma) = denoise(x, told), [level[:, None] for level in alpha_sigma(told, schedule)]
            noise = (x - alpha * x0) / sigma
            if not torch.equal(t, told):
                alpha, sigma = [level[:, None] for level in alpha_sigma(t, schedule)]
                x0 = (x - sigma * noise) / alpha
            return x0, noise

        return estimate


GAUSSIAN = Mixture(torch.tensor([[0.7]]), torch.ones(1), 0.6)
TWO = Mixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.3, 0.7]), 0.1)


def gaussian_flow(z: Tensor, *, ratio: float | None = None) -> Tensor:
    """Where the probability flow takes x / alpha to from z sigma / alpha + mean at infinite noise, in GAUSSIAN.

    At sigma / alpha = `ratio`; at t = 0 if none is given. The flow scales y - mean as the deviation of y.
    """
    mean, std = GAUSSIAN.modes[0, 0], GAUSSIAN.std
    return mean + math.hypot(std, 0.0 if ratio is None else ratio) * z


def even_in_log_snr(steps: int, *, schedule: Schedule, high: float, low: float) -> Tensor:
    """Times at which sigma / alpha falls geometrically from `high` to `low`, fp64 [steps + 1]."""
    ratio = high * (low / high) ** (torch.arange(steps + 1, dtype=torch.float64) / steps)
    return time_at(torch.ones_like(ratio), ratio, schedule)
