"""Contrastive losses over the batch of all ranks, and a large batch in the memory of a small one.

Shapes: N ranks, b pairs of this rank, B = N b pairs in all, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, Tag
from torch import Tensor

from genpipe.config import Config, by_kind
from genpipe.models.layers import recomputed
from genpipe.models.precision import fp32

MAX_LOGIT_SCALE = math.log(100.0)


class SoftmaxLoss(Config):
    """InfoNCE, as CLIP (Radford et al. 2021): which of all texts belongs to an image, and which image to a text?"""

    kind: Literal["softmax"] = "softmax"
    temperature: float = Field(0.07, ge=0.01, le=1, description="at the start; it is learned")


class SigmoidLoss(Config):
    """SigLIP (Zhai et al. 2023): does this text belong to this image? Asked of every pair by itself."""

    kind: Literal["sigmoid"]
    temperature: float = Field(0.1, ge=0.01, le=1, description="at the start; it is learned")
    bias: float = Field(-10.0, description="at the start; it is learned. Most pairs are none")


LossConfig = Annotated[
    Annotated[SoftmaxLoss, Tag("softmax")] | Annotated[SigmoidLoss, Tag("sigmoid")], by_kind("softmax")
]


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


def _ranks(gather: bool) -> tuple[int, int]:
    """(this rank, all ranks) that take part in a loss."""
    if gather and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def softmax_loss(image_embed: Tensor, text_embed: Tensor, *, logit_scale: Tensor, gather: bool = True) -> Tensor:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, fig. 3), a scalar in fp32.

    image_embed, text_embed: unit vectors [b, D], row i of one belongs to row i of the other; logit_scale in
    log space. With `gather` and torch.distributed initialized, this rank's rows are scored against all ranks'
    rows (equal b), and gradients flow to the other ranks' rows: the mean over ranks of loss and of gradients
    (what DDP does) equals the loss and gradients of one process holding the global batch. Logits are [b, B].
    """
    rank, ranks = _ranks(gather)
    with fp32(image_embed.device):
        image_embed, text_embed, scale = image_embed.float(), text_embed.float(), logit_scale.float().exp()
        all_images, all_texts, first = image_embed, text_embed, rank * len(image_embed)
        if ranks > 1:
            all_images, all_texts = _GatherRows.apply(image_embed), _GatherRows.apply(text_embed)
        return _softmax_rows(image_embed, text_embed, all_images, all_texts, scale, first=first)


def _softmax_rows(
    images: Tensor, texts: Tensor, all_images: Tensor, all_texts: Tensor, scale: Tensor, *, first: int
) -> Tensor:
    """The mean over some pairs, those from `first` on, of InfoNCE against all."""
    labels = torch.arange(first, first + len(images), device=images.device)
    image_loss = F.cross_entropy(scale * images @ all_texts.T, labels)
    text_loss = F.cross_entropy(scale * texts @ all_images.T, labels)
    return 0.5 * (image_loss + text_loss)


@torch.no_grad()
def softmax_loss_in_chunks(image_embed: Tensor, text_embed: Tensor, *, logit_scale: Tensor, size: int) -> Tensor:
    """`softmax_loss` of this process's pairs [N, D], without gradients and with [size, N] logits at a time."""
    with fp32(image_embed.device):
        images, texts, scale = image_embed.float(), text_embed.float(), logit_scale.float().exp()
        total = images.new_zeros(())
        for first in range(0, len(images), size):
            some = slice(first, first + size)
            rows = images[some]
            total += len(rows) * _softmax_rows(rows, texts[some], images, texts, scale, first=first)
        return total / len(images)


def sigmoid_loss(
    image_embed: Tensor, text_embed: Tensor, *, logit_scale: Tensor, logit_bias: Tensor, gather: bool = True
) -> Tensor:
    """SigLIP's pairwise loss over the global batch (Zhai et al. 2023, eq. 1), a scalar in fp32.

    Arguments and what the mean over ranks equals are as in `softmax_loss`. The texts of all ranks are gathered
    [B, D], but compared rank by rank (sec. 3.3) and again in backward: logits are [b, b], however many ranks.
    """
    rank, ranks = _ranks(gather)
    with fp32(image_embed.device):
        images, texts = image_embed.float(), text_embed.float()
        blocks = _GatherRows.apply(texts).chunk(ranks) if ranks > 1 else (texts,)
        scale, bias = logit_scale.float().exp(), logit_bias.float()
        total = images.new_zeros(())
        for other, block in enumerate(blocks):
            loss = _matches_loss if other == rank else _mismatches_loss
            total = total + recomputed(loss, images, block, scale, bias)
        return total / len(images)


@torch.no_grad()
def sigmoid_loss_in_chunks(
    image_embed: Tensor, text_embed: Tensor, *, logit_scale: Tensor, logit_bias: Tensor, size: int
) -> Tensor:
    """`sigmoid_loss` of this process's pairs [N, D], without gradients and with [size, size] logits at a time."""
    with fp32(image_embed.device):
        scale, bias = logit_scale.float().exp(), logit_bias.float()
        blocks = text_embed.float().split(size)
        total = scale.new_zeros(())
        for row, images in enumerate(image_embed.float().split(size)):
            for column, block in enumerate(blocks):
                loss = _matches_loss if row == column else _mismatches_loss
                total += loss(images, block, scale, bias)
        return total / len(image_embed)


def _mismatches_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The sum over all pairs, none of which belong together."""
    return F.softplus(scale * images @ texts.T + bias).sum()


def _matches_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The sum over all pairs, of which those of equal rows belong together."""
    logits = scale * images @ texts.T + bias
    signs = 1 - 2 * torch.eye(len(images), device=images.device)
    return F.softplus(signs * logits).sum()


def encode_in_chunks(encode: Callable[..., Tensor], *rows: Tensor, size: int | None) -> Tensor:
    """`encode(*rows)`, `size` rows at a time, with one chunk's activations in memory at a time.

    As GradCache (Gao et al. 2021): a chunk's activations are dropped after its features are known, and computed
    again when the loss over all features has given their gradient. Loss and gradients are those of the whole batch;
    the price is a second forward pass. `encode` maps each row by itself and draws no random numbers.
    """
    if size is None or size >= len(rows[0]):
        return encode(*rows)
    chunks = zip(*(tensor.split(size) for tensor in rows), strict=True)
    return torch.cat([recomputed(encode, *chunk) for chunk in chunks])
