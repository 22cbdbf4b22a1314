"""Pixel-space diffusion upsampler (Ramesh et al. 2022, sec. 2.1; Saharia et al. 2021, SR3).

Shapes: B batch, C image channels, H and W pixels of the large image, D width.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from genpipe.config import Config
from genpipe.models.layers import LevelEmbedding

GROUPS = 16
"""Groups of every GroupNorm; the width is a multiple of it."""


class UpsamplerConfig(Config):
    """Sizes; `patch_size` folds pixels into channels, so that every convolution runs at low resolution."""

    image_channels: PositiveInt = 3
    patch_size: PositiveInt = 4
    width: Annotated[int, Field(gt=0, multiple_of=GROUPS)] = 128
    depth: PositiveInt = 6


class ModulatedBlock(nn.Module):
    """Residual block of two 3x3 convolutions, shifted and scaled by a vector; the identity at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, width, affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x_BDHW: Tensor, *, vector: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_BDHW)))
        shift, scale = self.modulation(vector)[:, :, None, None].chunk(2, dim=1)
        return x_BDHW + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class Upsampler(nn.Module):
    """Fully convolutional: trained on crops, used on whole images; sees `low_res` beside the noised image.

    unCLIP, too, uses no attention in its upsamplers, so that they run at sizes they were not trained on.
    """

    def __init__(self, cfg: UpsamplerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        area = cfg.patch_size**2
        self.image_in = nn.Conv2d(2 * cfg.image_channels * area, cfg.width, 3, padding=1)
        self.time_in = LevelEmbedding(cfg.width)
        self.noise_aug_in = LevelEmbedding(cfg.width)
        self.blocks = nn.ModuleList(ModulatedBlock(cfg.width) for _ in range(cfg.depth))
        self.norm_out = nn.GroupNorm(GROUPS, cfg.width)
        self.image_out = nn.Conv2d(cfg.width, cfg.image_channels * area, 3, padding=1)
        nn.init.zeros_(self.image_out.weight)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, *, low_res: Tensor, noise_aug: Tensor) -> Tensor:
        """Prediction [B, C, H, W] in fp32 at noised images x [B, C, H, W] and times t [B] in [0, 1].

        low_res [B, C, H, W]: the small image in [-1, 1], enlarged to H x W, with noise of level noise_aug [B]
        in [0, 1] already added by the caller. H and W are multiples of patch_size.
        """
        if low_res.shape != x_BCHW.shape:
            raise ValueError(f"low_res {tuple(low_res.shape)} is not enlarged to the target's {tuple(x_BCHW.shape)}")
        both = torch.cat([x_BCHW, low_res.to(x_BCHW.dtype)], dim=1)
        x = self.image_in(F.pixel_unshuffle(both, self.cfg.patch_size))
        vector = F.silu(self.time_in(t_B) + self.noise_aug_in(noise_aug))
        for block in self.blocks:
            x = block(x, vector=vector)
        out = self.image_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(out, self.cfg.patch_size).float()
