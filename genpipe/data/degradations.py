"""How the small images look that an upsampler is trained on: worse than clean ones, as those that it will be given.

Shapes: B batch, C = 3 channels (RGB), H and W pixels, K side of a blur kernel. Images are in [-1, 1].
"""

from __future__ import annotations

import math
import random
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, Tag
from torch import Tensor
from torch.nn import functional as F

from genpipe.config import Config, by_kind
from genpipe.data.differentiable_jpeg import jpeg
from genpipe.data.image_batches import to_float, to_uint8

Range = tuple[PositiveFloat, PositiveFloat]

RESAMPLINGS = ("bilinear", "bicubic", "area")
BSR_RADIUS = 10
"""Of the blurs of BSR: kernels of 21 pixels, the largest of the paper."""


class Clean(Config):
    """The small image as it is."""

    kind: Literal["none"] = "none"


class Blur(Config):
    """Gaussian blur of some of the small images (Ho et al. 2022, cascaded diffusion, section 4.2; unCLIP's first)."""

    kind: Literal["blur"]
    share: float = Field(0.5, ge=0, le=1, description="of the images")
    sigma: Range = Field((0.4, 0.6), description="least and largest standard deviation, in small pixels")


class BSR(Config):
    """Blurs, resizing, noise and JPEG in random order (Zhang et al. 2021, section 3.4; unCLIP's second upsampler).

    Without the paper's model of a camera's sensor, and with one order and one way of resizing per batch.
    """

    kind: Literal["bsr"]
    noise: Range = Field((2.0, 25.0), description="standard deviation of the Gaussian noise, of 255")
    quality: tuple[int, int] = Field((30, 95), description="of the JPEG compressions")


DegradationConfig = Annotated[
    Annotated[Clean, Tag("none")] | Annotated[Blur, Tag("blur")] | Annotated[BSR, Tag("bsr")], by_kind("none")
]


