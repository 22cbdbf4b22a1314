"""What is done to the small images that an upsampler is trained on, so that it copes with those that a model draws.

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

JPEG_SHARE = 0.9
"""Of the images that BSR compresses on the way (BSRGAN's code: jpeg_prob); all are compressed at the end."""


class Clean(Config):
    """The small image as it is."""

    kind: Literal["none"] = "none"


class Blur(Config):
    """Gaussian blur of some of the small images.

    The defaults are those of Ho et al. 2022 (cascaded diffusion, section 4.2); unCLIP's first upsampler has kernels of
    3 x 3 pixels with sigma 0.6 (Ramesh et al. 2022, appendix C), which is `sigma: [0.6, 0.6]`.
    """

    kind: Literal["blur"]
    share: float = Field(0.5, ge=0, le=1, description="of the images")
    sigma: Range = Field((0.4, 0.6), description="least and largest standard deviation, in small pixels")


class BSR(Config):
    """Blurs, resizing, noise and JPEG in random order: Zhang et al. 2021 (BSRGAN), section 3.4, by default.

    Latent diffusion's milder form (Rombach et al. 2022, appendix D.6.1, and its bsrgan_light.py), which unCLIP's second
    upsampler was trained with, is `noise: [2, 8], quality: [80, 95], blur: 0.25`. Without the model of a camera's
    sensor, without the halving beforehand and the shifted kernels of theirs, and with one order and one way of
    resizing a batch.
    """

    kind: Literal["bsr"]
    noise: Range = Field((2.0, 25.0), description="standard deviation of the Gaussian noise, of 255")
    quality: tuple[int, int] = Field((30, 95), description="of the JPEG compressions")
    blur: PositiveFloat = Field(
        1.0, description="factor on the blurs: on sigma of the round ones, sigma^2 of the others"
    )


DegradationConfig = Annotated[
    Annotated[Clean, Tag("none")] | Annotated[Blur, Tag("blur")] | Annotated[BSR, Tag("bsr")], by_kind("none")
]


def shrink(images: Tensor, *, size: int) -> Tensor:
    """Images [B, C, H, W] in [-1, 1] as [B, C, size, size], on the 8-bit grid that a stored image has.

    Averaged over boxes where `size` divides their sides, else bicubic with antialiasing.
    """
    if images.shape[-1] % size == 0 and images.shape[-2] == images.shape[-1]:
        small = F.avg_pool2d(images, images.shape[-1] // size)
    else:
        small = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    return to_float(to_uint8(small))


def degrade(images: Tensor, cfg: Clean | Blur | BSR, *, size: int, generator: torch.Generator | None) -> Tensor:
    """Square images [B, C, H, H] in [-1, 1] as small and worse ones [B, C, size, size], in [-1, 1] on the 8-bit grid.

    The generator decides all that is random, for each image on its own except for what `BSR` says; on the meta device
    there is none. Call it outside of autocast, whose bf16 is too coarse for a cosine transform.
    """
    if isinstance(cfg, BSR):
        return _bsr(images, cfg, size=size, generator=generator)
    small = shrink(images, size=size)
    if isinstance(cfg, Clean):
        return small
    sigma, chosen = _uniform(cfg.sigma, small, generator), _uniform((0.0, 1.0), small, generator) < cfg.share
    radius = math.ceil(2 * cfg.sigma[1] - 0.5)  # 1 for sigma up to 0.6: the 3 x 3 of both papers
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
            images = blur(images, _random_kernels(images, ratio=ratio, factor=cfg.blur, generator=generator))
        elif step == "resize":
            side = round(images.shape[-1] / dice.uniform(1.0, 2.0 * ratio))
            images = _resampled(images, max(size // 2, side), dice)
        elif step == "size":
            images = _resampled(images, size, dice)
        elif step == "noise":
            images = add_noise(images, _uniform(cfg.noise, images, generator) / 127.5, generator=generator)
        else:
            chosen = _uniform((0.0, 1.0), images, generator) < JPEG_SHARE
            compressed = jpeg(images, _uniform(cfg.quality, images, generator).round())
            images = torch.where(chosen[:, None, None, None], compressed, images)
        images = images.clamp(-1.0, 1.0)
    return to_float(to_uint8(jpeg(images, _uniform(cfg.quality, images, generator).round())))


def blur(images: Tensor, kernels_BKK: Tensor) -> Tensor:
    """Images [B, C, H, W], each under its own kernel of odd side K; the border is repeated outwards."""
    batch, channels = images.shape[:2]
    radius = kernels_BKK.shape[-1] // 2
    padded = F.pad(images, (radius,) * 4, mode="replicate").flatten(0, 1)[None]
    weight = kernels_BKK.to(images.dtype).repeat_interleave(channels, dim=0)[:, None]
    return F.conv2d(padded, weight, groups=batch * channels).view_as(images)


def gaussian_kernels(
    sigma_B: Tensor, *, radius: int, other_B: Tensor | None = None, angle_B: Tensor | None = None
) -> Tensor:
    """Gaussians [B, K, K] that sum to 1, K = 2 radius + 1, fp32.

    Of standard deviation `sigma_B` [B], in pixels, along an axis at `angle_B` [B], in radians, and `other_B` [B] across
    it; without these two they are round.
    """
    other = sigma_B if other_B is None else other_B
    angle = torch.zeros_like(sigma_B) if angle_B is None else angle_B
    span = torch.arange(-radius, radius + 1, device=sigma_B.device, dtype=torch.float32)
    y, x = span[:, None], span[None, :]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along, across = cos * x + sin * y, cos * y - sin * x
    exponent = (along / sigma_B[:, None, None]).square() + (across / other[:, None, None]).square()
    return (-0.5 * exponent).flatten(1).softmax(1).unflatten(1, (2 * radius + 1, -1))


def add_noise(images: Tensor, level_B: Tensor, *, generator: torch.Generator | None) -> Tensor:
    """Gaussian noise of standard deviation `level_B` [B] on images [B, 3, H, W]: gray, colored, or in between.

    Two in five images have the same noise in all channels, two in five independent noise, the others a random mix.
    """
    batch, channels, height, width = images.shape
    shape = (batch, channels + 1, height, width)
    noise = torch.randn(shape, generator=generator, device=images.device)
    kind = torch.rand(batch, generator=generator, device=images.device)[:, None, None, None]
    shared = ((kind - 0.4) / 0.2).clamp(0.0, 1.0)  # share of the variance that the channels have in common
    mixed = shared.sqrt() * noise[:, :1] + (1.0 - shared).sqrt() * noise[:, 1:]
    return images + level_B[:, None, None, None] * mixed


def _random_kernels(images: Tensor, *, ratio: float, factor: float, generator: torch.Generator | None) -> Tensor:
    """Half isotropic, half not, of the widths of BSRGAN's code for images that get `ratio` times smaller.

    `factor` is on the numbers that it is on in latent-diffusion's bsrgan_light.py: a sigma, and the others' variances.
    """
    draws = torch.rand(4, len(images), generator=generator, device=images.device)
    isotropic = factor * (2.0 + 0.2 * ratio) * draws[1]
    # These two are variances, there.
    sides = (factor * (4.0 + ratio) * draws[1:3]).sqrt()
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
