"""The diffusion prior of unCLIP (Ramesh et al. 2022, sec. 2.2): from a caption to an image embedding.

Shapes: B batch, L text tokens, D embedding width, W text width, M model width.
"""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from genpipe.models.layers import LevelEmbedding, TransformerBlock, TransformerConfig


class PriorConfig(TransformerConfig):
    """Size of the prior's transformer."""

    width: PositiveInt = 192
    depth: PositiveInt = 4


class Prior(nn.Module):
    """Causal transformer over [text encodings, text embed, time, noised image embed, query]; predicts x0.

    Embeddings are in the units of the diffusion, about unit variance per dimension: whoever calls scales
    them.
    """

    SPECIAL = 4  # text embed, time, noised image embed, query

    def __init__(self, cfg: PriorConfig, *, embed_dim: int, text_width: int) -> None:
        super().__init__()
        self.encodings_in = nn.Linear(text_width, cfg.width)
        self.text_in = nn.Linear(embed_dim, cfg.width)
        self.time_in = LevelEmbedding(cfg.width)
        self.image_in = nn.Linear(embed_dim, cfg.width)
        self.query_M = nn.Parameter(0.02 * torch.randn(cfg.width))
        # The encodings carry their positions from the text tower; only the four that follow need one.
        self.positions_SM = nn.Parameter(0.02 * torch.randn(self.SPECIAL, cfg.width))
        self.null_encoding_W = nn.Parameter(0.02 * torch.randn(text_width))
        self.null_text_D = nn.Parameter(0.02 * torch.randn(embed_dim))
        self.blocks = nn.ModuleList(
            TransformerBlock(cfg.width, heads=cfg.heads, mlp_ratio=cfg.mlp_ratio) for _ in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(cfg.width)
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
        True at tokens that are not padding; drop_text bool [B], True where the caption gives way to the
        learned null caption. The noised embedding is never dropped.
        """
        length = text_encodings.shape[1]
        encodings = torch.where(drop_text[:, None, None], self.null_encoding_W, text_encodings)
        text = torch.where(drop_text[:, None], self.null_text_D, text_embed)
        special = torch.stack(
            [
                self.text_in(text),
                self.time_in(t),
                self.image_in(noised_embed),
                self.query_M.expand(len(t), -1),
            ],
            dim=1,
        )
        x_BLM = torch.cat([self.encodings_in(encodings), special + self.positions_SM], dim=1)
        mask = prior_mask(text_mask, drop_text=drop_text, length=length, special=self.SPECIAL)
        for block in self.blocks:
            x_BLM = block(x_BLM, mask=mask)
        return self.image_out(self.norm(x_BLM[:, -1])).float()


def prior_mask(text_mask: Tensor, *, drop_text: Tensor, length: int, special: int) -> Tensor:
    """Causal mask without padding, bool [B, 1, S, S], S = length + special; a dropped caption: one token."""
    total = length + special
    first_L = torch.arange(length, device=text_mask.device) == 0
    text_mask = torch.where(drop_text[:, None], first_L, text_mask)
    real = torch.cat([text_mask, text_mask.new_ones(len(text_mask), special)], dim=1)
    causal = torch.ones(total, total, dtype=torch.bool, device=text_mask.device).tril()
    # A padding token sees itself, so that no row of the softmax is empty.
    itself = torch.eye(total, dtype=torch.bool, device=text_mask.device)
    return ((causal & real[:, None, :]) | itself)[:, None]
