"""DC-AE, the deep compression autoencoder (Chen et al. 2024, arXiv:2410.10733), in the form that SANA uses.

Residual autoencoding (sec. 3.2): what changes resolution adds its convolution to a shortcut without parameters, which
folds space into channels and averages groups of them, or duplicates channels and unfolds. Blocks of the low
resolutions are EfficientViT's (Cai et al. 2023): linear attention at several scales and a gated convolution.

Shapes: B batch, C channels, H and W of the grid; G heads, E channels of a head, L cells.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from genpipe.config import Config
from genpipe.models.layers import ResidualBlock
from genpipe.models.precision import fp32
from genpipe.models.quantizer import Bottleneck, Plain

HEAD = 32
"""Channels of a head of EfficientViT's attention."""

Resampling = Literal["fold", "stride"]


class DeepCompressionConfig(Config):
    """Sizes, one entry a level; the default is SANA's f32c32 (312 M parameters). Factor: 2 for each level after the
    first, so a seventh level (2048 wide, 128 latent channels) makes it f64."""

    kind: Literal["deep_compression"]
    image_channels: PositiveInt = Field(3, description="channels of an image")
    latent_channels: PositiveInt = Field(32, description="channels of a latent cell")
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=2)] = Field(
        (128, 256, 512, 512, 1024, 1024), description="channels of each level, finest first"
    )
    encoder_blocks: tuple[NonNegativeInt, ...] = Field(
        (2, 2, 2, 3, 3, 3), description="0 at the first level: its resolution is left by the first layer"
    )
    decoder_blocks: tuple[NonNegativeInt, ...] = Field(
        (3, 3, 3, 3, 3, 3), description="blocks of each level, finest first"
    )
    attention_from: NonNegativeInt = Field(3, description="level from which on blocks are EfficientViT's")
    attention_kernels: tuple[PositiveInt, ...] = Field((5,), description="convolutions that make its further scales")
    resampling: Resampling = Field(
        "stride", description="convolutions around a change of resolution: strided or after nearest; fold: as the paper"
    )
    bottleneck: Bottleneck = Field(Plain(kind="plain"), description="what lies between encoder and decoder")

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each axis."""
        return 2 ** (len(self.widths) - 1)

    @model_validator(mode="after")
    def _channels_group(self) -> Self:
        levels = len(self.widths)
        if len(self.encoder_blocks) != levels or len(self.decoder_blocks) != levels:
            raise ValueError(f"encoder_blocks and decoder_blocks need one entry for each of the {levels} widths")
        if 0 in (*self.encoder_blocks[1:], *self.decoder_blocks[1:]):
            raise ValueError("encoder_blocks and decoder_blocks may be 0 at the first level only")
        if self.widths[-1] % self.latent_channels:
            raise ValueError(f"the last of widths, {self.widths[-1]}, is not a multiple of latent_channels "
                             f"{self.latent_channels}; change one")  # fmt: skip
        for high, low in pairwise(self.widths):
            if 4 * high % low:
                raise ValueError(f"widths: {low} does not divide 4 times {high}, the level above; change one")
        if any(width % HEAD for width in self.widths[self.attention_from :]):
            raise ValueError(f"widths of levels with attention must be multiples of {HEAD}; or raise attention_from")
        if any(kernel % 2 == 0 for kernel in self.attention_kernels):
            raise ValueError("attention_kernels must be odd")
        return self


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each cell (Zhang & Sennrich 2019), with gain and bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Grid [B, C, H, W], normalized in fp32."""
        scale = torch.rsqrt(x_BCHW.float().square().mean(1, keepdim=True) + 1e-5)
        return (x_BCHW * scale) * self.weight[:, None, None] + self.bias[:, None, None]


class Block(ResidualBlock):
    """3x3 convolution, SiLU, 3x3 convolution, norm; added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Grid [B, C, H, W] -> the same shape."""
        return x_BCHW + self.norm(self.conv2(F.silu(self.conv1(x_BCHW))))


