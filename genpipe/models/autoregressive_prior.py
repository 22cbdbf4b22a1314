"""The autoregressive prior of unCLIP (Ramesh et al. 2022, sec. 2.2): an image embedding, code by code.

Shapes: B batch, L text tokens, P = L + 2 tokens of the prefix, K codes of an embedding, N buckets of a code,
D embedding width, W text width, M model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from genpipe.models.layers import KeyValueCache, LayerNorm, TransformerBlock, TransformerConfig
from genpipe.models.pca_quantizer import PrincipalCodes
from genpipe.models.prior_conditioning import Caption, NullText, causal_mask, drop_captions, null_caption


class AutoregressivePriorConfig(TransformerConfig):
    """Size of the autoregressive prior's transformer, and how image embeddings become codes.

    The paper's: 319 components of 1,024, 1,024 buckets, dot products from the upper half.
    """

    kind: Literal["autoregressive"] = "autoregressive"
    width: PositiveInt = 192
    depth: PositiveInt = 4
    null_text: NullText = Field("learned", description="what replaces a dropped caption")
    qk_norm: bool = Field(True, description="layer-norm queries and keys, against divergence in bf16")
    variance: float = Field(0.99, gt=0, le=1, description="share of the embeddings' variance that codes keep")
    max_components: PositiveInt | None = Field(None, description="codes of an embedding at most; default: no limit")
    buckets: int = Field(1024, ge=2, description="values of a code")
    dot_buckets: int = Field(100, ge=2, description="values of the text-image dot product's token: percentiles")
    dot_above: float = Field(0.5, ge=0, lt=1, description="samples are asked for a dot product above this quantile")
    fit_samples: int = Field(100_000, ge=2, description="training samples that components and buckets are fitted on")


@dataclass
class Drawing:
    """State of a sequence that is sampled code by code: each block's keys and values, and which are not padding."""

    caches: list[KeyValueCache]
    mask_BS: Tensor
    codes: int = 0


class AutoregressivePrior(nn.Module):
    """Causal transformer over [text encodings, text embed, dot product, codes]; predicts each code from those before.

    The codes are `codes`'s, a PrincipalCodes that is fitted before training. Where the text is dropped, so is the
    dot product, which depends on it.
    """

    SPECIAL = 2  # text embed, dot product

    def __init__(
        self, cfg: AutoregressivePriorConfig, *, embed_dim: int, text_width: int, components: int, null_tokens: int = 1
    ) -> None:
        super().__init__()
        self.cfg, self.components = cfg, components
        self.codes = PrincipalCodes(
            embed_dim=embed_dim, components=components, buckets=cfg.buckets, dot_buckets=cfg.dot_buckets
        )
        self.encodings_in = nn.Linear(text_width, cfg.width)
        self.text_in = nn.Linear(embed_dim, cfg.width)
        self.dot_in = nn.Embedding(cfg.dot_buckets + 1, cfg.width)  # the last for none
        self.code_in = nn.Embedding(cfg.buckets, cfg.width)
        for embedding in (self.dot_in, self.code_in):
            nn.init.normal_(embedding.weight, std=0.02)
        # The encodings carry their positions from the text tower, and the last code is never read.
        self.positions_SM = nn.Parameter(0.02 * torch.randn(self.SPECIAL + components - 1, cfg.width))
        self.null_encoding_W, self.null_text_D = null_caption(
            cfg.null_text, embed_dim=embed_dim, text_width=text_width, null_tokens=null_tokens
        )
        self.blocks = nn.ModuleList(
            TransformerBlock(cfg.width, heads=cfg.heads, mlp_ratio=cfg.mlp_ratio, qk_norm=cfg.qk_norm)
            for _ in range(cfg.depth)
        )
        self.norm = LayerNorm(cfg.width)
        self.code_out = nn.Linear(cfg.width, cfg.buckets)

    def forward(
        self,
        codes: Tensor,
        *,
        dot: Tensor,
        text_embed: Tensor,
        text_encodings: Tensor,
        text_mask: Tensor,
        drop_text: Tensor,
    ) -> Tensor:
        """Logits of every code given those before it, fp32 [B, K, N].

        codes int64 [B, K] and dot int64 [B]: of `self.codes`; text_embed [B, D], in about unit variance;
        text_encodings [B, L, W]; text_mask bool [B, L], True at tokens that are not padding; drop_text bool [B], True
        where their nulls replace caption and dot product.
        """
        prefix_BPM, mask_BP = self._prefix(dot, Caption(text_embed, text_encodings, text_mask), drop_text)
        read_BJM = self.code_in(codes[:, :-1]) + self.positions_SM[self.SPECIAL :]  # J = K - 1
        x_BSM = torch.cat([prefix_BPM, read_BJM], dim=1)
        mask = causal_mask(mask_BP, extra=read_BJM.shape[1])
        for block in self.blocks:
            x_BSM = block(x_BSM, mask=mask)
        return self._logits(x_BSM[:, prefix_BPM.shape[1] - 1 :])

    def start(
        self, dot: Tensor, *, text_embed: Tensor, text_encodings: Tensor, text_mask: Tensor, drop_text: Tensor
    ) -> tuple[Tensor, Drawing]:
        """Logits of the first code, fp32 [B, N], and what `extend` needs; arguments as of `forward`."""
        x_BPM, mask_BP = self._prefix(dot, Caption(text_embed, text_encodings, text_mask), drop_text)
        room = x_BPM.shape[1] + self.components - 1
        drawing = Drawing([KeyValueCache(room) for _ in self.blocks], mask_BP)
        return self._step(x_BPM, drawing, mask=causal_mask(mask_BP, extra=0)), drawing

    def extend(self, code: Tensor, drawing: Drawing) -> Tensor:
        """Logits of the next code, fp32 [B, N], after the code int64 [B]; `drawing` moves on."""
        x_B1M = (self.code_in(code) + self.positions_SM[self.SPECIAL + drawing.codes])[:, None]
        drawing.codes += 1
        drawing.mask_BS = torch.cat([drawing.mask_BS, drawing.mask_BS.new_ones(len(code), 1)], dim=1)
        return self._step(x_B1M, drawing, mask=drawing.mask_BS[:, None, None])

    def _step(self, x_BLM: Tensor, drawing: Drawing, *, mask: Tensor) -> Tensor:
        for block, cache in zip(self.blocks, drawing.caches, strict=True):
            x_BLM = block(x_BLM, mask=mask, cache=cache)
        return self._logits(x_BLM[:, -1])

    def _prefix(self, dot_B: Tensor, caption: Caption, drop_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, P, M] of caption and dot product, and bool [B, P], False at padding."""
        caption = drop_captions(caption, drop_B, null_encodings=self.null_encoding_W, null_embed=self.null_text_D)
        dot_B = torch.where(drop_B, self.cfg.dot_buckets, dot_B)
        special = torch.stack([self.text_in(caption.embed), self.dot_in(dot_B)], dim=1)
        special = special + self.positions_SM[: self.SPECIAL]
        prefix_BPM = torch.cat([self.encodings_in(caption.encodings), special], dim=1)
        return prefix_BPM, torch.cat([caption.text_mask, caption.text_mask.new_ones(len(dot_B), self.SPECIAL)], dim=1)

    def _logits(self, x: Tensor) -> Tensor:
        return self.code_out(self.norm(x)).float()
