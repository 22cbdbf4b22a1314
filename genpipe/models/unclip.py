"""The decoder of unCLIP (Ramesh et al. 2022, sec. 2.1) on latents: image embedding and caption to image.

Shapes: B batch, C channels, H and W latent grid, D embedding width, L text tokens, W text width.
"""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from genpipe.config import Config
from genpipe.models.dit import DiT, DiTConfig


class DecoderConfig(Config):
    """The diffusion transformer and the number of context tokens made of the image embedding."""

    dit: DiTConfig = DiTConfig()
    embed_tokens: PositiveInt = 4


class Decoder(nn.Module):
    """DiT that adds the image embedding to the time embedding and attends to it as tokens, then to the text.

    The image embedding is in the units of the prior's diffusion, about unit variance per dimension.
    """

    def __init__(self, cfg: DecoderConfig, *, latent_channels: int, embed_dim: int, text_width: int) -> None:
        super().__init__()
        self.embed_tokens = cfg.embed_tokens
        self.tokens_in = nn.Linear(embed_dim, cfg.embed_tokens * text_width)
        self.null_image_D = nn.Parameter(0.02 * torch.randn(embed_dim))
        self.null_encoding_W = nn.Parameter(0.02 * torch.randn(text_width))
        self.dit = DiT(
            cfg.dit,
            in_channels=latent_channels,
            out_channels=latent_channels,
            context_dim=text_width,
            vector_dim=embed_dim,
        )

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        *,
        image_embed: Tensor,
        text_encodings: Tensor,
        text_mask: Tensor,
        drop_image: Tensor,
        drop_text: Tensor,
    ) -> Tensor:
        """Prediction [B, C, H, W] in fp32 at noised latents x [B, C, H, W] and times t [B] in [0, 1].

        image_embed [B, D]; text_encodings [B, L, W]; text_mask bool [B, L], True at tokens that are not
        padding. drop_image, drop_text: bool [B], independent; True where a learned null takes the condition's
        place. The nulls enter by torch.where, so every parameter has a gradient in every step (DDP needs it).
        """
        image = torch.where(drop_image[:, None], self.null_image_D, image_embed)
        image_tokens = self.tokens_in(image).unflatten(1, (self.embed_tokens, -1))
        text = torch.where(drop_text[:, None, None], self.null_encoding_W, text_encodings)
        # A dropped caption is one null token, whatever its length was.
        first_L = torch.arange(text.shape[1], device=text.device) == 0
        text_mask = torch.where(drop_text[:, None], first_L, text_mask)
        image_mask = text_mask.new_ones(len(text_mask), self.embed_tokens)
        return self.dit(
            x_BCHW,
            t_B,
            context=torch.cat([image_tokens, text.to(image_tokens.dtype)], dim=1),
            context_mask=torch.cat([image_mask, text_mask], dim=1),
            vector=image,
        )
