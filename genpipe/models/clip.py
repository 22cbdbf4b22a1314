"""CLIP (Radford et al. 2021): a vision transformer and a text transformer trained to agree.

Shapes: B batch, L text tokens, N image patches, D embedding width, W tower width.
"""

from __future__ import annotations

import math
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from genpipe.config import Config
from genpipe.models.layers import TransformerBlock, TransformerConfig, patchify

PAD_ID = 0
"""Token id of padding. Captions are [tokens ..., end of text, padding ...]."""

MAX_LOGIT_SCALE = math.log(100.0)


class TowerConfig(TransformerConfig):
    """Size of one tower's transformer."""

    width: PositiveInt = 192
    depth: PositiveInt = 3


class CLIPConfig(Config):
    """Sizes of both towers and of the space that they share."""

    embed_dim: PositiveInt = 128
    image_size: PositiveInt = 64
    patch_size: PositiveInt = 16
    image: TowerConfig = TowerConfig()
    text: TowerConfig = TowerConfig(width=128, depth=2)
    causal_text: bool = True

    @model_validator(mode="after")
    def _patches_fill_the_image(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}; change one"
            )
        return self


class ImageTower(nn.Module):
    """ViT with learned positions; the mean of the final tokens is the image's feature."""

    def __init__(self, cfg: CLIPConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.image.width
        self.patches = nn.Linear(3 * cfg.patch_size**2, width)
        self.positions_1NW = nn.Parameter(0.02 * torch.randn(1, (cfg.image_size // cfg.patch_size) ** 2, width))
        self.blocks = transformer(cfg.image)
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, cfg.embed_dim, bias=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        size = self.cfg.image_size
        if images_BCHW.shape[-2:] != (size, size):
            raise ValueError(f"CLIP was built for {size}x{size} images, got {tuple(images_BCHW.shape[-2:])}")
        x_BNW = self.patches(patchify(images_BCHW, self.cfg.patch_size)) + self.positions_1NW
        for block in self.blocks:
            x_BNW = block(x_BNW)
        return self.projection(self.norm(x_BNW).mean(1))


class TextTower(nn.Module):
    """Transformer over tokens, padding masked; the last token's (end of text) final state is the feature."""

    def __init__(self, cfg: CLIPConfig, *, vocab_size: int, context_length: int) -> None:
        super().__init__()
        self.causal = cfg.causal_text
        self.context_length = context_length
        width = cfg.text.width
        self.tokens = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.positions_LW = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.blocks = transformer(cfg.text)
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, cfg.embed_dim, bias=False)

    def forward(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] -> feature [B, D] and final states [B, L, W]."""
        length = tokens_BL.shape[1]
        if length > self.context_length:
            raise ValueError(f"{length} tokens exceed the text tower's context_length {self.context_length}")
        real_BL = tokens_BL != PAD_ID
        mask = real_BL[:, None, None, :]
        if self.causal:
            mask = mask & torch.ones(length, length, dtype=torch.bool, device=tokens_BL.device).tril()
        x_BLW = self.tokens(tokens_BL) + self.positions_LW[:length]
        for block in self.blocks:
            x_BLW = block(x_BLW, mask=mask)
        states_BLW = self.norm(x_BLW)
        last_B = real_BL.sum(1) - 1
        pooled = states_BLW[torch.arange(len(tokens_BL), device=tokens_BL.device), last_B]
        return self.projection(pooled), states_BLW


class CLIP(nn.Module):
    """Image and text towers with a learned temperature.

    `logit_scale` is the logarithm of the factor on cosine similarities, fp32, starting at ln(1 / 0.07); call
    `clamp_logit_scale_` after each optimizer step and keep weight decay off it.
    """

    def __init__(self, cfg: CLIPConfig, *, vocab_size: int, context_length: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.image_tower = ImageTower(cfg)
        self.text_tower = TextTower(cfg, vocab_size=vocab_size, context_length=context_length)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07), dtype=torch.float32))

    def encode_image(self, images_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] [B, 3, S, S] -> image_embed, unit vectors in fp32 [B, D]."""
        return F.normalize(self.image_tower(images_BCHW).float(), dim=-1)

    def encode_text(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, L], padding 0 -> text_embed, fp32 unit vectors [B, D]; text_encodings [B, L, W]."""
        feature, states_BLW = self.text_tower(tokens_BL)
        return F.normalize(feature.float(), dim=-1), states_BLW

    def forward(self, images_BCHW: Tensor, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """(image_embed, text_embed), each [B, D]."""
        return self.encode_image(images_BCHW), self.encode_text(tokens_BL)[0]

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Keep the factor exp(logit_scale) in [1, 100], as in the paper (sec. 2.5)."""
        self.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)


def transformer(cfg: TowerConfig) -> nn.ModuleList:
    """`depth` blocks of one width."""
    return nn.ModuleList(
        TransformerBlock(cfg.width, heads=cfg.heads, mlp_ratio=cfg.mlp_ratio) for _ in range(cfg.depth)
    )


class _GatherRows(torch.autograd.Function):
    """Concatenates the ranks' rows; backward sums what every rank wants of our rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def contrastive_loss(image_embed: Tensor, text_embed: Tensor, *, logit_scale: Tensor, gather: bool = True) -> Tensor:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, fig. 3), a scalar in fp32.

    image_embed, text_embed: unit vectors [B, D], row i of one belongs to row i of the other; logit_scale in
    log space. With `gather` and torch.distributed initialised, this rank's rows are scored against all ranks'
    rows (equal B), and gradients flow to the other ranks' rows: the mean over ranks of loss and of gradients
    (what DDP does) equals the loss and gradients of one process holding the global batch.
    """
    with torch.autocast(image_embed.device.type, enabled=False):
        image_embed, text_embed, scale = image_embed.float(), text_embed.float(), logit_scale.float().exp()
        all_images, all_texts, first = image_embed, text_embed, 0
        if gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            all_images, all_texts = _GatherRows.apply(image_embed), _GatherRows.apply(text_embed)
            first = dist.get_rank() * len(image_embed)
        labels = torch.arange(first, first + len(image_embed), device=image_embed.device)
        image_loss = F.cross_entropy(scale * image_embed @ all_texts.T, labels)
        text_loss = F.cross_entropy(scale * text_embed @ all_images.T, labels)
        return 0.5 * (image_loss + text_loss)
