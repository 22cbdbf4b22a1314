"""RePaint (Lugmayr et al. 2022): a model of whole images draws the parts that are missing. Terms as in `samplers`."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from genpipe.diffusion.samplers import Denoise, denoised, drawn, levels, step_between
from genpipe.diffusion.schedules import Schedule


@torch.no_grad()
def repaint(
    denoise: Denoise,
    x: Tensor,
    ts: Tensor,
    *,
    schedule: Schedule,
    known: Tensor,
    keep: Tensor,
    generator: torch.Generator,
    jump: int = 10,
    resamples: int = 10,
) -> Tensor:
    """Lugmayr et al. 2022, alg. 1: x0 [B, C, ...] that is `known` where `keep` is true, exactly, and drawn elsewhere.

    known [B, C, ...] is the data, of which only what is kept counts; keep is bool and broadcasts to it. Each step is
    ddpm's with the small variance; what is kept is then put in with noise of its level. So that the rest comes to agree
    with it, the state goes back to more noise by `jump` steps and down again, `resamples` times over in all from
    each level (section 4.2; the paper has 10 and 10 for 250 steps). 1 is no resampling. Where steps are few the rest
    agrees less than a draw from the conditional distribution would.
    """
    x, known = x.float(), known.float()
    stops = levels(ts, schedule)
    for i, j in pairwise(visits(len(ts) - 1, jump=jump, resamples=resamples)):
        here, there = stops[i], stops[j]
        if j < i:  # back to more noise
            step = step_between(there, here)
            x = there.alpha / here.alpha * x + step.large.sqrt() * drawn(x, generator)
            continue
        step = step_between(here, there)
        x = step.mean(x, denoised(denoise, x, here))
        if there.sigma == 0:
            return torch.where(keep, known, x)
        noise, noise_known = drawn(x, generator), drawn(x, generator)
        x = torch.where(keep, there.alpha * known + there.sigma * noise_known, x + step.small.sqrt() * noise)
    raise AssertionError("the last visit is to t = 0")


def visits(steps: int, *, jump: int, resamples: int) -> list[int]:
    """The places in a sampler's times where RePaint stops, from 0, noise, to `steps`, data (appendix B, schedule).

    Jumps lead from the last place before data, and from every `jump` steps ahead of it that leave room for one.
    """
    left = {at: resamples - 1 for at in range(steps - 1, jump - 1, -jump)}
    stops = [0]
    while stops[-1] < steps:
        stops.append(stops[-1] + 1)
        if left.get(stops[-1], 0) > 0:
            left[stops[-1]] -= 1
            stops += range(stops[-1] - 1, stops[-1] - jump - 1, -1)
    return stops
