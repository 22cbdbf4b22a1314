"""Inpainting: parts of a picture drawn anew, the rest kept (RePaint; Lugmayr et al. 2022). Outpainting is the same
with a border that is yet to be drawn. For systems of all kinds.

Shape legend: B pictures, S the side of the decoder's pictures, `size` that of the system's, both in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from genpipe.diffusion.process import bounded, denoiser, sampling_times
from genpipe.diffusion.repaint import repaint
from genpipe.diffusion.schedules import alpha_sigma
from genpipe.generation.conditions import Conditions
from genpipe.generation.drawing import Drawing, bound, told

JUMP, RESAMPLES = 5, 5
"""How far and how often RePaint goes back: half of the paper's numbers, as samplers have a tenth of its 250 steps."""


@torch.no_grad()
def inpaint(
    system: Drawing,
    images: Tensor,
    keep: Tensor,
    conditions: Conditions,
    *,
    jump: int = JUMP,
    resamples: int = RESAMPLES,
    generator: torch.Generator,
) -> Tensor:
    """The system's pictures, fp32 [B, 3, size, size] in [-1, 1], which are `images` exactly where `keep` is true.

    images: [B, 3, size, size] in [-1, 1]; keep: bool [B, 1, size, size]. The decoder draws by RePaint, with the steps
    and guidance of its sampler; of latents those count as known whose pixels are all kept. The kept pixels are pasted
    at the size of the decoder, so that upsamplers see them, and in the end.
    """
    small, keep_small = shrunk(images, system.base_size), keep_cells(keep, system.base_size)
    given, negative = told(system, conditions, generator=generator)
    model, diffusion = bound(system, given, count=conditions.count, negative=negative), system.decoder_diffusion
    known, ts = system.encode(small), sampling_times(system.decoder_sampler, diffusion)
    noise = torch.randn(known.shape, generator=generator, device=known.device)
    x0 = repaint(
        bounded(denoiser(model, diffusion), system.decoder_sampler),
        noise * torch.hypot(*alpha_sigma(ts[0], diffusion.noise_schedule)).item(),
        ts,
        schedule=diffusion.noise_schedule,
        known=known,
        keep=keep_cells(keep_small, known.shape[-1]),
        generator=generator,
        jump=jump,
        resamples=resamples,
    )
    drawn = torch.where(keep_small, small, system.decode(x0))
    made = [drawn, *system.cascade.enlarge(drawn, generator=generator)]
    return torch.where(keep, images, made[-1])


def shrunk(images: Tensor, size: int) -> Tensor:
    """Pictures [B, 3, H, W] at `size` pixels of a side, averaged over areas or, where they are no multiple, bicubic."""
    if images.shape[-1] == size:
        return images
    if images.shape[-1] % size == 0:
        return F.avg_pool2d(images, images.shape[-1] // size)
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def keep_cells(keep: Tensor, size: int) -> Tensor:
    """The mask bool [B, 1, H, W] on a coarser grid of `size` cells of a side: true where all of a cell is kept."""
    return F.adaptive_max_pool2d((~keep).float(), size) == 0
