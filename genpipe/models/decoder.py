"""The decoder of unCLIP (Ramesh et al. 2022, sec. 2.1), in latents or pixels: image embedding and caption to image.

Shapes: B batch, C channels, H and W grid, D embedding width, L text tokens, W text width, N tokens of the null text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, Tag, model_validator
from torch import Tensor, nn

from genpipe.config import Config, by_kind
from genpipe.models.dit import DiT, DiTConfig
from genpipe.models.layers import TransformerBlock, TransformerConfig
from genpipe.models.prior_conditioning import NullText
from genpipe.models.unet import UNet, UNetConfig

DenoiserConfig = Annotated[Annotated[DiTConfig, Tag("dit")] | Annotated[UNetConfig, Tag("unet")], by_kind("dit")]


class DecoderConfig(Config):
    """The denoiser, and how it is told of image and caption.

    Latent diffusion's text-to-image model (Rombach et al. 2022) has image_embed false and null_text encoder, and the
    decoder of unCLIP a text_transformer (GLIDE's: Nichol et al. 2021, sec. 4.1).
    """

    denoiser: DenoiserConfig = DiTConfig()
    image_embed: bool = Field(True, description="condition on the image embedding; false leaves the caption alone")
    embed_tokens: PositiveInt = Field(4, description="context tokens made of the image embedding")
    text_transformer: TransformerConfig | None = Field(None, description="of its own, over the text encodings")
    null_text: NullText = Field("learned", description="what a dropped caption gives way to")

    @model_validator(mode="after")
    def _attends(self) -> Self:
        if isinstance(self.denoiser, UNetConfig) and not self.denoiser.attention_at:
            raise ValueError("denoiser.attention_at is empty, so that nothing would see the caption; name a level")
        return self


class Decoder(nn.Module):
    """Denoiser that adds the image embedding to the time embedding and attends to it as tokens, then to the text.

    The image embedding is in the units of the prior's diffusion, about unit variance per dimension. The null text is a
    learned token `null_encoding_W` [W], or a buffer of that name with the encoder's [N, W], zeros until filled in.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        *,
        latent_channels: int,
        embed_dim: int,
        text_width: int,
        out_channels: int | None = None,
        null_tokens: int = 1,
    ) -> None:
        """`out_channels` is more than the latent's where the diffusion learns its variance; N is `null_tokens`."""
        super().__init__()
        self.cfg = cfg
        width = text_width if cfg.text_transformer is None else cfg.text_transformer.width
        if cfg.image_embed:
            self.tokens_in = nn.Linear(embed_dim, cfg.embed_tokens * width)
            self.null_image_D = nn.Parameter(0.02 * torch.randn(embed_dim))
        learned = cfg.null_text == "learned"
        self.null_encoding_W: nn.Parameter | nn.Buffer = (
            nn.Parameter(0.02 * torch.randn(text_width)) if learned else nn.Buffer(torch.zeros(null_tokens, text_width))
        )
        self.text_transformer = None
        if cfg.text_transformer is not None:
            self.text_transformer = TextTransformer(cfg.text_transformer, text_width=text_width)
        vector_dim = (embed_dim if cfg.image_embed else 0) + (0 if self.text_transformer is None else width)
        self.denoiser = build_denoiser(
            cfg.denoiser,
            in_channels=latent_channels,
            out_channels=out_channels or latent_channels,
            context_dim=width,
            vector_dim=vector_dim or None,
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
        """Prediction [B, out_channels, H, W] in fp32 at noised latents x [B, C, H, W] and times t [B] in [0, 1].

        image_embed [B, D]; text_encodings [B, L, W]; text_mask bool [B, L], True at tokens that are not
        padding. drop_image, drop_text: bool [B], independent; True where a null takes the condition's place. Learned
        ones enter by torch.where, so every parameter has a gradient in every step (DDP needs it).
        """
        text, mask = self._text(text_encodings, text_mask, drop_text=drop_text)
        vectors = []
        if self.text_transformer is not None:
            text, last = self.text_transformer(text, mask)
            vectors.append(last)
        if self.cfg.image_embed:
            image = torch.where(drop_image[:, None], self.null_image_D, image_embed)
            tokens = self.tokens_in(image).unflatten(1, (self.cfg.embed_tokens, -1))
            text = torch.cat([tokens, text.to(tokens.dtype)], dim=1)
            mask = torch.cat([mask.new_ones(len(mask), self.cfg.embed_tokens), mask], dim=1)
            vectors.insert(0, image)
        vector = torch.cat(vectors, dim=1) if vectors else None
        return self.denoiser(x_BCHW, t_B, context=text, context_mask=mask, vector=vector)

    def _text(self, encodings: Tensor, mask: Tensor, *, drop_text: Tensor) -> tuple[Tensor, Tensor]:
        """Encodings and mask with the null text in place of dropped captions, which have at least as many tokens."""
        length = encodings.shape[1]
        null_NW = torch.atleast_2d(self.null_encoding_W)
        null_LW = F.pad(null_NW, (0, 0, 0, length - len(null_NW)))
        null_mask_L = torch.arange(length, device=mask.device) < len(null_NW)
        return (
            torch.where(drop_text[:, None, None], null_LW, encodings),
            torch.where(drop_text[:, None], null_mask_L, mask),
        )


class TextTransformer(nn.Module):
    """Transformer over the text encodings, every token seeing the whole caption."""

    def __init__(self, cfg: TransformerConfig, *, text_width: int) -> None:
        super().__init__()
        self.encodings_in = nn.Linear(text_width, cfg.width)
        self.blocks = nn.ModuleList(
            TransformerBlock(cfg.width, heads=cfg.heads, mlp_ratio=cfg.mlp_ratio) for _ in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(cfg.width)

    def forward(self, encodings_BLW: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, L, width] of the tokens, and that of the last that is not padding [B, width]."""
        x = self.encodings_in(encodings_BLW)
        for block in self.blocks:
            x = block(x, mask=mask_BL[:, None, None])
        states = self.norm(x)
        return states, states[torch.arange(len(states), device=states.device), mask_BL.sum(1) - 1]


def build_denoiser(
    cfg: DiTConfig | UNetConfig, *, in_channels: int, out_channels: int, context_dim: int, vector_dim: int | None
) -> DiT | UNet:
    """The network of a kind; all have one signature: model(x, t, *, context, context_mask, vector)."""
    build: Callable[..., DiT | UNet] = UNet if isinstance(cfg, UNetConfig) else DiT
    return build(
        cfg, in_channels=in_channels, out_channels=out_channels, context_dim=context_dim, vector_dim=vector_dim
    )