class LinearAttention(ResidualBlock):
    """ReLU linear attention over the grid and convolved copies of it; added to the input."""

    def __init__(self, channels: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.q = nn.Conv2d(channels, channels, 1, bias=False)
        self.k = nn.Conv2d(channels, channels, 1, bias=False)
        self.v = nn.Conv2d(channels, channels, 1, bias=False)
        wide, heads = 3 * channels, channels // HEAD
        self.scales = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(wide, wide, kernel, padding=kernel // 2, groups=wide, bias=False),
                nn.Conv2d(wide, wide, 1, groups=3 * heads, bias=False),
            )
            for kernel in kernels
        )
        self.out = nn.Conv2d(channels * (1 + len(kernels)), channels, 1, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Grid [B, C, H, W] -> the same shape; the attention itself is computed in fp32."""
        qkv = torch.cat([self.q(x_BCHW), self.k(x_BCHW), self.v(x_BCHW)], dim=1)
        scales = torch.cat([qkv, *(scale(qkv) for scale in self.scales)], dim=1)
        # Heads are consecutive thirds of the concatenation, whatever they were projected as: the published order.
        q, k, v = scales.flatten(2).unflatten(1, (-1, 3 * HEAD)).float().chunk(3, dim=2)  # each [B, G, E, L]
        with fp32(x_BCHW.device):
            q, k = F.relu(q), F.relu(k)
            values = v @ k.transpose(-1, -2) @ q
            weights = k.sum(-1, keepdim=True).transpose(-1, -2) @ q
            attended = values / (weights + 1e-15)
        grid = attended.flatten(1, 2).unflatten(2, x_BCHW.shape[-2:]).to(x_BCHW.dtype)
        return x_BCHW + self.norm(self.out(grid))


class GatedConv(ResidualBlock):
    """Widen four times and gate with a depthwise convolution (GLU MBConv); added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 8 * channels
        self.widen = nn.Conv2d(channels, hidden, 1)
        self.depth = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.narrow = nn.Conv2d(hidden // 2, channels, 1, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Grid [B, C, H, W] -> the same shape."""
        value, gate = self.depth(F.silu(self.widen(x_BCHW))).chunk(2, dim=1)
        return x_BCHW + self.norm(self.narrow(value * F.silu(gate)))


class Down(nn.Module):
    """Half the resolution; the shortcut folds space into channels and averages neighbors of them."""

    def __init__(self, channels_in: int, channels_out: int, *, resampling: Resampling, shortcut: bool = True) -> None:
        super().__init__()
        self.folds = resampling == "fold"
        self.channels_out = channels_out if shortcut else None
        made, stride = (channels_out // 4, 1) if self.folds else (channels_out, 2)
        self.conv = nn.Conv2d(channels_in, made, 3, stride=stride, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Grid [B, channels_in, H, W] -> [B, channels_out, H / 2, W / 2]."""
        h = self.conv(x_BCHW)
        h = F.pixel_unshuffle(h, 2) if self.folds else h
        if self.channels_out is None:
            return h
        return h + F.pixel_unshuffle(x_BCHW, 2).unflatten(1, (self.channels_out, -1)).mean(2)


class Up(nn.Module):
    """Twice the resolution; the shortcut duplicates channels and unfolds them into space."""

    def __init__(self, channels_in: int, channels_out: int, *, resampling: Resampling, shortcut: bool = True) -> None:
        super().__init__()
        self.folds = resampling == "fold"
        self.repeats = 4 * channels_out // channels_in if shortcut else 0
        self.conv = nn.Conv2d(channels_in, 4 * channels_out if self.folds else channels_out, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Grid [B, channels_in, H, W] -> [B, channels_out, 2H, 2W]."""
        if self.folds:
            h = F.pixel_shuffle(self.conv(x_BCHW), 2)
        else:
            h = self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return h + F.pixel_shuffle(x_BCHW.repeat_interleave(self.repeats, dim=1), 2) if self.repeats else h


class ToLatents(nn.Module):
    """A convolution; its first `latents` channels are added to averages of the input's neighboring channels."""

    def __init__(self, channels: int, *, latents: int, channels_out: int) -> None:
        super().__init__()
        self.latents = latents
        self.conv = nn.Conv2d(channels, channels_out, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features [B, channels, H, W] -> [B, channels_out, H, W]."""
        h = self.conv(x_BCHW)
        averages = x_BCHW.unflatten(1, (self.latents, -1)).mean(2)
        return h + F.pad(averages, (0, 0, 0, 0, 0, h.shape[1] - self.latents))


class FromLatents(nn.Module):
    """A convolution, added to the latents with each channel duplicated."""

    def __init__(self, latents: int, channels: int) -> None:
        super().__init__()
        self.repeats = channels // latents
        self.conv = nn.Conv2d(latents, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Latents [B, latents, H, W] -> features [B, channels, H, W]."""
        return self.conv(x_BCHW) + x_BCHW.repeat_interleave(self.repeats, dim=1)


def deep_compression_encoder(cfg: DeepCompressionConfig, *, channels_out: int) -> nn.Sequential:
    """Images to `channels_out` channels of the latent grid."""
    last = len(cfg.widths) - 1
    layers: list[nn.Module] = []
    if cfg.encoder_blocks[0]:
        layers.append(nn.Conv2d(cfg.image_channels, cfg.widths[0], 3, padding=1))
    else:
        layers.append(Down(cfg.image_channels, cfg.widths[1], resampling=cfg.resampling, shortcut=False))
    for level, (width, count) in enumerate(zip(cfg.widths, cfg.encoder_blocks, strict=True)):
        layers += _blocks(cfg, level, count)
        if count and level < last:
            layers.append(Down(width, cfg.widths[level + 1], resampling=cfg.resampling))
    layers.append(ToLatents(cfg.widths[-1], latents=cfg.latent_channels, channels_out=channels_out))
    return nn.Sequential(*layers)


def deep_compression_decoder(cfg: DeepCompressionConfig) -> nn.Sequential:
    """Latents to images."""
    last = len(cfg.widths) - 1
    layers: list[nn.Module] = [FromLatents(cfg.latent_channels, cfg.widths[-1])]
    for level, (width, count) in reversed(list(enumerate(zip(cfg.widths, cfg.decoder_blocks, strict=True)))):
        if count and level < last:
            layers.append(Up(cfg.widths[level + 1], width, resampling=cfg.resampling))
        layers += _blocks(cfg, level, count)
    top = cfg.widths[0] if cfg.decoder_blocks[0] else cfg.widths[1]
    layers += [ChannelNorm(top), nn.ReLU()]
    if cfg.decoder_blocks[0]:
        layers.append(nn.Conv2d(top, cfg.image_channels, 3, padding=1))
    else:
        layers.append(Up(top, cfg.image_channels, resampling=cfg.resampling, shortcut=False))
    return nn.Sequential(*layers)


def _blocks(cfg: DeepCompressionConfig, level: int, count: int) -> list[nn.Module]:
    width = cfg.widths[level]
    if level < cfg.attention_from:
        return [Block(width) for _ in range(count)]
    return [nn.Sequential(LinearAttention(width, cfg.attention_kernels), GatedConv(width)) for _ in range(count)]
