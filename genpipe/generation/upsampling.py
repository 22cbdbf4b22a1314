"""From small images to large ones: sampling an upsampler. B images, C channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from genpipe.diffusion.noise import normal
from genpipe.diffusion.process import DiffusionConfig, Model, SamplerConfig, denoiser, sample
from genpipe.diffusion.schedules import add_noise
from genpipe.generation.conditions import Statistics
from genpipe.models.autoencoder import Autoencoder
from genpipe.models.tiling import tiled
from genpipe.models.upsampler import Upsampler

TILE, OVERLAP = 1024, 128
"""Cells of a side above which the network sees a grid in tiles, of that side, and what neighbors share."""

CELLS_AT_ONCE = 4 * TILE**2
"""Of all the grids of a batch that the network is given at a time, outside of training."""


@dataclass(frozen=True)
class PixelSpace:
    """Diffusion in pixels: on images, or on what enlarging loses, in units of its standard deviation.

    The second is SRDiff's (Li et al. 2022).
    """

    residual_std: float | None

    def grid(self, size: int) -> int:
        """Cells of a side for images of `size` pixels."""
        return size

    def channels(self, image_channels: int) -> int:
        """Channels of what is drawn for images with so many."""
        return image_channels

    def encode(self, images: Tensor, *, low_res: Tensor) -> Tensor:
        """What the diffusion draws for images [B, C, H, W], given the small ones enlarged to their grid."""
        return images if self.residual_std is None else (images - low_res) / self.residual_std

    def decode(self, x0: Tensor, *, low_res: Tensor) -> Tensor:
        """Inverse of `encode`."""
        return x0 if self.residual_std is None else low_res + self.residual_std * x0


@dataclass(frozen=True)
class LatentSpace:
    """Diffusion on an autoencoder's standardized latents of the large image (Rombach et al. 2022, section 4.4).

    The network sees the small image beside them, on their grid. On the meta device there is no autoencoder.
    """

    autoencoder: Autoencoder | None
    statistics: Statistics
    factor: int

    def grid(self, size: int) -> int:
        """Cells of a side for images of `size` pixels."""
        return size // self.factor

    def channels(self, image_channels: int) -> int:
        """Channels of what is drawn: the latents', whatever the images have."""
        return len(self.statistics.mean)

    @torch.no_grad()
    def encode(self, images: Tensor, *, low_res: Tensor) -> Tensor:
        """Standardized latents of images [B, C, H, W]."""
        if self.autoencoder is None:
            return low_res.new_empty(len(images), self.channels(images.shape[1]), *low_res.shape[2:])
        return self.statistics.standardize(self.autoencoder.encode(images)[0])

    @torch.no_grad()
    def decode(self, x0: Tensor, *, low_res: Tensor) -> Tensor:
        """Inverse of `encode`."""
        assert self.autoencoder is not None, "on the meta device nothing is drawn"
        return self.autoencoder.decode(self.statistics.restore(x0), fp32=True)


Space = PixelSpace | LatentSpace


def space_of(extra: Mapping[str, Any], *, autoencoder: Autoencoder | None, statistics: Statistics | None) -> Space:
    """Where an upsampler draws, from the `extra` of its weights.

    Raises ValueError for one that draws latents in a system without an autoencoder.
    """
    if extra["target"] == "latents":
        if autoencoder is None or statistics is None:
            raise ValueError(
                "inputs.upsamplers: one draws an autoencoder's latents, and this kind of system has none; train it "
                "with target image or residual"
            )
        return LatentSpace(autoencoder, statistics, autoencoder.cfg.factor)
    return PixelSpace(extra["residual_std"])


def enlarge(images: Tensor, *, size: int) -> Tensor:
    """Images [B, C, h, w] in [-1, 1] as [B, C, size, size], bicubic: what the upsampler adds detail to."""
    shrinks = size < images.shape[-1]  # to the grid of latents
    return F.interpolate(images, (size, size), mode="bicubic", antialias=shrinks).clamp(-1, 1)


def upsample(
    upsampler: Upsampler,
    low_res: Tensor,
    *,
    size: int,
    space: Space,
    noise_aug: float,
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    generator: torch.Generator,
) -> Tensor:
    """Images [B, C, h, h] in [-1, 1] as [B, C, size, size].

    Conditioned on the small image with noise of a known level (Ho et al. 2022, cascaded diffusion, section 4.2).
    Memory follows neither batch nor size: see `in_pieces`.
    """
    side = space.grid(size)
    large = enlarge(low_res, size=side)
    level = large.new_full((len(large),), noise_aug)
    noisy = augment(large, level=level, generator=generator)
    shape = (len(large), space.channels(large.shape[1]), side, side)
    noise = normal(shape, generator, device=large.device)
    model = in_pieces(upsampler, noisy, level=level)
    x0 = sample(denoiser(model, diffusion), noise, sampler, diffusion=diffusion, generator=generator)
    return space.decode(x0, low_res=large).clamp(-1, 1)


def upsampler_model(upsampler: Upsampler, low_res: Tensor, *, level: Tensor, generator: torch.Generator) -> Model:
    """The upsampler in training, with the small images bound, enlarged and with noise of `level` [B] on them."""
    return lambda x, t: upsampler(x, t, low_res=low_res, noise_aug=level, generator=generator)


def in_pieces(
    upsampler: Upsampler, low_res: Tensor, *, level: Tensor, tile: int = TILE, overlap: int = OVERLAP
) -> Model:
    """As `upsampler_model`, but a few images at a time, and large ones in overlapping tiles."""
    side, channels = max(low_res.shape[-2:]), low_res.shape[1]
    count = max(1, CELLS_AT_ONCE // low_res[0, 0].numel())

    def some(x: Tensor, t: Tensor, low_res: Tensor, level: Tensor) -> Tensor:
        if side <= tile:
            return upsampler(x, t, low_res=low_res, noise_aug=level)
        both = torch.cat([low_res, x], dim=1)
        return tiled(
            lambda part: upsampler(part[:, channels:], t, low_res=part[:, :channels], noise_aug=level),
            both,
            tile=tile,
            overlap=overlap,
            scale=Fraction(1),
        )

    def model(x: Tensor, t: Tensor) -> Tensor:
        pieces = zip(*(part.split(count) for part in (x, t, low_res, level)), strict=True)
        return torch.cat([some(*piece) for piece in pieces])

    return model


def augment(images: Tensor, *, level: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise augmentation of level [B] in [0, 1], variance preserving (cosine schedule)."""
    noise = normal(tuple(images.shape), generator, device=images.device)
    return add_noise(images, noise=noise, t=level, schedule="cosine")
