"""Image to image by strength: noise is added to a picture and taken away again (SDEdit; Meng et al. 2022).

For systems of all kinds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genpipe.diffusion.process import denoiser, sample_from, sampling_times
from genpipe.diffusion.schedules import add_noise
from genpipe.generation.conditions import Conditions
from genpipe.generation.drawing import Drawing, bound, told


@torch.no_grad()
def redraw(
    system: Drawing, images: Tensor, conditions: Conditions, *, strength: float, generator: torch.Generator
) -> Tensor:
    """The decoder's pictures from other pictures [B, 3, S, S] in [-1, 1], and of their size.

    Meng et al. 2022, alg. 1, with any sampler: it begins at its first time that is no later than `strength`, their t0
    in (0, 1], instead of at noise. At 1 the picture is forgotten if the schedule ends in pure noise. Raises ValueError
    for a strength that is no time, or that leaves none of the sampler's steps.
    """
    ts = times_from(sampling_times(system.decoder_sampler, system.decoder_diffusion), strength)
    given, negative = told(system, conditions, generator=generator)
    model = bound(system, given, count=conditions.count, negative=negative)
    x0, diffusion = system.encode(images), system.decoder_diffusion
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    first = ts[:1].to(x0.device).expand(len(x0))
    x = add_noise(x0, noise=noise, t=first, schedule=diffusion.noise_schedule)
    found = sample_from(
        denoiser(model, diffusion), x, ts, system.decoder_sampler, diffusion=diffusion, generator=generator
    )
    return system.decode(found)


def times_from(ts: Tensor, strength: float) -> Tensor:
    """Those of a sampler's times that are no later than `strength`. Raises ValueError where no step is left."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength lies between 0, the picture as it is, and 1, another one; not {strength:g}")
    left = ts[ts <= strength + 1e-6]
    if len(left) < 2:
        raise ValueError(f"strength {strength:g} leaves none of {len(ts) - 1} steps; raise one of them")
    return left
