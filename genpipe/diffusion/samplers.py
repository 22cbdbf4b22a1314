"""Samplers, one signature: sampler(denoise, x, ts, *, schedule, generator) -> x0.

`denoise(x_t, t_B) -> x0` is the model with its conditioning, guidance and parameterization inside. `x` [B,
...] is the state at ts[0] (noise, if ts[0] = 1), `ts` [steps + 1] decreases. The state stays in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from genpipe.diffusion.parameterizations import to_noise
from genpipe.diffusion.schedules import Schedule, alpha_sigma, alpha_sigma_slopes

Denoise = Callable[[Tensor, Tensor], Tensor]


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

    The variance put back is eta^2 times that of q(x_next | x_t, x0), written for any alpha, sigma (Kingma et
    al. 2021, VDM, eq. 27-29). With eta 0 on the flow schedule this is exactly Euler on the velocity noise -
    x0.
    """
    if eta > 0 and generator is None:
        raise ValueError("ddim with eta > 0 draws noise: give it a generator")
    x, ts = x.float(), ts.to(x.device)
    for t, t_next in pairwise(ts):
        (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(t, schedule), alpha_sigma(t_next, schedule)
        x0 = denoise(x, t.expand(len(x))).float()
        noise = to_noise("x0", pred=x0, x_t=x, alpha=alpha, sigma=sigma)
        variance = torch.zeros_like(sigma)
        if eta > 0:
            stepped = (sigma.square() - (alpha / alpha_next * sigma_next).square()).clamp(min=0.0)
            variance = eta**2 * stepped * (sigma_next / sigma).square()
        x = alpha_next * x0 + (sigma_next.square() - variance).clamp(min=0.0).sqrt() * noise
        if eta > 0:
            x = x + variance.sqrt() * torch.randn(x.shape, generator=generator, device=x.device)
    return x


@torch.no_grad()
def heun(
    denoise: Denoise, x: Tensor, ts: Tensor, *, schedule: Schedule, generator: torch.Generator | None = None
) -> Tensor:
    """Heun on the probability-flow ODE dx/dt = alpha' x0 + sigma' noise; Karras et al. 2022, alg. 1.

    Two evaluations a step, one in a last step that ends at t = 0, where the ODE is singular. Deterministic:
    `generator` is accepted for the common signature and draws nothing.
    """
    x, ts = x.float(), ts.to(x.device)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(t, schedule)
        alpha_slope, sigma_slope = alpha_sigma_slopes(t, schedule)
        x0 = denoise(x, t.expand(len(x))).float()
        return alpha_slope * x0 + sigma_slope * to_noise("x0", pred=x0, x_t=x, alpha=alpha, sigma=sigma)

    for t, t_next in pairwise(ts.tolist()):
        if t_next == 0.0:
            x = denoise(x, torch.full((len(x),), t, device=x.device)).float()
            continue
        here, there = torch.tensor(t, device=x.device), torch.tensor(t_next, device=x.device)
        slope = velocity(x, here)
        slope_next = velocity(x + (t_next - t) * slope, there)
        x = x + (t_next - t) * 0.5 * (slope + slope_next)
    return x
