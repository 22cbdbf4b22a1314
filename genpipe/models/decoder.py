"""The decoder, in latents or pixels: from any of image embedding, caption and class label, or nothing, to an image.

With an image embedding and a caption it is unCLIP's (Ramesh et al. 2022, sec. 2.1), with a caption alone latent
diffusion's (Rombach et al. 2022), with a class label ADM's (Dhariwal & Nichol 2021) or DiT's (Peebles & Xie 2023).

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
from genpipe.models.layers import LayerNorm, TransformerBlock, TransformerConfig
from genpipe.models.prior_conditioning import NullText
from genpipe.models.unet import UNet, UNetConfig

DenoiserConfig = Annotated[Annotated[DiTConfig, Tag("dit")] | Annotated[UNetConfig, Tag("unet")], by_kind("dit")]


class TextTransformerConfig(TransformerConfig):
    """A transformer of the decoder's own over the text encodings: GLIDE's (Nichol et al. 2021, sec. 4.1) by default.

    LDM's (Rombach et al. 2022, sec. E.2.1 and table 17) has 8 heads of 64 whatever its width, no biases on queries,
    keys and values, and no pooled state.
    """

    head_width: PositiveInt | None = Field(None, description="of each head; none: they share the width")
    qk_norm: bool = Field(True, description="layer-norm queries and keys, against divergence in bf16")
    qkv_bias: bool = Field(True, description="biases on queries, keys and values")
    pooled: bool = Field(True, description="add the state of the last token to the time embedding")

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not divisible by heads {self.heads}; change one, or set head_width"
            )
        return self


class DecoderConfig(Config):
    """The denoiser, and how it is conditioned on image and caption.

    Latent diffusion's text-to-image model (Rombach et al. 2022) has image_embed false and null_text encoder.
    """

    denoiser: DenoiserConfig = Field(DiTConfig(), description="the network")
    image_embed: bool = Field(True, description="condition on the image embedding where there is one")
    embed_tokens: PositiveInt = Field(4, description="context tokens made of the image embedding")
    text_transformer: TextTransformerConfig | None = Field(None, description="of its own, over the text encodings")
    null_text: NullText = Field("learned", description="what replaces a dropped caption")


class Decoder(nn.Module):
    """Denoiser of images or latents, conditioned on any of an image embedding, a caption and a class label.

    The image embedding is added to the time embedding and attended to as tokens, before the caption's; the label is
    added to the time embedding. The image embedding is in the units of the prior's diffusion, about unit variance per
    dimension. What replaces a dropped condition are the parameter `null_image_D` [D], the last row of the denoiser's
    label table, and for a caption either a learned token `null_encoding_W` [W] or a buffer of that name with the
    encoder's [N, W], zeros until filled in.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        *,
        latent_channels: int,
        embed_dim: int = 0,
        text_width: int = 0,
        classes: int = 0,
        out_channels: int | None = None,
        null_tokens: int = 1,
    ) -> None:
        """Build the decoder for the conditions that there are: `embed_dim` D, `text_width` W and `classes`, 0 for none.

        `out_channels` is more than the latent's where the diffusion learns its variance; N is `null_tokens`. Raises
        ValueError where `cfg` asks for what the conditions do not give.
        """
        super().__init__()
        self.cfg, self.text_width, self.classes = cfg, text_width, classes
        self.embed_dim = embed_dim if cfg.image_embed else 0
        check_conditions(cfg, embed_dim=embed_dim, text_width=text_width)
        width = text_width or self.embed_dim
        if cfg.text_transformer is not None:
            width = cfg.text_transformer.width
        if self.embed_dim:
            self.tokens_in = nn.Linear(embed_dim, cfg.embed_tokens * width)
            self.null_image_D = nn.Parameter(0.02 * torch.randn(embed_dim))
        if text_width:
            learned = cfg.null_text == "learned"
            self.null_encoding_W: nn.Parameter | nn.Buffer = (
                nn.Parameter(0.02 * torch.randn(text_width))
                if learned
                else nn.Buffer(torch.zeros(null_tokens, text_width))
            )
        self.text_transformer = None
        if cfg.text_transformer is not None:
            self.text_transformer = TextTransformer(cfg.text_transformer, text_width=text_width)
        pooled = cfg.text_transformer is not None and cfg.text_transformer.pooled
        vector_dim = self.embed_dim + (width if pooled else 0)
        self.denoiser = build_denoiser(
            cfg.denoiser,
            in_channels=latent_channels,
            out_channels=out_channels or latent_channels,
            context_dim=width or None,
            vector_dim=vector_dim or None,
            classes=classes,
        )

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        *,
        image_embed: Tensor | None = None,
        text_encodings: Tensor | None = None,
        text_mask: Tensor | None = None,
        labels: Tensor | None = None,
        drop_image: Tensor | None = None,
        drop_text: Tensor | None = None,
        drop_label: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Prediction [B, out_channels, H, W] in fp32 at noised latents x [B, C, H, W] and times t [B] in [0, 1].

        image_embed [B, D]; text_encodings [B, L, W]; text_mask bool [B, L], True at tokens that are not padding;
        labels int64 [B], below `classes`. drop_image, drop_text, drop_label: bool [B], independent; True where a null
        takes the condition's place. All that belongs to a condition that the decoder was built without may be None,
        and is not read. In training, `generator` is that of the network's dropout. Learned nulls enter by torch.where,
        so every parameter has a gradient in every step (DDP needs it).
        """
        context = context_mask = None
        vectors = []
        if self.text_width:
            context, context_mask = self._text(text_encodings, text_mask, drop_text=drop_text)
            if self.text_transformer is not None:
                context, last = self.text_transformer(context, context_mask)
                if self.text_transformer.cfg.pooled:
                    vectors.append(last)
        if self.embed_dim:
            assert image_embed is not None and drop_image is not None, "built with an image embedding"
            image = torch.where(drop_image[:, None], self.null_image_D, image_embed)
            tokens = self.tokens_in(image).unflatten(1, (self.cfg.embed_tokens, -1))
            always = drop_image.new_ones(len(drop_image), self.cfg.embed_tokens)
            context = tokens if context is None else torch.cat([tokens, context.to(tokens.dtype)], dim=1)
            context_mask = always if context_mask is None else torch.cat([always, context_mask], dim=1)
            vectors.insert(0, image)
        if self.classes:
            assert labels is not None and drop_label is not None, "built with class labels"
            labels = torch.where(drop_label, self.classes, labels)
        return self.denoiser(
            x_BCHW,
            t_B,
            context=context,
            context_mask=context_mask,
            vector=torch.cat(vectors, dim=1) if vectors else None,
            labels=labels if self.classes else None,
            generator=generator,
        )

    def _text(
        self, encodings: Tensor | None, text_mask: Tensor | None, *, drop_text: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Encodings and mask with the null text in place of dropped captions, which have at least as many tokens."""
        assert encodings is not None and text_mask is not None and drop_text is not None, "built with text"
        length = encodings.shape[1]
        null_NW = torch.atleast_2d(self.null_encoding_W)
        null_LW = F.pad(null_NW, (0, 0, 0, length - len(null_NW)))
        null_mask_L = torch.arange(length, device=text_mask.device) < len(null_NW)
        return (
            torch.where(drop_text[:, None, None], null_LW, encodings),
            torch.where(drop_text[:, None], null_mask_L, text_mask),
        )


