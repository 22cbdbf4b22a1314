"""Convolutional blocks that several autoencoders share. Shapes: B batch, C channels, H and W of the grid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from genpipe.models.layers import ResidualBlock


class ResBlock(ResidualBlock):
    """Twice GroupNorm, SiLU, 3x3 convolution, added to the (projected) input."""

    def __init__(self, channels_in: int, channels_out: int, *, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Grid [B, channels_in, H, W] -> [B, channels_out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x_BCHW)))
        return self.skip(x_BCHW) + self.conv2(F.silu(self.norm2(h)))
