"""The U-Net of diffusion models: ADM's, GLIDE's and unCLIP's, and latent diffusion's, by settings.

Shapes: B batch, C channels, H and W grid, M context tokens, E width of the conditioning vector.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from genpipe.config import Config
from genpipe.models.layers import LevelEmbedding, label_table, zeroed
from genpipe.models.unet_blocks import (
    GridAttention,
    ModulationKind,
    SpatialTransformer,
    UNetConditions,
    UNetDownsample,
    UNetResBlock,
    UNetUpsample,
)


class UNetConfig(Config):
    """Sizes and kinds of blocks. The defaults are ADM's (Dhariwal & Nichol 2021) and GLIDE's.

    Latent diffusion (Rombach et al. 2022) has modulation add, resample conv, attention transformer, heads 8.
    """

    kind: Literal["unet"] = "unet"
    width: PositiveInt = Field(128, description="channels of the finest grid")
    multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = Field(
        (1, 2, 4), description="of the width, by level; each level after the first halves the grid"
    )
    blocks: PositiveInt = Field(2, description="residual blocks of a level on the way down; one more on the way up")
    attention_at: tuple[PositiveInt, ...] = Field(
        (2, 4), description="levels with attention, by how much coarser they are: 1, 2, 4 ...; [] is none at all"
    )
    attention: Literal["plain", "transformer"] = Field(
        "plain", description="plain: context extends the keys; transformer: cross-attention and MLP as well"
    )
    transformer_depth: PositiveInt = Field(1, description="blocks of each transformer")
    head_width: PositiveInt = Field(64, description="channels of an attention head")
    heads: PositiveInt | None = Field(None, description="heads at every level, whatever their width; default: by width")
    modulation: ModulationKind = Field("scale_shift", description="what time and embeddings do to a residual block")
    resample: Literal["block", "conv"] = Field("block", description="halve and double the grid by residual blocks")
    groups: PositiveInt = Field(32, description="groups of every GroupNorm")
    dropout: float = Field(0.0, ge=0, lt=1, description="share dropped in each residual block in training, as in ADM")

    @model_validator(mode="after")
    def _widths_divide(self) -> Self:
        levels = [2**level for level in range(len(self.multipliers))]
        if unknown := [at for at in self.attention_at if at not in levels]:
            raise ValueError(f"attention_at {unknown[0]} is none of the levels {levels} that multipliers make")
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"a level is {width} wide, which groups {self.groups} does not divide; change one")
        for at in self.attention_at:
            width = self.widths[levels.index(at)]
            if width % (self.heads or self.head_width):
                name = f"head_width {self.head_width}" if self.heads is None else f"heads {self.heads}"
                raise ValueError(f"the level {at} with attention is {width} wide, which {name} does not divide")
        return self

    @property
    def widths(self) -> list[int]:
        """Channels of each level, finest first."""
        return [self.width * multiplier for multiplier in self.multipliers]

    @property
    def grid_multiple(self) -> int:
        """What height and width of the grid must be multiples of."""
        return 2 ** (len(self.multipliers) - 1)

    def heads_of(self, width: int) -> int:
        """Attention heads of a level of this width."""
        return self.heads or width // self.head_width


class Cell(nn.Module):
    """A residual block, then attention and resizing where there are any."""

    def __init__(self, block: nn.Module, *, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention
        self.resize: nn.Module | None = None

    def forward(self, x_BCHW: Tensor, conditions: UNetConditions) -> Tensor:
        """Grid [B, C, H, W] -> the grid after the block, its attention and its resizing."""
        x_BCHW = self.block(x_BCHW, conditions)
        if self.attention is not None:
            x_BCHW = self.attention(x_BCHW, conditions)
        return x_BCHW if self.resize is None else self.resize(x_BCHW, conditions)


class UNet(nn.Module):
    """Prediction on a noised grid of any size, given time, a vector and context tokens; 0 at the start."""

    def __init__(
        self,
        cfg: UNetConfig,
        *,
        in_channels: int,
        out_channels: int,
        context_dim: int | None = None,
        vector_dim: int | None = None,
        classes: int = 0,
    ) -> None:
        super().__init__()
        if context_dim is not None and not cfg.attention_at:
            raise ValueError("attention_at is empty, so that nothing would attend to the context; name a level")
        self.cfg = cfg
        self.context_dim = context_dim
        self.time_in = LevelEmbedding(4 * cfg.width, frequencies=cfg.width)
        self.vector_in = None if vector_dim is None else nn.Linear(vector_dim, 4 * cfg.width)
        self.grid_in = nn.Conv2d(in_channels, cfg.width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, skips = cfg.width, [cfg.width]
        for level, width in enumerate(cfg.widths):
            for _ in range(cfg.blocks):
                self.down.append(self._cell(channels, width, level=level))
                channels = width
                skips.append(channels)
            if level < len(cfg.widths) - 1:
                self.down.append(Cell(self._resized(width, "down")))
                skips.append(channels)
        middle = self._attention(channels) if cfg.attention_at else None
        self.middle = nn.ModuleList(
            [Cell(self._block(channels, channels), attention=middle), Cell(self._block(channels, channels))]
        )
        for level, width in reversed(list(enumerate(cfg.widths))):
            for _ in range(cfg.blocks + 1):
                cell = self._cell(channels + skips.pop(), width, level=level)
                self.up.append(cell)
                channels = width
            if level > 0:
                cell.resize = self._resized(width, "up")
        self.norm_out = nn.GroupNorm(cfg.groups, cfg.width)
        self.grid_out = zeroed(nn.Conv2d(cfg.width, out_channels, 3, padding=1))
        self.labels_in = label_table(classes, 4 * cfg.width)
        for number, block in enumerate(m for m in self.modules() if isinstance(m, UNetResBlock)):
            block.number = number

    def _resized(self, width: int, to: Literal["down", "up"]) -> nn.Module:
        if self.cfg.resample == "block":
            return self._block(width, width, resize=to)
        return UNetDownsample(width) if to == "down" else UNetUpsample(width)

    def _block(
        self, channels_in: int, channels_out: int, *, resize: Literal["down", "up"] | None = None
    ) -> UNetResBlock:
        dim, groups, modulation = 4 * self.cfg.width, self.cfg.groups, self.cfg.modulation
        return UNetResBlock(
            channels_in,
            channels_out,
            vector_dim=dim,
            groups=groups,
            modulation=modulation,
            resize=resize,
            dropout=self.cfg.dropout,
        )

    def _cell(self, channels_in: int, width: int, *, level: int) -> Cell:
        attention = self._attention(width) if 2**level in self.cfg.attention_at else None
        return Cell(self._block(channels_in, width), attention=attention)

    def _attention(self, width: int) -> nn.Module:
        cfg, heads = self.cfg, self.cfg.heads_of(width)
        if cfg.attention == "plain":
            return GridAttention(width, heads=heads, context_dim=self.context_dim, groups=cfg.groups)
        if self.context_dim is None:
            raise ValueError("attention 'transformer' attends to a context, and this U-Net has none; use 'plain'")
        depth = cfg.transformer_depth
        return SpatialTransformer(width, heads=heads, context_dim=self.context_dim, depth=depth, groups=cfg.groups)

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

        context [B, M, context_dim] with context_mask bool [B, M], True at tokens that count (at least one, unless
        they extend the grid's own); vector [B, vector_dim] and labels int64 [B], of which `classes` is the null
        class, are embedded and added to the time embedding. With a `generator`, whose seed says what, dropout is
        applied. H and W are multiples of 2 ** (levels - 1), or ValueError is raised.
        """
        multiple, sides = self.cfg.grid_multiple, tuple(x_BCHW.shape[-2:])
        if any(side % multiple for side in sides):
            raise ValueError(f"a grid of {sides[0]}x{sides[1]} cannot be halved {len(self.cfg.widths) - 1} times")
        assert (context is None) == (self.context_dim is None), "context is given as the U-Net was built"
        assert (vector is None) == (self.vector_in is None), "a vector is given as the U-Net was built"
        assert (labels is None) == (self.labels_in is None), "labels are given as the U-Net was built"
        assert generator or not (self.cfg.dropout and self.training), "training with dropout needs a generator"
        embedded = self.time_in(t_B)
        if self.vector_in is not None:
            embedded = embedded + self.vector_in(vector)
        if self.labels_in is not None:
            embedded = embedded + self.labels_in(labels)
        conditions = UNetConditions(F.silu(embedded), context, context_mask, generator)
        x = self.grid_in(x_BCHW)
        skips = [x]
        for cell in self.down:
            x = cell(x, conditions)
            skips.append(x)
        for cell in self.middle:
            x = cell(x, conditions)
        for cell in self.up:
            x = cell(torch.cat([x, skips.pop()], dim=1), conditions)
        return self.grid_out(F.silu(self.norm_out(x))).float()
