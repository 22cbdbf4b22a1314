"""Pictures as unCLIP represents them (Ramesh et al. 2022, section 3): an image embedding and the noise that is left.

The embedding says what CLIP sees; the noise, found by running DDIM backwards, holds the rest. From both the decoder
draws the picture again, and from changed ones its variations. B pictures, C channels, H and W grid, D embedding width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from genpipe.diffusion.process import OF_KINDS, SamplerConfig, denoiser, inverted, sample
from genpipe.generation.drawing import Drawing, bound
from genpipe.generation.systems.unclip import UnclipSystem

REFINEMENTS = 3
"""Evaluations more in each step of the inversion, which bring it from near the picture to it."""


class Representation(NamedTuple):
    """image_embed: unit vectors fp32 [B, D]; noise: fp32 [B, C, H, W], from which deterministic DDIM begins."""

    image_embed: Tensor
    noise: Tensor

    def repeated(self, times: int) -> Representation:
        """Each picture `times` times in a row, [B * times, ...]."""
        return Representation(*(part.repeat_interleave(times, dim=0) for part in self))


def as_unclip(system: Drawing, *, use: str) -> UnclipSystem:
    """The system as one whose decoder takes image embeddings. Raises ValueError, naming the use, for any other."""
    if not isinstance(system, UnclipSystem) or not system.decoder.embed_dim:
        raise ValueError(
            f"{use}: needs a system of kind unclip whose decoder takes an image embedding, which this one is not; "
            "edit by strength or with a mask, which any system can"
        )
    return system


def as_ddim(sampler: SamplerConfig, *, eta: float = 0.0) -> SamplerConfig:
    """The sampler as DDIM over as many steps; its times, guidance and threshold stay."""
    of_others = {"kind", *OF_KINDS, "s_tmin", "s_tmax", "s_noise"}
    return SamplerConfig(kind="ddim", eta=eta, **sampler.model_dump(exclude=of_others))


@torch.no_grad()
def represent(
    system: UnclipSystem,
    images: Tensor,
    image_embed: Tensor,
    *,
    sampler: SamplerConfig,
    refinements: int = REFINEMENTS,
) -> Representation:
    """Pictures [B, 3, S, S] in [-1, 1], S the base size, with their unit image embeddings [B, D].

    The noise is that of deterministic DDIM over the times of `sampler`; the decoder is given no caption, as captions
    of pictures are not known. Guidance above 1 makes the noise larger and its inversion less exact.
    """
    model = bound(system, system.given_embeds(image_embed), count=len(images), sampler=sampler)
    noise = inverted(
        model, system.encode(images), as_ddim(sampler), diffusion=system.decoder_diffusion, refinements=refinements
    )
    return Representation(image_embed, noise)


@torch.no_grad()
def render(
    system: UnclipSystem,
    represented: Representation,
    *,
    sampler: SamplerConfig,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The decoder's pictures [B, 3, S, S] in [-1, 1]; with `eta` 0 that which was represented comes back.

    Raises ValueError for `eta` above 0 without a generator.
    """
    count = len(represented.noise)
    model = bound(system, system.given_embeds(represented.image_embed), count=count, sampler=sampler)
    diffusion = system.decoder_diffusion
    x0 = sample(
        denoiser(model, diffusion),
        represented.noise,
        as_ddim(sampler, eta=eta),
        diffusion=diffusion,
        generator=generator,
    )
    return system.decode(x0)


def slerp(one: Tensor, other: Tensor, share: float | Tensor) -> Tensor:
    """Spherical interpolation from `one` to `other`, [B, ...] each: their angle is divided, their lengths are mixed.

    `share` in [0, 1], or [B], is 0 at `one`. Opposite vectors have no shortest way between them, and parallel ones
    are mixed on a line (Shoemake 1985; for noise White 2016, sampling generative networks).
    """
    a, b = one.flatten(1).double(), other.flatten(1).double()
    share_B1 = torch.as_tensor(share, dtype=torch.float64, device=a.device).expand(len(a))[:, None]
    lengths = torch.lerp(a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True), share_B1)
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    angle = torch.atan2((a - b).norm(dim=1, keepdim=True), (a + b).norm(dim=1, keepdim=True)) * 2
    sine = angle.sin()
    between = torch.where(
        sine > 1e-6,
        (((1 - share_B1) * angle).sin() * a + (share_B1 * angle).sin() * b) / sine.clamp(min=1e-6),
        torch.lerp(a, b, share_B1),
    )
    return (lengths * between).view_as(one).to(one.dtype)
