"""Exact likelihood by the probability-flow ODE (Song et al. 2021, score-based SDEs, eq. 39).

Shape legend: B batch; x is [B, ...] with N elements each.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from genpipe.diffusion.samplers import Denoise
from genpipe.diffusion.schedules import Schedule, alpha_sigma, sigma_range, time_at

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(x0 estimate [B, ...], the state y [B, ...] that it was made from) -> trace of its Jacobian [B]."""


def log_likelihood(
    denoise: Denoise, x: Tensor, *, schedule: Schedule, steps: int, generator: torch.Generator | None = None
) -> Tensor:
    """ln p(x) under the model, in nats, fp32 [B], for data `x` of about unit variance.

    In y = x_t / alpha and tau = ln(sigma / alpha) the ODE is dy/dtau = y - x0(y) on every schedule. It is solved
    with `steps` steps of the classical Runge-Kutta method (four evaluations each), evenly in tau over
    `sigma_range`, together with the integral of its divergence N - tr(d x0 / d y), and ends in a Gaussian of
    variance 1 + (sigma / alpha)^2. So p is the density of the data with the least noise of that range. Models of
    discrete times are asked between the steps of their table, too.

    The trace is Hutchinson's unbiased estimate with one Rademacher vector per sample, drawn from `generator`;
    exact, at N backward passes an evaluation, when none is given.
    """
    low, high = sigma_range(schedule)
    trace = _exact_trace if generator is None else _hutchinson(x, generator)

    def slope(y: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            x0 = _denoised(denoise, y, math.exp(tau), schedule=schedule)
            spread = trace(x0, y)
        return (y - x0).detach(), x[0].numel() - spread

    y, log_p = x.float(), x.new_zeros(len(x), dtype=torch.float32)
    h = math.log(high / low) / steps
    for i in range(steps):
        tau = math.log(low) + i * h
        k1, d1 = slope(y, tau)
        k2, d2 = slope(y + 0.5 * h * k1, tau + 0.5 * h)
        k3, d3 = slope(y + 0.5 * h * k2, tau + 0.5 * h)
        k4, d4 = slope(y + h * k3, tau + h)
        y = y + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        log_p = log_p + h / 6.0 * (d1 + 2.0 * d2 + 2.0 * d3 + d4)
    variance = 1.0 + high**2
    return log_p - 0.5 * (y.square() / variance + math.log(2.0 * math.pi * variance)).flatten(1).sum(1)


def bits_per_dimension(log_p: Tensor, *, dimensions: int, bin_width: float = 2.0 / 255.0) -> Tensor:
    """A density's ln p [B] as bits per dimension of the discrete data, [B].

    `bin_width` is the step of the discrete data in the units of x: 2/255 for 8-bit pixels in [-1, 1]. It is a
    bound for them if x had uniform noise of one bin's width added (dequantization; Theis et al. 2016, sec. 3.1).
    """
    return -log_p / (dimensions * math.log(2.0)) - math.log2(bin_width)


def _denoised(denoise: Denoise, y: Tensor, ratio: float, *, schedule: Schedule) -> Tensor:
    one = torch.ones((), dtype=torch.float64, device="cpu")
    t = time_at(one, ratio * one, schedule)
    alpha, _ = alpha_sigma(t, schedule)
    return denoise(alpha * y, y.new_full((len(y),), t.item()))[:, : y.shape[1]].float()


def _hutchinson(x: Tensor, generator: torch.Generator) -> Divergence:
    """v^T J v for one random v of signs, the same along the whole way; Song et al. 2021, eq. 40."""
    signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device).float() * 2.0 - 1.0

    def trace(x0: Tensor, y: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(x0, y, signs)
        return (product * signs).flatten(1).sum(1)

    return trace


def _exact_trace(x0: Tensor, y: Tensor) -> Tensor:
    flat = x0.flatten(1)
    diagonal = [
        torch.autograd.grad(flat[:, i].sum(), y, retain_graph=True)[0].flatten(1)[:, i] for i in range(flat.shape[1])
    ]
    return torch.stack(diagonal, dim=1).sum(1)
