"""The autoencoder of latent diffusion (Rombach et al. 2022, sec. 3.1 and appendix G), Stable Diffusion's among them.

Shapes: B batch, C channels, H and W of the grid.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from genpipe.config import Config
from genpipe.models.convolutions import ResBlock
from genpipe.models.layers import ResidualBlock, attend
from genpipe.models.quantizer import Bottleneck, Kl

GROUPS, EPS = 32, 1e-6
"""Of every GroupNorm."""


class LdmConfig(Config):
    """Sizes; the default is Stable Diffusion's: 83.7 M parameters, factor 8, 4 latent channels.

    Published: f4 with multipliers (1, 2, 4) and 3 latent channels, f8 with (1, 2, 4, 4) and 4, f16 with
    (1, 1, 2, 2, 4) and 16. Factor between image and latent grid: 2 for each multiplier after the first.
    """

    kind: Literal["ldm"]
    image_channels: PositiveInt = Field(3, description="channels of an image")
    latent_channels: PositiveInt = Field(4, description="channels of a latent cell")
    width: Annotated[int, Field(gt=0, multiple_of=GROUPS)] = Field(128, description="channels of the finest level")
    multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = Field(
        (1, 2, 4, 4), description="of the width, by level; each level after the first halves the grid"
    )
    blocks: PositiveInt = Field(2, description="residual blocks of a level of the encoder; the decoder has one more")
    mid_attention: bool = Field(True, description="attention between the residual blocks of the coarsest level")
    attention_at: tuple[PositiveInt, ...] = Field(
        (), description="downsampling factors at which attention follows each residual block; LDM's f16 has 16"
    )
    quant_conv: bool = Field(True, description="1x1 convolutions around the bottleneck; Stable Diffusion 3 has none")
    bottleneck: Bottleneck = Field(Kl(), description="what lies between encoder and decoder")

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each axis."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, finest first."""
        return [self.width * m for m in self.multipliers]

    @model_validator(mode="after")
    def _attention_has_a_level(self) -> Self:
        factors = [2**level for level in range(len(self.multipliers))]
        if unknown := set(self.attention_at) - set(factors):
            raise ValueError(f"attention_at {sorted(unknown)} is not among the levels' downsampling factors {factors}")
        return self

    def attends(self, level: int) -> bool:
        """Whether attention follows the residual blocks of a level; 0 is the image's resolution."""
        return 2**level in self.attention_at


class LdmAttention(ResidualBlock):
    """One-headed self-attention over the grid behind a GroupNorm, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, EPS)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Grid [B, C, H, W] -> the same shape."""
        tokens_B1LC = self.norm(x_BCHW).flatten(2).transpose(1, 2).unsqueeze(1)
        attended_B1LC = attend(self.q(tokens_B1LC), self.k(tokens_B1LC), self.v(tokens_B1LC))
        return x_BCHW + self.out(attended_B1LC).squeeze(1).transpose(1, 2).unflatten(2, x_BCHW.shape[-2:])


class LdmDownsample(nn.Conv2d):
    """A 3x3 convolution of stride 2, padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Grid [B, C, H, W] -> [B, C, H / 2, W / 2]."""
        return super().forward(F.pad(x_BCHW, (0, 1, 0, 1)))


class LdmUpsample(nn.Conv2d):
    """Nearest-neighbor doubling and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Grid [B, C, H, W] -> [B, C, 2H, 2W]."""
        return super().forward(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


def ldm_encoder(cfg: LdmConfig, *, channels_out: int) -> nn.Sequential:
    """Images to `channels_out` channels of the latent grid."""
    layers: list[nn.Module] = [nn.Conv2d(cfg.image_channels, cfg.widths[0], 3, padding=1)]
    below = cfg.widths[0]
    for level, width in enumerate(cfg.widths):
        layers += _level(cfg, level, below, count=cfg.blocks)
        below = width
        if level < len(cfg.widths) - 1:
            layers.append(LdmDownsample(width))
    layers += [*_middle(cfg), *_head(below, channels_out)]
    if cfg.quant_conv:
        layers.append(nn.Conv2d(channels_out, channels_out, 1))
    return nn.Sequential(*layers)


def ldm_decoder(cfg: LdmConfig) -> nn.Sequential:
    """Latents to images."""
    below = cfg.widths[-1]
    layers: list[nn.Module] = [nn.Conv2d(cfg.latent_channels, cfg.latent_channels, 1)] if cfg.quant_conv else []
    layers += [nn.Conv2d(cfg.latent_channels, below, 3, padding=1), *_middle(cfg)]
    for level, width in reversed(list(enumerate(cfg.widths))):
        layers += _level(cfg, level, below, count=cfg.blocks + 1)
        below = width
        if level > 0:
            layers.append(LdmUpsample(width))
    return nn.Sequential(*layers, *_head(below, cfg.image_channels))


def _block(channels_in: int, channels_out: int) -> ResBlock:
    return ResBlock(channels_in, channels_out, groups=GROUPS, eps=EPS)


def _level(cfg: LdmConfig, level: int, channels_in: int, *, count: int) -> list[nn.Module]:
    """The residual blocks of a level, each with its attention where the level has it."""
    width = cfg.widths[level]
    layers: list[nn.Module] = []
    for i in range(count):
        layers.append(_block(width if i else channels_in, width))
        if cfg.attends(level):
            layers.append(LdmAttention(width))
    return layers


def _middle(cfg: LdmConfig) -> list[nn.Module]:
    width = cfg.widths[-1]
    return [_block(width, width), *([LdmAttention(width)] if cfg.mid_attention else []), _block(width, width)]


def _head(channels: int, channels_out: int) -> list[nn.Module]:
    return [nn.GroupNorm(GROUPS, channels, EPS), nn.SiLU(), nn.Conv2d(channels, channels_out, 3, padding=1)]