def shrink(images: Tensor, *, size: int) -> Tensor:
    """Images [B, C, H, W] as [B, C, size, size] on the 8-bit grid that a stored image has.

    Averaged over boxes where `size` divides their sides, else bicubic with antialiasing.
    """
    if images.shape[-1] % size == 0 and images.shape[-2] == images.shape[-1]:
        small = F.avg_pool2d(images, images.shape[-1] // size)
    else:
        small = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    return to_float(to_uint8(small))


def degrade(images: Tensor, cfg: Clean | Blur | BSR, *, size: int, generator: torch.Generator | None) -> Tensor:
    """Square images [B, C, H, H] as small and worse ones [B, C, size, size], in [-1, 1] on the 8-bit grid.

    All that is random is decided by the generator, for each image on its own but for what `BSR` says; the meta device
    has none. To be called outside of autocast, whose bf16 is too coarse for a cosine transform.
    """
    if isinstance(cfg, BSR):
        return _bsr(images, cfg, size=size, generator=generator)
    small = shrink(images, size=size)
    if isinstance(cfg, Clean):
        return small
    sigma, chosen = _uniform(cfg.sigma, small, generator), _uniform((0.0, 1.0), small, generator) < cfg.share
    radius = math.ceil(2 * cfg.sigma[1] - 0.5)  # of 1 for sigma up to 0.6: the paper's 3 x 3
    blurred = blur(small, gaussian_kernels(sigma, radius=radius))
    return to_float(to_uint8(torch.where(chosen[:, None, None, None], blurred, small)))


def _bsr(images: Tensor, cfg: BSR, *, size: int, generator: torch.Generator | None) -> Tensor:
    """Two blurs, a resizing on the way and one to `size`, noise and JPEG in random order; then JPEG again."""
    # Drawn on the host, from the seed: a draw of the generator would be waited for on a GPU.
    dice = random.Random(generator.initial_seed() if generator else 0)
    order = ["blur", "blur", "resize", "size", "noise", "jpeg"]
    dice.shuffle(order)
    resize, last = sorted((order.index("resize"), order.index("size")))
    order[resize], order[last] = "resize", "size"  # on the way comes before the last
    ratio = images.shape[-1] / size
    for step in order:
        if step == "blur":
            images = blur(images, _random_kernels(images, ratio=ratio, generator=generator))
        elif step == "resize":
            side = round(images.shape[-1] / dice.uniform(1.0, 2.0 * ratio))
            images = _resampled(images, max(size // 2, side), dice)
        elif step == "size":
            images = _resampled(images, size, dice)
        elif step == "noise":
            images = add_noise(images, _uniform(cfg.noise, images, generator) / 127.5, generator=generator)
        else:
            images = jpeg(images, _uniform(cfg.quality, images, generator).round())
        images = images.clamp(-1.0, 1.0)
    return to_float(to_uint8(jpeg(images, _uniform(cfg.quality, images, generator).round())))


def blur(images: Tensor, kernels_BKK: Tensor) -> Tensor:
    """Each image [B, C, H, W] with its own kernel; the border is repeated outwards."""
    batch, channels = images.shape[:2]
    radius = kernels_BKK.shape[-1] // 2
    padded = F.pad(images, (radius,) * 4, mode="replicate").flatten(0, 1)[None]
    weight = kernels_BKK.to(images.dtype).repeat_interleave(channels, dim=0)[:, None]
    return F.conv2d(padded, weight, groups=batch * channels).view_as(images)


def gaussian_kernels(
    sigma_B: Tensor, *, radius: int, other_B: Tensor | None = None, angle_B: Tensor | None = None
) -> Tensor:
    """Normalized Gaussians [B, K, K], K = 2 radius + 1: `sigma` along an axis at `angle`, `other` across it."""
    other = sigma_B if other_B is None else other_B
    angle = torch.zeros_like(sigma_B) if angle_B is None else angle_B
    span = torch.arange(-radius, radius + 1, device=sigma_B.device, dtype=torch.float32)
    y, x = span[:, None], span[None, :]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along, across = cos * x + sin * y, cos * y - sin * x
    exponent = (along / sigma_B[:, None, None]).square() + (across / other[:, None, None]).square()
    return (-0.5 * exponent).flatten(1).softmax(1).unflatten(1, (2 * radius + 1, -1))


def add_noise(images: Tensor, level_B: Tensor, *, generator: torch.Generator | None) -> Tensor:
    """Gaussian noise of standard deviation `level`, of each image as gray, as colored, or in between.

    Two in five images have the same noise in all channels, two in five independent noise, the others a random mix.
    """
    batch, channels, height, width = images.shape
    shape = (batch, channels + 1, height, width)
    noise = torch.randn(shape, generator=generator, device=images.device)
    kind = torch.rand(batch, generator=generator, device=images.device)[:, None, None, None]
    shared = ((kind - 0.4) / 0.2).clamp(0.0, 1.0)  # share of the variance that the channels have in common
    mixed = shared.sqrt() * noise[:, :1] + (1.0 - shared).sqrt() * noise[:, 1:]
    return images + level_B[:, None, None, None] * mixed


def _random_kernels(images: Tensor, *, ratio: float, generator: torch.Generator | None) -> Tensor:
    """Half isotropic, half not, of the widths of Zhang et al. 2021's code for images that are `ratio` times smaller."""
    draws = torch.rand(4, len(images), generator=generator, device=images.device)
    isotropic = (2.0 + 0.2 * ratio) * draws[1]
    # These two are variances, there.
    sides = ((4.0 + ratio) * draws[1:3]).sqrt()
    round_ones = draws[0] < 0.5
    return gaussian_kernels(
        torch.where(round_ones, isotropic, sides[0]).clamp(min=0.1),
        other_B=torch.where(round_ones, isotropic, sides[1]).clamp(min=0.1),
        angle_B=math.pi * draws[3],
        radius=BSR_RADIUS,
    )


def _resampled(images: Tensor, side: int, dice: random.Random) -> Tensor:
    return F.interpolate(images, (side, side), mode=dice.choice(RESAMPLINGS))


def _uniform(span: tuple[float, float], images: Tensor, generator: torch.Generator | None) -> Tensor:
    """A draw between the two ends for each of the images, fp32 [B]."""
    low, high = span
    return low + (high - low) * torch.rand(len(images), generator=generator, device=images.device)
