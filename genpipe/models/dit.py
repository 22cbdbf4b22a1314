"""Diffusion transformer (Peebles & Xie 2023) with adaLN-zero and context tokens in the attention.

Shapes: B batch, C channels, H and W grid, L tokens, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from genpipe.models.layers import (
    Attention,
    LevelEmbedding,
    Mlp,
    Rotary,
    TransformerConfig,
    grid_coordinates,
    patchify,
    sinusoid,
    unpatchify,
)


class DiTConfig(TransformerConfig):
    """Size of the transformer and how it knows where a token is.

    positions: "absolute" adds sinusoids of the coordinates (a token knows its place in the image), "relative"
    turns queries and keys by them (crops and whole images look alike).
    """

    patch_size: PositiveInt = 2
    width: PositiveInt = 256
    depth: PositiveInt = 8
    positions: Literal["absolute", "relative"] = "absolute"


class DiTBlock(nn.Module):
    """Attention and MLP, shifted, scaled and gated by the conditioning vector; the identity at the start."""

    def __init__(self, cfg: DiTConfig, *, context_dim: int | None) -> None:
        super().__init__()
        self.attention = Attention(cfg.width, heads=cfg.heads, context_dim=context_dim)
        self.mlp = Mlp(cfg.width, ratio=cfg.mlp_ratio)
        self.modulation = nn.Linear(cfg.width, 6 * cfg.width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        x_BLD: Tensor,
        *,
        vector: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        rotary: Rotary | None,
    ) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(vector)[:, None].chunk(6, dim=-1)
        modulated = modulate(x_BLD, shift=shift_a, scale=scale_a)
        x_BLD = x_BLD + gate_a * self.attention(modulated, mask=mask, context=context, rotary=rotary)
        return x_BLD + gate_m * self.mlp(modulate(x_BLD, shift=shift_m, scale=scale_m))


def modulate(x_BLD: Tensor, *, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, then x (1 + scale) + shift."""
    return F.layer_norm(x_BLD, x_BLD.shape[-1:]) * (1 + scale) + shift


class DiT(nn.Module):
    """Transformer over patches of a noised grid of any size, given time, a vector and context tokens."""

    def __init__(
        self,
        cfg: DiTConfig,
        *,
        in_channels: int,
        out_channels: int,
        context_dim: int | None = None,
        vector_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        width, area = cfg.width, cfg.patch_size**2
        self.patches_in = nn.Linear(in_channels * area, width)
        self.time_in = LevelEmbedding(width)
        self.vector_in = None if vector_dim is None else nn.Linear(vector_dim, width)
        self.context_norm = None if context_dim is None else nn.LayerNorm(context_dim)
        self.blocks = nn.ModuleList(DiTBlock(cfg, context_dim=context_dim) for _ in range(cfg.depth))
        self.modulation_out = nn.Linear(width, 2 * width)
        self.patches_out = nn.Linear(width, out_channels * area)
        for layer in (self.modulation_out, self.patches_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        *,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        vector: Tensor | None = None,
    ) -> Tensor:
        """Prediction [B, out_channels, H, W] in fp32 for x [B, in_channels, H, W] at times t [B] in [0, 1].

        context [B, M, context_dim] with context_mask bool [B, M], True at tokens that count; vector [B,
        vector_dim] is added to the time embedding. H and W are multiples of patch_size.
        """
        height, width = x_BCHW.shape[-2:]
        x_BLD = self.patches_in(patchify(x_BCHW, self.cfg.patch_size))
        coordinates = self._coordinates(height, width, device=x_BCHW.device)
        rotary = None
        if self.cfg.positions == "absolute":
            x_BLD = x_BLD + sinusoid(coordinates, dim=self.cfg.width // 2).flatten(1)
        else:
            rotary = Rotary(coordinates, head_dim=self.cfg.width // self.cfg.heads)
        embedded = self.time_in(t_B)
        if self.vector_in is not None:
            assert vector is not None, "this DiT was built with vector_dim"
            embedded = embedded + self.vector_in(vector)
        conditioning = F.silu(embedded)
        if self.context_norm is not None:
            assert context is not None, "this DiT was built with context_dim"
            context = self.context_norm(context)
        mask = None if context_mask is None else self._mask(context_mask, tokens=x_BLD.shape[1])
        for block in self.blocks:
            x_BLD = block(x_BLD, vector=conditioning, context=context, mask=mask, rotary=rotary)
        shift, scale = self.modulation_out(conditioning)[:, None].chunk(2, dim=-1)
        out = self.patches_out(modulate(x_BLD, shift=shift, scale=scale))
        return unpatchify(out, self.cfg.patch_size, height=height, width=width).float()

    def _coordinates(self, height: int, width: int, *, device: torch.device) -> Tensor:
        return grid_coordinates(height // self.cfg.patch_size, width // self.cfg.patch_size, device=device)

    @staticmethod
    def _mask(context_mask_BM: Tensor, *, tokens: int) -> Tensor:
        """Keys are the image's tokens, which always count, then the context's: bool [B, 1, 1, tokens + M]."""
        image_mask = context_mask_BM.new_ones(len(context_mask_BM), tokens)
        return torch.cat([image_mask, context_mask_BM], dim=1)[:, None, None]
