"""KL autoencoder (Rombach et al. 2022, sec. 3.1): images to a small Gaussian latent grid and back.

Shapes: B batch, C channels, H and W pixels; latents are [B, latent_channels, H / factor, W / factor].
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from genpipe.config import Config
from genpipe.models.layers import Attention

GROUPS = 16
"""Groups of every GroupNorm; widths are multiples of it."""


class AutoencoderConfig(Config):
    """Sizes. Factor between image and latent grid: patch_size times 2 for each multiplier after the first.

    `patch_size` folds pixels into channels before the first convolution, so that every convolution runs at
    low resolution: 1 is the published architecture, 4 makes it some ten times cheaper at 64 pixels.
    """

    image_channels: PositiveInt = 3
    latent_channels: PositiveInt = 8
    patch_size: PositiveInt = 4
    width: Annotated[int, Field(gt=0, multiple_of=GROUPS)] = 64
    multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2)
    blocks: PositiveInt = 1
    mid_attention: bool = False

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each axis."""
        return self.patch_size * 2 ** (len(self.multipliers) - 1)


class ResBlock(nn.Module):
    """Twice GroupNorm, SiLU, 3x3 convolution, added to the (projected) input."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        self.skip = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_BCHW)))
        return self.skip(x_BCHW) + self.conv2(F.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """One-headed self-attention over the grid, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.attention = Attention(channels, heads=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        tokens = self.norm(x_BCHW).flatten(2).transpose(1, 2)
        return x_BCHW + self.attention(tokens).transpose(1, 2).unflatten(2, x_BCHW.shape[-2:])


class Autoencoder(nn.Module):
    """Encoder to the mean and log variance of a Gaussian, decoder from a sample of it.

    Both end in a bare convolution, without the published norm and activation before it: at the start the
    residual blocks are identities and the whole is a linear autoencoder, which finds the colours at once.

    A sample is mean + exp(logvar / 2) noise. Nothing here standardises latents: the statistics are measured
    over the data after training, and applied once, by whoever writes the features.
    """

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        self.cfg = cfg
        area = cfg.patch_size**2
        widths = [cfg.width * m for m in cfg.multipliers]
        deep = widths[-1]

        down: list[nn.Module] = [
            nn.PixelUnshuffle(cfg.patch_size),
            nn.Conv2d(cfg.image_channels * area, widths[0], 3, padding=1),
        ]
        for level, width in enumerate(widths):
            if level > 0:
                down.append(nn.Conv2d(widths[level - 1], width, 2, stride=2))
            down += [ResBlock(width, width) for _ in range(cfg.blocks)]
        self.encoder = nn.Sequential(*down, *_middle(cfg, deep), nn.Conv2d(deep, 2 * cfg.latent_channels, 3, padding=1))

        up: list[nn.Module] = [nn.Conv2d(cfg.latent_channels, deep, 3, padding=1), *_middle(cfg, deep)]
        for level in reversed(range(len(widths))):
            up += [ResBlock(widths[level], widths[level]) for _ in range(cfg.blocks)]
            if level > 0:
                up.append(nn.ConvTranspose2d(widths[level], widths[level - 1], 2, stride=2))
        self.decoder = nn.Sequential(*up, nn.Conv2d(widths[0], cfg.image_channels * area, 3, padding=1))
        self.unfold = nn.PixelShuffle(cfg.patch_size)

    @property
    def last_layer(self) -> Tensor:
        """Weights of the last convolution, where the adaptive discriminator weight compares gradients."""
        conv = self.decoder[-1]
        assert isinstance(conv, nn.Conv2d)
        return conv.weight

    def encode(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1], sides divisible by the factor -> (mean, logvar), each a latent grid in fp32."""
        sides, factor = tuple(images_BCHW.shape[-2:]), self.cfg.factor
        if any(side % factor for side in sides):
            raise ValueError(f"images of {sides[0]}x{sides[1]} do not divide by the autoencoder's factor {factor}")
        mean, logvar = self.encoder(images_BCHW).float().chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor, *, fp32: bool = False) -> Tensor:
        """Latent grid -> fp32 images, about [-1, 1]; `fp32` also computes in fp32, whatever autocast says."""
        with torch.autocast(latents.device.type, enabled=not fp32 and torch.is_autocast_enabled(latents.device.type)):
            return self.unfold(self.decoder(latents)).float()

    def forward(self, images_BCHW: Tensor, *, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction, mean, logvar) through a posterior sample; `noise` has the shape of the latents."""
        mean, logvar = self.encode(images_BCHW)
        return self.decode(mean + (0.5 * logvar).exp() * noise), mean, logvar


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) summed over each sample's latents [B]; Kingma & Welling 2014."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)


def _middle(cfg: AutoencoderConfig, width: int) -> list[nn.Module]:
    return [ResBlock(width, width), AttentionBlock(width)] if cfg.mid_attention else []
