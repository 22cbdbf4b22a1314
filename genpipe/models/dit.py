"""Diffusion transformer (Peebles & Xie 2023) with adaLN-zero, and three ways to attend to a context.

Shapes: B batch, C channels, H and W grid, L tokens, D width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from genpipe.models.layers import (
    Activation,
    Attention,
    CrossAttention,
    LayerNorm,
    LevelEmbedding,
    Mlp,
    Modulation,
    ResidualBlock,
    Rotary,
    TransformerConfig,
    grid_coordinates,
    joint_mask,
    label_table,
    patchify,
    sinusoid,
    unpatchify,
    zeroed,
)


class DiTConfig(TransformerConfig):
    """Size of the transformer, its positions, and how it attends to the context.

    positions: "absolute" adds sinusoids of the coordinates to the tokens, "relative" rotates queries and keys by them,
    so that attention sees differences of coordinates only.

    context: "keys" extends every attention's keys and values (Nichol et al. 2021, GLIDE), "cross" follows it with
    cross-attention (Chen et al. 2023, PixArt-alpha), "joint" appends the context to the image's tokens (Peebles & Xie
    2023, section 3.2, in-context conditioning).

    The paper's own has qk_norm false, activation gelu_tanh, norm_eps 1e-6; DiT-XL/2 is width 1152, depth 28, heads 16.
    """

    kind: Literal["dit"] = "dit"
    patch_size: PositiveInt = Field(2, description="side of a token's patch, in pixels or latent cells")
    width: PositiveInt = 256
    depth: PositiveInt = 8
    positions: Literal["absolute", "relative"] = Field(
        "absolute", description="absolute: sinusoids on the tokens; relative: rotated queries and keys"
    )
    context: Literal["keys", "cross", "joint"] = Field(
        "keys", description="keys: of every attention; cross: attention of its own; joint: more tokens"
    )
    qk_norm: bool = Field(True, description="layer norm on queries and keys, which keeps bf16 training stable")
    activation: Activation = Field("gelu", description="of the MLPs")
    norm_eps: PositiveFloat = Field(1e-5, description="of the layer norms")

    @model_validator(mode="after")
    def _positions_fit(self) -> Self:
        """Sines and cosines of row and column share the width, or each head's."""
        heads, of = (1, "width") if self.positions == "absolute" else (self.heads, "width / heads")
        if (self.width // heads) % 4:
            raise ValueError(
                f"{of} {self.width // heads} is not divisible by 4, as positions {self.positions!r} need; change it"
            )
        return self

    @property
    def grid_multiple(self) -> int:
        """What height and width of the grid must be multiples of."""
        return self.patch_size


class DiTConditions(NamedTuple):
    """What every block reads: conditioning vector [B, D], context and mask as in `DiTBlock`, positions."""

    vector: Tensor
    context: Tensor | None
    mask: Tensor | None
    rotary: Rotary | None


class DiTBlock(ResidualBlock):
    """Attention and MLP, shifted, scaled and gated by the conditioning vector; the identity at the start.

    The context [B, M, context_dim] extends the keys, with a mask [B, 1, 1, L + M], or is attended to between the
    two, with a mask [B, 1, 1, M]. With neither, the mask is over the tokens themselves.
    """

    def __init__(self, cfg: DiTConfig, *, context_dim: int | None) -> None:
        super().__init__()
        self.norm_eps = cfg.norm_eps
        keys_dim = context_dim if cfg.context == "keys" else None
        self.attention = Attention(cfg.width, heads=cfg.heads, context_dim=keys_dim, qk_norm=cfg.qk_norm)
        self.mlp = Mlp(cfg.width, ratio=cfg.mlp_ratio, activation=cfg.activation)
        self.modulation = zeroed(Modulation(cfg.width, 6 * cfg.width))
        self.cross_attention = None
        if context_dim is not None and cfg.context == "cross":
            self.cross_attention = CrossAttention(
                cfg.width, heads=cfg.heads, context_dim=context_dim, qk_norm=cfg.qk_norm
            )
            zeroed(self.cross_attention.out)

    def forward(self, x_BLD: Tensor, conditions: DiTConditions) -> Tensor:
        """Tokens [B, L, D] -> the same shape."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(conditions.vector)[:, None].chunk(
            6, dim=-1
        )
        modulated = modulate(x_BLD, shift=shift_a, scale=scale_a, eps=self.norm_eps)
        if self.cross_attention is None:
            attended = self.attention(
                modulated, mask=conditions.mask, context=conditions.context, rotary=conditions.rotary
            )
            x_BLD = x_BLD + gate_a * attended
        else:
            assert conditions.context is not None, "DiT checks it"
            x_BLD = x_BLD + gate_a * self.attention(modulated, rotary=conditions.rotary)
            x_BLD = x_BLD + self.cross_attention(x_BLD, context=conditions.context, mask=conditions.mask)
        return x_BLD + gate_m * self.mlp(modulate(x_BLD, shift=shift_m, scale=scale_m, eps=self.norm_eps))


def modulate(x_BLD: Tensor, *, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm without parameters, then x (1 + scale) + shift."""
    return F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps) * (1 + scale) + shift


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
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        width, area = cfg.width, cfg.patch_size**2
        self.patches_in = nn.Linear(in_channels * area, width)
        self.time_in = LevelEmbedding(width)
        self.vector_in = None if vector_dim is None else nn.Linear(vector_dim, width)
        self.context_norm = None if context_dim is None else LayerNorm(context_dim)
        joint_dim, own_dim = (context_dim, None) if cfg.context == "joint" else (None, context_dim)
        self.blocks = nn.ModuleList(DiTBlock(cfg, context_dim=own_dim) for _ in range(cfg.depth))
        self.modulation_out = zeroed(Modulation(width, 2 * width))
        self.patches_out = zeroed(nn.Linear(width, out_channels * area))
        self.context_in = None if joint_dim is None else nn.Linear(joint_dim, width)
        self.labels_in = label_table(classes, width)

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        *,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        vector: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Prediction [B, out_channels, H, W] in fp32 for x [B, in_channels, H, W] at times t [B] in [0, 1].

        context [B, M, context_dim] with context_mask bool [B, M], True at tokens that count (at least one where
        context is "cross"); vector [B, vector_dim] and labels int64 [B], of which `classes` is the null class, are
        embedded and added to the time embedding. `generator` is for a `UNet`'s dropout; there is none here. H and W
        are multiples of patch_size, or ValueError is raised.
        """
        assert (context is None) == (self.context_norm is None), "context is given as the DiT was built"
        assert (vector is None) == (self.vector_in is None), "a vector is given as the DiT was built"
        assert (labels is None) == (self.labels_in is None), "labels are given as the DiT was built"
        height, width = x_BCHW.shape[-2:]
        x_BLD = self.patches_in(patchify(x_BCHW, self.cfg.patch_size))
        tokens = x_BLD.shape[1]
        coordinates = grid_coordinates(height // self.cfg.patch_size, width // self.cfg.patch_size, device=x_BLD.device)
        if self.cfg.positions == "absolute":
            x_BLD = x_BLD + sinusoid(coordinates, dim=self.cfg.width // 2).flatten(1)
        embedded = self.time_in(t_B)
        if self.vector_in is not None:
            embedded = embedded + self.vector_in(vector)
        if self.labels_in is not None:
            embedded = embedded + self.labels_in(labels)
        if self.context_norm is not None:
            context = self.context_norm(context)
        if self.context_in is not None:
            x_BLD = torch.cat([x_BLD, self.context_in(context)], dim=1)
            context = None
            # The context's tokens have the coordinates of the first cell, whose rotation is the identity.
            coordinates = F.pad(coordinates, (0, 0, 0, x_BLD.shape[1] - tokens))
        rotary = None
        if self.cfg.positions == "relative":
            rotary = Rotary(coordinates, head_dim=self.cfg.width // self.cfg.heads)
        conditions = DiTConditions(F.silu(embedded), context, self._mask(context_mask, tokens=tokens), rotary)
        for block in self.blocks:
            x_BLD = block(x_BLD, conditions)
        shift, scale = self.modulation_out(conditions.vector)[:, None].chunk(2, dim=-1)
        out = self.patches_out(modulate(x_BLD[:, :tokens], shift=shift, scale=scale, eps=self.cfg.norm_eps))
        return unpatchify(out, self.cfg.patch_size, height=height, width=width).float()

    def _mask(self, context_mask_BM: Tensor | None, *, tokens: int) -> Tensor | None:
        """Over the context alone if it is crossed, else over the image's tokens and the context's."""
        if context_mask_BM is None:
            return None
        crossed = self.cfg.context == "cross"
        return context_mask_BM[:, None, None] if crossed else joint_mask(context_mask_BM, tokens=tokens)
