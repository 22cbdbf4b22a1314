"""Noise schedules, the distribution of training times, and the grid of sampling times.

Time t runs over [0, 1]; t = 0 is data, t = 1 is noise, and x_t = alpha(t) x0 + sigma(t) noise.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["cosine", "flow"]
TimeSampling = Literal["uniform", "logit_normal"]


def alpha_sigma(t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Signal and noise levels at times `t` (any shape, values in [0, 1]); both have the shape of `t`.

    cosine: alpha = cos(pi t / 2), sigma = sin(pi t / 2) (variance preserving; Nichol & Dhariwal 2021, without
    their offset). flow: alpha = 1 - t, sigma = t (rectified flow; Liu et al. 2022).

    Both reach alpha = 0 at t = 1 (zero terminal SNR). There x_t says nothing about x0, so an eps prediction
    cannot be turned into x0: see `parameterizations.MIN_ALPHA`.
    """
    if schedule == "cosine":
        # cos(pi/2) is -4e-8 in fp32: keep alpha from turning negative.
        return torch.cos(t * (math.pi / 2)).clamp(min=0.0), torch.sin(t * (math.pi / 2))
    if schedule == "flow":
        return 1.0 - t, t
    raise ValueError(f"unknown schedule {schedule!r}: use 'cosine' or 'flow'")


def alpha_sigma_slopes(t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Time derivatives (d alpha / dt, d sigma / dt) of `alpha_sigma`, of the shape of `t`."""
    if schedule == "cosine":
        half_pi = math.pi / 2
        return -half_pi * torch.sin(t * half_pi), half_pi * torch.cos(t * half_pi)
    if schedule == "flow":
        return -torch.ones_like(t), torch.ones_like(t)
    raise ValueError(f"unknown schedule {schedule!r}: use 'cosine' or 'flow'")


def expand_like(level_B: Tensor, x: Tensor) -> Tensor:
    """Append singleton axes to `level_B` so that it broadcasts against `x` (first axes equal)."""
    return level_B.reshape(level_B.shape + (1,) * (x.ndim - level_B.ndim))


def add_noise(x0: Tensor, *, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """x_t = alpha x0 + sigma noise for x0, noise [B, ...] and t [B] in [0, 1]."""
    alpha, sigma = alpha_sigma(t, schedule)
    return expand_like(alpha, x0) * x0 + expand_like(sigma, x0) * noise


def sample_t(n: int, *, kind: TimeSampling, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """`n` training times in (0, 1), fp32 [n].

    uniform: U(0, 1). logit_normal: sigmoid of a standard normal, Esser et al. 2024 (SD3) eq. 19 with m = 0, s
    = 1: more weight on the middle times, where the velocity is hardest to tell.
    """
    if kind == "uniform":
        return torch.rand(n, generator=generator, device=device)
    if kind == "logit_normal":
        return torch.sigmoid(torch.randn(n, generator=generator, device=device))
    raise ValueError(f"unknown kind of time sampling {kind!r}: use 'uniform' or 'logit_normal'")


def timesteps(steps: int, *, shift: float = 1.0) -> Tensor:
    """Sampling times 1 = t_0 > ... > t_steps = 0, fp32 [steps + 1] on the CPU.

    `shift` > 1 spends more steps at high noise, for larger images: t -> s t / (1 + (s - 1) t), SD3 eq. 23.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if shift <= 0:
        raise ValueError(f"shift must be positive, got {shift}")
    t = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    return (shift * t / (1.0 + (shift - 1.0) * t)).float()
