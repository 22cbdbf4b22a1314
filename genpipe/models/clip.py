"""CLIP (Radford et al. 2021): a vision transformer and a text transformer trained to agree.

Fresh weights are drawn as in OpenAI's model.py (github.com/openai/CLIP), which open_clip follows.

Shapes: B batch, L text tokens, N image patches, K patches that are kept, D embedding width, W tower width.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from genpipe.config import Config
from genpipe.models.contrastive import (
    MAX_LOGIT_SCALE,
    LossConfig,
    SoftmaxLoss,
    sigmoid_loss,
    sigmoid_loss_in_chunks,
    softmax_loss,
    softmax_loss_in_chunks,
)
from genpipe.models.layers import Activation, LayerNorm, TransformerBlock, TransformerConfig, patchify

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""By channel, of images in [0, 1]: OpenAI's models and most others of their kind see standardized images."""


class TowerConfig(TransformerConfig):
    """Size and details of one tower's transformer. OpenAI's: no `qk_norm`, `activation: quick_gelu`."""

    width: PositiveInt = 192
    depth: PositiveInt = 3
    qk_norm: bool = Field(True, description="layer-norm queries and keys, against divergence in bf16")
    activation: Activation = Field("gelu", description="of the MLPs")
    norm_eps: PositiveFloat = Field(1e-5, description="of the layer norms")


class CLIPConfig(Config):
    """Sizes of both towers and of the space that they share, and what differs between published models."""

    embed_dim: PositiveInt = Field(128, description="dimensions of image and text embeddings")
    image_size: PositiveInt = Field(64, description="side of the images, in pixels")
    patch_size: PositiveInt = Field(16, description="side of a patch, in pixels")
    image: TowerConfig = Field(TowerConfig(), description="transformer of the image tower")
    text: TowerConfig = Field(TowerConfig(width=128, depth=2), description="transformer of the text tower")
    pixels: Literal["signed", "openai"] = Field(
        "signed", description="signed: as given, in [-1, 1]; openai: standardized as OpenAI's"
    )
    patch_bias: bool = Field(True, description="bias of the patches' projection")
    image_pre_norm: bool = Field(False, description="layer norm before the image tower's blocks")
    image_pooling: Literal["mean", "class_token"] = Field(
        "mean", description="an image's feature: the mean of its tokens, or a class token"
    )
    causal_text: bool = Field(True, description="tokens attend to those before them only")
    mask_padding: bool = Field(True, description="no token attends to the padding")
    loss: LossConfig = Field(SoftmaxLoss(), description="what makes embeddings of pairs agree")

    @model_validator(mode="after")
    def _patches_fill_the_image(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}; change one"
            )
        return self

    @model_validator(mode="after")
    def _padding_is_not_read(self) -> Self:
        if not (self.mask_padding or self.causal_text):
            raise ValueError("mask_padding is off and causal_text too, so that the padding after a caption would "
                             "change its embedding; turn one on")  # fmt: skip
        return self

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


class ImageTower(nn.Module):
    """ViT with learned positions; the mean of the final tokens, or the class token, is the image's feature."""

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, cfg: CLIPConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width, eps = cfg.image.width, cfg.image.norm_eps
        with_class = cfg.image_pooling == "class_token"
        self.patches = nn.Linear(3 * cfg.patch_size**2, width, bias=cfg.patch_bias)
        self.positions_1NW = nn.Parameter(width**-0.5 * torch.randn(1, with_class + cfg.patches, width))
        self.class_token_W = nn.Parameter(width**-0.5 * torch.randn(width)) if with_class else None
        self.pre_norm = LayerNorm(width, eps=eps) if cfg.image_pre_norm else nn.Identity()
        self.blocks = image_transformer(cfg.image)
        self.norm = LayerNorm(width, eps=eps)
        self.projection = nn.Linear(width, cfg.embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=width**-0.5)
        if cfg.pixels == "openai":  # of images in [-1, 1]
            self.register_buffer("mean_C11", 2 * torch.tensor(OPENAI_MEAN).view(3, 1, 1) - 1, persistent=False)
            self.register_buffer("std_C11", 2 * torch.tensor(OPENAI_STD).view(3, 1, 1), persistent=False)

    def forward(self, images_BCHW: Tensor, *, patches_BK: Tensor | None = None) -> Tensor:
        """Images [B, 3, S, S] -> features [B, D]; of `patches_BK` alone if given, int64 in row-major order."""
        size = self.cfg.image_size
        if images_BCHW.shape[-2:] != (size, size):
            raise ValueError(f"CLIP was built for {size}x{size} images, got {tuple(images_BCHW.shape[-2:])}")
        if self.cfg.pixels == "openai":
            images_BCHW = (images_BCHW - self.mean_C11) / self.std_C11
        pixels_BNP = patchify(images_BCHW, self.cfg.patch_size)
        positions = self.positions_1NW[:, -self.cfg.patches :]
        if patches_BK is not None:
            pixels_BNP = pixels_BNP.take_along_dim(patches_BK[..., None], dim=1)
            positions = positions[0, patches_BK]
        x_BNW = self.patches(pixels_BNP) + positions
        if self.class_token_W is not None:
            first_W = self.class_token_W + self.positions_1NW[0, 0]
            x_BNW = torch.cat([first_W.expand(len(x_BNW), 1, -1), x_BNW], dim=1)
        x_BNW = self.pre_norm(x_BNW)
        for block in self.blocks:
            x_BNW = block(x_BNW)
        if self.class_token_W is not None:
            return self.projection(self.norm(x_BNW[:, 0]))
        return self.projection(self.norm(x_BNW).mean(1))