def check_conditions(cfg: DecoderConfig, *, embed_dim: int, text_width: int) -> None:
    """Raise ValueError where `cfg` asks for conditions that are not there (a width of 0), or would not see them."""
    unet = cfg.denoiser if isinstance(cfg.denoiser, UNetConfig) else None
    attended = text_width or (embed_dim and cfg.image_embed)
    if cfg.text_transformer is not None and not text_width:
        raise ValueError("text_transformer reads text encodings, and there is no text; remove text_transformer")
    if unet and attended and not unet.attention_at:
        raise ValueError("denoiser.attention_at is empty, so that nothing attends to the conditions; name a level")
    if unet and not attended and unet.attention_at and unet.attention == "transformer":
        raise ValueError(
            "denoiser.attention is transformer, which attends to text or an image embedding, and there is neither; "
            "set it to plain"
        )


class TextTransformer(nn.Module):
    """Transformer over the text encodings, every token seeing the whole caption."""

    def __init__(self, cfg: TextTransformerConfig, *, text_width: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.encodings_in = nn.Linear(text_width, cfg.width)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                cfg.width,
                heads=cfg.heads,
                head_width=cfg.head_width,
                mlp_ratio=cfg.mlp_ratio,
                qk_norm=cfg.qk_norm,
                qkv_bias=cfg.qkv_bias,
            )
            for _ in range(cfg.depth)
        )
        self.norm = LayerNorm(cfg.width)

    def forward(self, encodings_BLW: Tensor, text_mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, L, width] of the tokens, and that of the last that is not padding [B, width]."""
        x = self.encodings_in(encodings_BLW)
        for block in self.blocks:
            x = block(x, mask=text_mask_BL[:, None, None])
        states = self.norm(x)
        return states, states[torch.arange(len(states), device=states.device), text_mask_BL.sum(1) - 1]


def build_denoiser(
    cfg: DiTConfig | UNetConfig,
    *,
    in_channels: int,
    out_channels: int,
    context_dim: int | None,
    vector_dim: int | None,
    classes: int,
) -> DiT | UNet:
    """The network of a kind, called as model(x, t, *, context, context_mask, vector, labels, generator)."""
    build: Callable[..., DiT | UNet] = UNet if isinstance(cfg, UNetConfig) else DiT
    return build(
        cfg,
        in_channels=in_channels,
        out_channels=out_channels,
        context_dim=context_dim,
        vector_dim=vector_dim,
        classes=classes,
    )
