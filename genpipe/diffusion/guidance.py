"""Classifier-free guidance (Ho & Salimans 2022) of a prediction, and thresholding of the x0 that it implies.

Guidance mixes two predictions of any kind: all of ours are affine in the noise. Shape legend: B batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from genpipe.diffusion.schedules import expand_like

GuidanceSchedule = Literal["constant", "linear", "cosine"]
Threshold = Literal["none", "static", "dynamic"]


def guided(cond: Tensor, uncond: Tensor, *, scale: float | Tensor, rescale: float = 0.0) -> Tensor:
    """uncond + scale (cond - uncond); cond, uncond [B, ...], `scale` a number or broadcastable to cond.

    `scale` 1 is the conditional prediction, 0 the unconditional. `rescale` in [0, 1] pulls each sample's
    standard deviation back towards that of `cond`, against the over-exposure of large scales (Lin et al.
    2023, eq. 15-16).
    """
    out = torch.lerp(uncond, cond, scale) if isinstance(scale, Tensor) else uncond + scale * (cond - uncond)
    if rescale == 0.0:
        return out
    axes = tuple(range(1, cond.ndim))
    matched = out * (cond.std(axes, keepdim=True) / out.std(axes, keepdim=True).clamp(min=1e-6))
    return torch.lerp(out, matched, rescale)


def scale_at(
    t: Tensor, *, scale: float, interval: tuple[float, float] = (0.0, 1.0), schedule: GuidanceSchedule = "constant"
) -> Tensor:
    """The guidance scale at times `t` in [0, 1], of their shape.

    Inside `interval` [low, high], and 1 (no guidance) outside: Kynkaanniemi et al. 2024. There what exceeds 1 is
    constant, or grows as the noise goes with its mean over t kept: times 2 (1 - t) (linear) or times 1 + cos(pi
    t) (cosine), Wang et al. 2024, "Analysis of classifier-free guidance weight schedulers". Raises ValueError for
    another schedule.
    """
    low, high = interval
    if schedule == "constant":
        growth = torch.ones_like(t)
    elif schedule == "linear":
        growth = 2.0 * (1.0 - t)
    elif schedule == "cosine":
        growth = 1.0 + torch.cos(math.pi * t)
    else:
        raise ValueError(f"unknown guidance schedule {schedule!r}: use 'constant', 'linear' or 'cosine'")
    return torch.where((t >= low) & (t <= high), 1.0 + (scale - 1.0) * growth, torch.ones_like(t))


def thresholded(x0: Tensor, *, kind: Threshold, bound: float, percentile: float, largest: float = math.inf) -> Tensor:
    """Keep x0 [B, ...] within [-bound, bound], where guidance pushes it out; Saharia et al. 2022 (Imagen), sec. 2.3.

    static: clip. dynamic: clip each sample to [-s, s], s the `percentile` of its magnitudes but at least `bound` and
    at most `largest` (diffusers' sample_max_value), and divide by s / bound. `bound` is 1 for pixels; standardized
    latents reach some 4. Raises ValueError for another kind.
    """
    if kind == "none":
        return x0
    if kind == "static":
        return x0.clamp(-bound, bound)
    if kind == "dynamic":
        limit = expand_like(_percentile(x0.abs().flatten(1), percentile).clamp(bound, largest), x0)
        return torch.minimum(torch.maximum(x0, -limit), limit) * (bound / limit)
    raise ValueError(f"unknown threshold {kind!r}: use 'none', 'static' or 'dynamic'")


def _percentile(x_BN: Tensor, share: float) -> Tensor:
    """torch.quantile(x, share, dim=1), which refuses more than 16 M elements."""
    place = share * (x_BN.shape[1] - 1)
    low = min(int(place), x_BN.shape[1] - 2) if x_BN.shape[1] > 1 else 0
    ordered = x_BN.sort(dim=1).values[:, low : low + 2]
    return torch.lerp(ordered[:, 0], ordered[:, -1], place - low)