class TextTower(nn.Module):
    """Transformer over tokens; the final state of a caption's last token (end of text) is its feature.

    Padding is masked, or not (`mask_padding`): behind a causal mask it changes only its own states.
    """

    def __init__(self, cfg: CLIPConfig, *, vocab_size: int, context_length: int, eot_id: int) -> None:
        super().__init__()
        self.causal = cfg.causal_text
        self.mask_padding = cfg.mask_padding
        self.context_length = context_length
        self.eot_id = eot_id
        width = cfg.text.width
        self.tokens = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.positions_LW = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.blocks = text_transformer(cfg.text)
        self.norm = LayerNorm(width, eps=cfg.text.norm_eps)
        self.projection = nn.Linear(width, cfg.embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] -> feature [B, D] and final states [B, L, W]."""
        length = tokens_BL.shape[1]
        if length > self.context_length:
            raise ValueError(f"{length} tokens exceed the text tower's context_length {self.context_length}")
        text_mask_BL = text_mask(tokens_BL, eot_id=self.eot_id)
        mask = text_mask_BL[:, None, None, :] if self.mask_padding else None
        if self.causal:
            causal = torch.ones(length, length, dtype=torch.bool, device=tokens_BL.device).tril()
            mask = causal if mask is None else mask & causal
        x_BLW = self.tokens(tokens_BL) + self.positions_LW[:length]
        for block in self.blocks:
            x_BLW = block(x_BLW, mask=mask)
        states_BLW = self.norm(x_BLW)
        last_B = text_mask_BL.sum(1) - 1
        pooled = states_BLW[torch.arange(len(tokens_BL), device=tokens_BL.device), last_B]
        return self.projection(pooled), states_BLW


class CLIP(nn.Module):
    """Image and text towers with a learned temperature.

    `logit_scale` is the logarithm of the factor on cosine similarities, fp32, starting at -ln(temperature); call
    `clamp_logit_scale_` after each optimizer step and keep weight decay off it. `eot_id` is the tokenizer's id of
    the end of text. Only the sigmoid loss has a `logit_bias`.
    """

    def __init__(self, cfg: CLIPConfig, *, vocab_size: int, context_length: int, eot_id: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.image_tower = ImageTower(cfg)
        self.text_tower = TextTower(cfg, vocab_size=vocab_size, context_length=context_length, eot_id=eot_id)
        scale = math.log(1 / cfg.loss.temperature)
        self.logit_scale = nn.Parameter(torch.tensor(scale, dtype=torch.float32))
        bias = torch.tensor(cfg.loss.bias, dtype=torch.float32) if cfg.loss.kind == "sigmoid" else None
        self.logit_bias = None if bias is None else nn.Parameter(bias)

    def encode_image(self, images_BCHW: Tensor, *, patches_BK: Tensor | None = None) -> Tensor:
        """Images in [-1, 1] [B, 3, S, S] -> image_embed, unit vectors in fp32 [B, D].

        `patches_BK`, int64, are the patches that are looked at (`keep_patches`); default: all.
        """
        return F.normalize(self.image_tower(images_BCHW, patches_BK=patches_BK).float(), dim=-1)

    def encode_text(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, L], anything after the end of text -> fp32 unit vectors [B, D]; text_encodings [B, L, W]."""
        feature, states_BLW = self.text_tower(tokens_BL)
        return F.normalize(feature.float(), dim=-1), states_BLW

    def forward(self, images_BCHW: Tensor, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """(image_embed, text_embed), each [B, D]."""
        return self.encode_image(images_BCHW), self.encode_text(tokens_BL)[0]

    def text_mask(self, tokens_BL: Tensor) -> Tensor:
        """bool [B, L], True at tokens that are not padding."""
        return text_mask(tokens_BL, eot_id=self.text_tower.eot_id)

    def loss(self, image_embed: Tensor, text_embed: Tensor, *, gather: bool = True) -> Tensor:
        """The configured loss of pairs of embeddings [B, D] over all ranks (`gather`) or this one, fp32 scalar."""
        if self.logit_bias is None:
            return softmax_loss(image_embed, text_embed, logit_scale=self.logit_scale, gather=gather)
        scale, bias = self.logit_scale, self.logit_bias
        return sigmoid_loss(image_embed, text_embed, logit_scale=scale, logit_bias=bias, gather=gather)

    def heldout_loss(self, image_embed: Tensor, text_embed: Tensor, *, size: int) -> Tensor:
        """The configured loss of pairs of embeddings [N, D], without gradients; `size` x N logits at a time, fp32."""
        if self.logit_bias is None:
            return softmax_loss_in_chunks(image_embed, text_embed, logit_scale=self.logit_scale, size=size)
        scale, bias = self.logit_scale, self.logit_bias
        return sigmoid_loss_in_chunks(image_embed, text_embed, logit_scale=scale, logit_bias=bias, size=size)

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Keep the factor exp(logit_scale) in [1, 100], as in the paper (sec. 2.5)."""
        self.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)


def image_transformer(cfg: TowerConfig) -> nn.ModuleList:
    """The blocks of an image tower: as torch makes linear layers and its MultiheadAttention, whose biases are 0."""
    blocks = _blocks(cfg)
    for block in blocks:
        nn.init.xavier_uniform_(block.attention.qkv.weight)
        _zero_biases(block)
    return nn.ModuleList(blocks)


def text_transformer(cfg: TowerConfig) -> nn.ModuleList:
    """The blocks of a text tower: what they add to the residual stream is the smaller, the more there are."""
    blocks, width = _blocks(cfg), cfg.width
    for block in blocks:
        nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
        nn.init.normal_(block.mlp.up.weight, std=(2 * width) ** -0.5)
        for layer in (block.attention.out, block.mlp.down):
            nn.init.normal_(layer.weight, std=(2 * width * cfg.depth) ** -0.5)
        _zero_biases(block)
    return nn.ModuleList(blocks)


def _blocks(cfg: TowerConfig) -> list[TransformerBlock]:
    return [
        TransformerBlock(
            cfg.width,
            heads=cfg.heads,
            mlp_ratio=cfg.mlp_ratio,
            qk_norm=cfg.qk_norm,
            activation=cfg.activation,
            norm_eps=cfg.norm_eps,
        )
        for _ in range(cfg.depth)
    ]


def _zero_biases(block: TransformerBlock) -> None:
    for layer in (block.attention.qkv, block.attention.out):
        nn.init.zeros_(layer.bias)


def text_mask(tokens_BL: Tensor, *, eot_id: int) -> Tensor:
    """bool [B, L], True up to and including the first end of text; what follows is padding, whatever its id.

    Captions are [start, tokens ..., end of text, padding ...]. genpipe pads with a token of its own, OpenAI with 0
    (which is "!"), transformers with the end of text again.
    """
    ends_BL = (tokens_BL == eot_id).long()
    return ends_BL.cumsum(1) - ends_BL == 0


def keep_patches(images_BCHW: Tensor, *, patches: int, drop: float, generator: torch.Generator) -> Tensor:
    """Which of `patches` each image keeps when a share `drop` is dropped at random, int64 [B, K].

    FLIP (Li et al. 2023, sec. 3): training on a part of each image costs less, so that more images are seen.
    """
    draws_BN = torch.rand(len(images_BCHW), patches, generator=generator, device=images_BCHW.device)
    return draws_BN.argsort(1)[:, : max(1, round(patches * (1 - drop)))]
