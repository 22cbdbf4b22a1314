"""The priors of unCLIP (Ramesh et al. 2022, sec. 2.2): from a caption to an image embedding.

Shapes: B batch, L text tokens, D embedding width, W text width, M model width.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, Tag, model_validator
from torch import Tensor, nn

from genpipe.config import by_kind
from genpipe.models.autoregressive_prior import AutoregressivePrior, AutoregressivePriorConfig
from genpipe.models.layers import LayerNorm, LevelEmbedding, TransformerBlock, TransformerConfig
from genpipe.models.prior_conditioning import Caption, NullText, causal_mask, drop_captions, null_caption


class DiffusionPriorConfig(TransformerConfig):
    """Size and details of the diffusion prior's transformer; configs/model/prior/karlo.yaml has the published ones."""

    kind: Literal["diffusion"] = "diffusion"
    width: PositiveInt = 192
    depth: PositiveInt = 4
    null_text: NullText = Field("learned", description="what replaces a dropped caption")
    text_tokens: bool = Field(
        True, description="read the caption's encodings; false: its embedding alone, at a fraction of the arithmetic"
    )
    text_positions: NonNegativeInt = Field(
        0, description="learned positions for so many caption tokens; 0: the encodings carry their own"
    )
    time_frequencies: int = Field(256, ge=2, multiple_of=2, description="sines and cosines of the time")
    qk_norm: bool = Field(True, description="layer-norm queries and keys, against divergence in bf16")

    @model_validator(mode="after")
    def _positions_are_of_tokens(self) -> Self:
        if self.text_positions and not self.text_tokens:
            raise ValueError("text_positions has no effect with text_tokens false: leave it out")
        return self


class DiffusionPrior(nn.Module):
    """Causal transformer over [text encodings, text embed, time, noised image embed, query]; predicts x0.

    The encodings are left out where `text_tokens` is false. Embeddings are in the units of the diffusion, about unit
    variance per dimension: the caller scales them.
    """

    SPECIAL = 4  # text embed, time, noised image embed, query

    def __init__(self, cfg: DiffusionPriorConfig, *, embed_dim: int, text_width: int, null_tokens: int = 1) -> None:
        super().__init__()
        self.cfg = cfg
        self.encodings_in = nn.Linear(text_width, cfg.width) if cfg.text_tokens else None
        self.text_in = nn.Linear(embed_dim, cfg.width)
        self.time_in = LevelEmbedding(cfg.width, frequencies=cfg.time_frequencies)
        self.image_in = nn.Linear(embed_dim, cfg.width)
        self.query_M = nn.Parameter(0.02 * torch.randn(cfg.width))
        self.positions_SM = nn.Parameter(0.02 * torch.randn(cfg.text_positions + self.SPECIAL, cfg.width))
        null_W, self.null_text_D = null_caption(
            cfg.null_text, embed_dim=embed_dim, text_width=text_width, null_tokens=null_tokens
        )
        no_tokens = nn.Buffer(torch.empty(0, text_width), persistent=False)
        self.null_encoding_W = null_W if cfg.text_tokens else no_tokens
        self.blocks = nn.ModuleList(
            TransformerBlock(cfg.width, heads=cfg.heads, mlp_ratio=cfg.mlp_ratio, qk_norm=cfg.qk_norm)
            for _ in range(cfg.depth)
        )
        self.norm = LayerNorm(cfg.width)
        self.image_out = nn.Linear(cfg.width, embed_dim)

    def forward(
        self,
        noised_embed: Tensor,
        *,
        t: Tensor,
        text_embed: Tensor,
        text_encodings: Tensor,
        text_mask: Tensor,
        drop_text: Tensor,
    ) -> Tensor:
        """Predicted clean image embedding, fp32 [B, D].

        noised_embed, text_embed [B, D]; t [B] in [0, 1]; text_encodings [B, L, W]; text_mask bool [B, L],
        True at tokens that are not padding; drop_text bool [B], True where the null caption replaces the
        caption. The noised embedding is never dropped.
        """
        if self.encodings_in is None:
            text_encodings, text_mask = text_encodings[:, :0], text_mask[:, :0]
        caption = drop_captions(
            Caption(text_embed, text_encodings, text_mask),
            drop_text,
            null_encodings=self.null_encoding_W,
            null_embed=self.null_text_D,
        )
        special = torch.stack(
            [
                self.text_in(caption.embed),
                self.time_in(t),
                self.image_in(noised_embed),
                self.query_M.expand(len(t), -1),
            ],
            dim=1,
        )
        encodings = special[:, :0] if self.encodings_in is None else self.encodings_in(caption.encodings)
        if self.cfg.text_positions:
            encodings = encodings + self.positions_SM[: encodings.shape[1]]
        x_BSM = torch.cat([encodings, special + self.positions_SM[-self.SPECIAL :]], dim=1)
        mask = causal_mask(caption.text_mask, extra=self.SPECIAL)
        for block in self.blocks:
            x_BSM = block(x_BSM, mask=mask)
        return self.image_out(self.norm(x_BSM[:, -1])).float()


Prior = DiffusionPrior | AutoregressivePrior

PriorConfig = Annotated[
    Annotated[DiffusionPriorConfig, Tag("diffusion")] | Annotated[AutoregressivePriorConfig, Tag("autoregressive")],
    by_kind("diffusion"),
]


def build_prior(cfg: DiffusionPriorConfig | AutoregressivePriorConfig, **sizes: int) -> Prior:
    """The prior of a config; `sizes` are those of its class: embed_dim, text_width, null_tokens, components."""
    return DiffusionPrior(cfg, **sizes) if cfg.kind == "diffusion" else AutoregressivePrior(cfg, **sizes)
