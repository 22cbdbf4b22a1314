"""What a U-Net is made of: residual blocks, resizing, and the two kinds of attention over a grid.

Shapes: B batch, C channels, H and W grid, L = H W tokens, M context tokens, E width of the conditioning vector.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genpipe.models.layers import (
    Attention,
    CrossAttention,
    LayerNorm,
    Modulation,
    ResidualBlock,
    dropout,
    joint_mask,
    zeroed,
)

ModulationKind = Literal["add", "scale_shift"]


class UNetConditions(NamedTuple):
    """What every block reads: vector [B, E], activated; context [B, M, ...] and context_mask bool [B, M], or None.

    `generator` says what dropout drops; None: nothing.
    """

    vector: Tensor
    context: Tensor | None
    context_mask: Tensor | None
    generator: torch.Generator | None


class UNetResBlock(ResidualBlock):
    """Twice GroupNorm, SiLU, 3x3 convolution, added to the (projected) input, which it is at the start.

    The vector is added between the two (Ho et al. 2020), or scales and shifts the second norm (Dhariwal & Nichol
    2021, eq. 4). `resize` halves or doubles the grid on both paths before the first convolution (ibid., sec. 3).
    `dropout` is the share dropped before the second one, by the `number` of the block in its network.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        vector_dim: int,
        groups: int,
        modulation: ModulationKind,
        resize: Literal["down", "up"] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout, self.number = dropout, 0  # the network numbers its blocks
        self.scale_shift = modulation == "scale_shift"
        self.resize = resize
        self.norm1 = nn.GroupNorm(groups, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.modulation = Modulation(vector_dim, 2 * channels_out if self.scale_shift else channels_out)
        self.norm2 = nn.GroupNorm(groups, channels_out)
        self.conv2 = zeroed(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.skip = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x_BCHW: Tensor, conditions: UNetConditions) -> Tensor:
        """Grid [B, channels_in, H, W] -> [B, channels_out, H, W], or half or twice H and W."""
        h = self._resized(F.silu(self.norm1(x_BCHW)))
        h = self.conv1(h)
        levels = self.modulation(conditions.vector)[:, :, None, None]
        if self.scale_shift:
            scale, shift = levels.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + levels)
        h = F.silu(h)
        if self.dropout and conditions.generator is not None:
            h = dropout(h, self.dropout, generator=conditions.generator, number=self.number)
        return self.skip(self._resized(x_BCHW)) + self.conv2(h)

    def _resized(self, x_BCHW: Tensor) -> Tensor:
        if self.resize == "down":
            return F.avg_pool2d(x_BCHW, 2)
        return x_BCHW if self.resize is None else F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")


class UNetDownsample(nn.Module):
    """3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x_BCHW: Tensor, conditions: UNetConditions) -> Tensor:
        """Grid [B, C, H, W] -> [B, C, H / 2, W / 2]."""
        return self.conv(x_BCHW)


class UNetUpsample(nn.Module):
    """Every cell doubled along both axes, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor, conditions: UNetConditions) -> Tensor:
        """Grid [B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class GridAttention(ResidualBlock):
    """Self-attention over the grid, added to its input; the context extends keys and values.

    ADM's attention block (Dhariwal & Nichol 2021) with GLIDE's text in it (Nichol et al. 2021, sec. 4.1).
    """

    def __init__(self, channels: int, *, heads: int, context_dim: int | None, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.attention = Attention(channels, heads=heads, context_dim=context_dim, qk_norm=False)
        zeroed(self.attention.out)

    def forward(self, x_BCHW: Tensor, conditions: UNetConditions) -> Tensor:
        """Grid [B, C, H, W] -> the same shape."""
        tokens = as_tokens(self.norm(x_BCHW))
        mask = None if conditions.context_mask is None else joint_mask(conditions.context_mask, tokens=tokens.shape[1])
        return x_BCHW + as_grid(self.attention(tokens, mask=mask, context=conditions.context), like=x_BCHW)


class SpatialTransformer(ResidualBlock):
    """Transformer over the grid with cross-attention to the context, added to its input (Rombach et al. 2022)."""

    def __init__(self, channels: int, *, heads: int, context_dim: int, depth: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.tokens_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(ContextBlock(channels, heads=heads, context_dim=context_dim) for _ in range(depth))
        self.tokens_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x_BCHW: Tensor, conditions: UNetConditions) -> Tensor:
        """Grid [B, C, H, W] -> the same shape."""
        tokens = self.tokens_in(as_tokens(self.norm(x_BCHW)))
        for block in self.blocks:
            tokens = block(tokens, conditions)
        return x_BCHW + as_grid(self.tokens_out(tokens), like=x_BCHW)


class ContextBlock(nn.Module):
    """Self-attention, cross-attention and a gated MLP, each on normed input and added to it."""

    def __init__(self, width: int, *, heads: int, context_dim: int) -> None:
        super().__init__()
        self.self_norm = LayerNorm(width)
        self.self_attention = Attention(width, heads=heads, qk_norm=False, qkv_bias=False)
        self.cross_norm = LayerNorm(width)
        self.cross_attention = CrossAttention(
            width, heads=heads, context_dim=context_dim, qk_norm=False, qkv_bias=False
        )
        self.mlp_norm = LayerNorm(width)
        self.mlp = GatedMlp(width)

    def forward(self, x_BLC: Tensor, conditions: UNetConditions) -> Tensor:
        """Tokens [B, L, C] -> the same shape."""
        x_BLC = x_BLC + self.self_attention(self.self_norm(x_BLC))
        mask = None if conditions.context_mask is None else conditions.context_mask[:, None, None]
        assert conditions.context is not None, "UNet checks it"
        x_BLC = x_BLC + self.cross_attention(self.cross_norm(x_BLC), context=conditions.context, mask=mask)
        return x_BLC + self.mlp(self.mlp_norm(x_BLC))


class GatedMlp(nn.Module):
    """GEGLU (Shazeer 2020): x GELU(gate), four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 8 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Tokens [B, L, C] -> the same shape."""
        x, gate = self.up(x_BLC).chunk(2, dim=-1)
        return self.down(x * F.gelu(gate))


def as_tokens(x_BCHW: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W, C], row by row."""
    return x_BCHW.flatten(2).transpose(1, 2)


def as_grid(tokens_BLC: Tensor, *, like: Tensor) -> Tensor:
    """Inverse of `as_tokens` for a grid of the height and width of `like`."""
    return tokens_BLC.transpose(1, 2).unflatten(2, like.shape[-2:])
