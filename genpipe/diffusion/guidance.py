"""Classifier-free guidance (Ho & Salimans 2022), on any prediction affine in the noise (all of ours)."""

from __future__ import annotations

import torch
from torch import Tensor


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


def scale_in_interval(t: Tensor, *, scale: float, interval: tuple[float, float]) -> Tensor:
    """Guidance at times inside [low, high], 1 (none) elsewhere: Kynkaanniemi et al. 2024. Shape of `t`."""
    low, high = interval
    inside = (t >= low) & (t <= high)
    return torch.where(inside, torch.full_like(t, scale), torch.ones_like(t))
