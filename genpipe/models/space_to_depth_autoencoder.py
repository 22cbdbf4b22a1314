"""The autoencoder that folds pixels into channels first, so that all convolutions run at low resolution.

Shapes: B batch, C channels, H and W of the grid.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from genpipe.config import Config
from genpipe.models.convolutions import ResBlock
from genpipe.models.layers import Attention, ResidualBlock
from genpipe.models.quantizer import Bottleneck, Kl

GROUPS = 16
"""Groups of every GroupNorm; widths are multiples of it."""


class FoldedConfig(Config):
    """Sizes. Factor between image and latent grid: patch_size times 2 for each multiplier after the first.

    `patch_size` 4 makes it some ten times cheaper at 64 pixels than convolutions on the pixels themselves.
    """

    kind: Literal["folded"] = "folded"
    image_channels: PositiveInt = Field(3, description="channels of an image")
    latent_channels: PositiveInt = Field(8, description="channels of a latent cell")
    patch_size: PositiveInt = Field(4, description="side of the squares of pixels that are folded into channels first")
    width: Annotated[int, Field(gt=0, multiple_of=GROUPS)] = Field(64, description="channels of the finest level")
    multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = Field(
        (1, 2), description="of the width, by level; each level after the first halves the grid"
    )
    blocks: PositiveInt = Field(1, description="residual blocks of a level")
    mid_attention: bool = Field(False, description="attention at the coarsest level")
    bottleneck: Bottleneck = Field(Kl(), description="what lies between encoder and decoder")

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each axis."""
        return self.patch_size * 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, finest first."""
        return [self.width * m for m in self.multipliers]


class AttentionBlock(ResidualBlock):
    """One-headed self-attention over the grid, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.attention = Attention(channels, heads=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Grid [B, C, H, W] -> the same shape."""
        tokens = self.norm(x_BCHW).flatten(2).transpose(1, 2)
        return x_BCHW + self.attention(tokens).transpose(1, 2).unflatten(2, x_BCHW.shape[-2:])


def folded_encoder(cfg: FoldedConfig, *, channels_out: int) -> nn.Sequential:
    """Images to `channels_out` channels of the latent grid.

    Encoder and decoder end in a bare convolution, without the published norm and activation before it: at the start
    the residual blocks are identities and the whole is a linear autoencoder, which finds the colors at once.
    """
    widths = cfg.widths
    layers: list[nn.Module] = [
        nn.PixelUnshuffle(cfg.patch_size),
        nn.Conv2d(cfg.image_channels * cfg.patch_size**2, widths[0], 3, padding=1),
    ]
    for level, width in enumerate(widths):
        if level > 0:
            layers.append(nn.Conv2d(widths[level - 1], width, 2, stride=2))
        layers += [_block(width) for _ in range(cfg.blocks)]
    return nn.Sequential(*layers, *_middle(cfg), nn.Conv2d(widths[-1], channels_out, 3, padding=1))


def folded_decoder(cfg: FoldedConfig) -> nn.Sequential:
    """Latents to images."""
    widths = cfg.widths
    layers: list[nn.Module] = [nn.Conv2d(cfg.latent_channels, widths[-1], 3, padding=1), *_middle(cfg)]
    for level in reversed(range(len(widths))):
        layers += [_block(widths[level]) for _ in range(cfg.blocks)]
        if level > 0:
            layers.append(nn.ConvTranspose2d(widths[level], widths[level - 1], 2, stride=2))
    layers.append(nn.Conv2d(widths[0], cfg.image_channels * cfg.patch_size**2, 3, padding=1))
    return nn.Sequential(*layers, nn.PixelShuffle(cfg.patch_size))


def _block(width: int) -> ResBlock:
    block = ResBlock(width, width, groups=GROUPS)
    nn.init.zeros_(block.conv2.weight)
    return block


def _middle(cfg: FoldedConfig) -> list[nn.Module]:
    width = cfg.widths[-1]
    return [_block(width), AttentionBlock(width)] if cfg.mid_attention else []
