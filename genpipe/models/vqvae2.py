"""The two-level autoencoder of VQ-VAE-2 (Razavi et al. 2019, sec. 3.1, fig. 2a and table 4).

A coarse top grid holds the layout, a bottom grid of twice its resolution, encoded given the top's codes, the detail.
For what comes after the two are one grid at the top's resolution: the top's channels, then those of the bottom with
each 2x2 square of cells folded into channels.

Shapes: B batch, C channels, H and W of the top grid.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from genpipe.config import Config
from genpipe.models.layers import ResidualBlock
from genpipe.models.quantizer import Bottleneck, Quantized, Quantizer, Vq


class HierarchicalConfig(Config):
    """Sizes; the defaults are the published ones for 256 px, whose codes have 64 channels on both levels."""

    kind: Literal["hierarchical"]
    image_channels: PositiveInt = Field(3, description="channels of an image")
    top_channels: PositiveInt = Field(64, description="channels of the coarse codes")
    bottom_channels: PositiveInt = Field(64, description="channels of the fine codes")
    width: int = Field(128, ge=2, multiple_of=2, description="channels of the convolutions")
    residual_width: PositiveInt = Field(64, description="hidden channels of a residual block")
    blocks: PositiveInt = Field(2, description="residual blocks of each part")
    bottleneck: Bottleneck = Field(Vq(kind="vq", codes=512), description="what lies between encoder and decoder")

    @property
    def factor(self) -> int:
        """Pixels per cell of the top, along each axis; half as many per cell of the bottom."""
        return 8

    @property
    def latent_channels(self) -> int:
        """Of the one grid that holds both."""
        return self.top_channels + 4 * self.bottom_channels


def pack(top: Tensor, bottom: Tensor) -> Tensor:
    """Top [B, T, H, W] and bottom [B, C, 2H, 2W] as one grid [B, T + 4C, H, W]."""
    return torch.cat([top, F.pixel_unshuffle(bottom, 2)], dim=1)


def unpack(grid: Tensor, *, top_channels: int) -> tuple[Tensor, Tensor]:
    """The exact inverse of `pack`."""
    return grid[:, :top_channels], F.pixel_shuffle(grid[:, top_channels:], 2)


class LevelQuantizer(nn.Module):
    """A codebook for each level, with the calls of a `Quantizer` on the packed grid."""

    def __init__(self, cfg: HierarchicalConfig, bottleneck: Vq) -> None:
        super().__init__()
        self.top_channels = cfg.top_channels
        self.top = Quantizer(bottleneck, cfg.top_channels)
        self.bottom = Quantizer(bottleneck, cfg.bottom_channels)

    def forward(self, latents: Tensor, *, generator: torch.Generator | None = None) -> Quantized:
        """The packed grid [B, T + 4C, H, W], each level quantized with its own codebook."""
        top, bottom = unpack(latents, top_channels=self.top_channels)
        above, below = self.top(top, generator=generator), self.bottom(bottom, generator=generator)
        counts = {"top_": above.counts[""], "bottom_": below.counts[""]}
        return Quantized(pack(above.vectors, below.vectors), above.loss + below.loss, counts)

    def update(self) -> None:
        """Update both codebooks, as `Quantizer.update`."""
        self.top.update()
        self.bottom.update()


class Residual(ResidualBlock):
    """ReLU, 3x3 convolution, ReLU, 1x1 convolution, added to the input."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Grid [B, width, H, W] -> the same shape."""
        return x_BCHW + self.conv2(F.relu(self.conv1(F.relu(x_BCHW))))


class HierarchicalEncoder(nn.Module):
    """Images to the features of both levels; the bottom is conditioned on the top as the decoder will have it.

    `moments` is 2 where the bottleneck takes a mean and a log variance for each channel, else 1.
    """

    def __init__(self, cfg: HierarchicalConfig, *, moments: int) -> None:
        super().__init__()
        width = cfg.width
        self.down = nn.Sequential(
            _halve(cfg.image_channels, width // 2), nn.ReLU(), _halve(width // 2, width), nn.ReLU(), *_stack(cfg, width)
        )
        self.down_again = nn.Sequential(_halve(width, width // 2), nn.ReLU(), *_stack(cfg, width // 2))
        self.to_top = nn.Conv2d(width, moments * cfg.top_channels, 1)
        self.from_top = nn.Sequential(*_stack(cfg, cfg.top_channels), _double(width, cfg.top_channels))
        self.to_bottom = nn.Conv2d(width + cfg.top_channels, moments * cfg.bottom_channels, 1)

    def features(self, images: Tensor) -> Tensor:
        """[B, width, 2H, 2W] of images [B, C, 8H, 8W]."""
        return self.down(images)

    def top(self, features: Tensor) -> Tensor:
        """Moments of the top level, [B, moments T, H, W], of `features`."""
        return self.to_top(self.down_again(features))

    def bottom(self, features: Tensor, top: Tensor) -> Tensor:
        """The bottom's moments given the top [B, T, H, W] as the decoder will have it."""
        return self.to_bottom(torch.cat([features, self.from_top(top)], dim=1))


class HierarchicalDecoder(nn.Module):
    """The packed grid, quantized or not, to images."""

    def __init__(self, cfg: HierarchicalConfig) -> None:
        super().__init__()
        width = cfg.width
        self.top_channels = cfg.top_channels
        self.raise_top = _double(cfg.top_channels, cfg.top_channels)
        self.up = nn.Sequential(
            *_stack(cfg, cfg.top_channels + cfg.bottom_channels),
            _double(width, width // 2),
            nn.ReLU(),
            _double(width // 2, cfg.image_channels),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Packed latents [B, T + 4C, H, W] -> images [B, C, 8H, 8W]."""
        top, bottom = unpack(latents, top_channels=self.top_channels)
        return self.up(torch.cat([self.raise_top(top), bottom], dim=1))


def _stack(cfg: HierarchicalConfig, channels_in: int) -> list[nn.Module]:
    """A convolution to the full width and the residual blocks."""
    blocks = [Residual(cfg.width, cfg.residual_width) for _ in range(cfg.blocks)]
    return [nn.Conv2d(channels_in, cfg.width, 3, padding=1), *blocks, nn.ReLU()]


def _halve(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 4, stride=2, padding=1)


def _double(channels_in: int, channels_out: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1)
