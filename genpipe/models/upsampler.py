"""Diffusion upsamplers (Ramesh et al. 2022, sec. 2.1; Saharia et al. 2021, SR3), of pixels or of latents.

Shapes: B batch, C channels of what is drawn, S of the small image, H and W of the large grid, D width.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, Tag
from torch import Tensor, nn

from genpipe.config import Config, by_kind
from genpipe.models.layers import LevelEmbedding, Modulation, ResidualBlock
from genpipe.models.unet import UNet, UNetConfig

GROUPS = 16
"""Groups of the convolutional upsampler's GroupNorms; its width is a multiple of it."""


class ConvolutionalConfig(Config):
    """Sizes; `patch_size` folds pixels into channels, so that every convolution runs at low resolution."""

    kind: Literal["convolutional"] = "convolutional"
    image_channels: PositiveInt = Field(3, description="channels of an image")
    patch_size: PositiveInt = Field(4, description="side of the squares of pixels that are folded into channels first")
    width: Annotated[int, Field(gt=0, multiple_of=GROUPS)] = Field(128, description="channels of the blocks")
    depth: PositiveInt = Field(6, description="residual blocks")

    @property
    def grid_multiple(self) -> int:
        """What height and width of the large grid must be multiples of."""
        return self.patch_size


class UNetUpsamplerConfig(UNetConfig):
    """ADM's U-Net, without attention where `attention_at` names no level, as unCLIP's upsamplers."""

    image_channels: PositiveInt = Field(3, description="channels of an image")
    attention_at: tuple[PositiveInt, ...] = ()


UpsamplerConfig = Annotated[
    Annotated[ConvolutionalConfig, Tag("convolutional")] | Annotated[UNetUpsamplerConfig, Tag("unet")],
    by_kind("convolutional"),
]


class ModulatedBlock(ResidualBlock):
    """Residual block of two 3x3 convolutions, shifted and scaled by a vector; the identity at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, width, affine=False)
        self.modulation = Modulation(width, 2 * width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x_BDHW: Tensor, *, vector: Tensor) -> Tensor:
        """Grid [B, D, H, W] and conditioning vector [B, D] -> the same grid shape."""
        h = self.conv1(F.silu(self.norm1(x_BDHW)))
        shift, scale = self.modulation(vector)[:, :, None, None].chunk(2, dim=1)
        return x_BDHW + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class ConvolutionalUpsampler(nn.Module):
    """Fully convolutional: trained on crops, used on whole images; sees `low_res` beside the noised grid.

    unCLIP, too, uses no attention in its upsamplers, so that they run at sizes they were not trained on.
    """

    def __init__(self, cfg: ConvolutionalConfig, *, channels: int | None = None, out_channels: int | None = None):
        super().__init__()
        self.cfg = cfg
        channels = channels or cfg.image_channels
        area = cfg.patch_size**2
        self.image_in = nn.Conv2d((channels + cfg.image_channels) * area, cfg.width, 3, padding=1)
        self.time_in = LevelEmbedding(cfg.width)
        self.noise_aug_in = LevelEmbedding(cfg.width)
        self.blocks = nn.ModuleList(ModulatedBlock(cfg.width) for _ in range(cfg.depth))
        self.norm_out = nn.GroupNorm(GROUPS, cfg.width)
        self.image_out = nn.Conv2d(cfg.width, (out_channels or channels) * area, 3, padding=1)
        nn.init.zeros_(self.image_out.weight)

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        *,
        low_res: Tensor,
        noise_aug: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Prediction [B, out_channels, H, W] in fp32 at noised x [B, C, H, W] and times t [B] in [0, 1].

        low_res [B, S, H, W]: the small image in [-1, 1], enlarged to H x W, with noise of level noise_aug [B]
        in [0, 1] already added by the caller. `generator` is for the dropout of a `UNet`; there is none here. H and W
        are multiples of `cfg.grid_multiple`.
        """
        x = self.image_in(F.pixel_unshuffle(_beside(x_BCHW, low_res), self.cfg.patch_size))
        vector = F.silu(self.time_in(t_B) + self.noise_aug_in(noise_aug))
        for block in self.blocks:
            x = block(x, vector=vector)
        out = self.image_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(out, self.cfg.patch_size).float()


class UNetUpsampler(nn.Module):
    """A U-Net that sees `low_res` beside the noised grid, conditioned on the time and on the noise of `low_res`."""

    def __init__(self, cfg: UNetUpsamplerConfig, *, channels: int | None = None, out_channels: int | None = None):
        super().__init__()
        self.cfg = cfg
        channels = channels or cfg.image_channels
        self.noise_aug_in = LevelEmbedding(cfg.width)
        self.unet = UNet(
            cfg,
            in_channels=channels + cfg.image_channels,
            out_channels=out_channels or channels,
            vector_dim=cfg.width,
        )

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        *,
        low_res: Tensor,
        noise_aug: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As `ConvolutionalUpsampler`'s; `generator` as in `UNet`."""
        return self.unet(_beside(x_BCHW, low_res), t_B, vector=self.noise_aug_in(noise_aug), generator=generator)


Upsampler = ConvolutionalUpsampler | UNetUpsampler


def build_upsampler(cfg: ConvolutionalConfig | UNetUpsamplerConfig, **sizes: int) -> Upsampler:
    """The upsampler of a config; `sizes`: `channels` of what is drawn, by default the image's, and `out_channels`."""
    return UNetUpsampler(cfg, **sizes) if isinstance(cfg, UNetUpsamplerConfig) else ConvolutionalUpsampler(cfg, **sizes)


def _beside(x_BCHW: Tensor, low_res: Tensor) -> Tensor:
    sides, given = tuple(x_BCHW.shape[-2:]), tuple(low_res.shape[-2:])
    if sides != given:
        raise ValueError(f"low_res {given} is not enlarged to the target's {sides}")
    return torch.cat([x_BCHW, low_res.to(x_BCHW.dtype)], dim=1)
