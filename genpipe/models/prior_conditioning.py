"""What the priors read first: a caption or the null caption, and the mask of their attention.

Shapes: B batch, L caption tokens, N tokens of the null caption, D embedding width, W text width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NullText = Literal["learned", "encoder"]
"""What replaces a dropped caption: learned vectors, or the text encoder's output for the empty caption."""


class Caption(NamedTuple):
    """embed [B, D]; encodings [B, L, W]; text_mask bool [B, L], True at tokens that are not padding."""

    embed: Tensor
    encodings: Tensor
    text_mask: Tensor


def null_caption(kind: NullText, *, embed_dim: int, text_width: int, null_tokens: int) -> tuple[Tensor, Tensor]:
    """The null caption's encodings and embed: parameters [W] (one token) and [D], or buffers [N, W] and [D].

    The encoder's are zeros until they are filled with its empty caption; they travel in the weights.
    """
    if kind == "learned":
        return nn.Parameter(0.02 * torch.randn(text_width)), nn.Parameter(0.02 * torch.randn(embed_dim))
    return nn.Buffer(torch.zeros(null_tokens, text_width)), nn.Buffer(torch.zeros(embed_dim))


def drop_captions(caption: Caption, drop_B: Tensor, *, null_encodings: Tensor, null_embed: Tensor) -> Caption:
    """The captions, with the null caption (see `null_caption`) in place of those where `drop_B` (bool) is True.

    Captions have at least as many tokens as the null caption.
    """
    length = caption.encodings.shape[1]
    null_NW = torch.atleast_2d(null_encodings)
    null_LW = F.pad(null_NW, (0, 0, 0, length - len(null_NW)))
    null_mask_L = torch.arange(length, device=drop_B.device) < len(null_NW)
    return Caption(
        torch.where(drop_B[:, None], null_embed, caption.embed),
        torch.where(drop_B[:, None, None], null_LW, caption.encodings),
        torch.where(drop_B[:, None], null_mask_L, caption.text_mask),
    )


def causal_mask(text_mask_BL: Tensor, *, extra: int) -> Tensor:
    """The mask among L tokens with padding and `extra` more without: bool [B, 1, S, S], S = L + extra.

    A token attends to itself and to what precedes it, except padding. Padding attends to itself too, so that no row of
    the softmax is empty; nothing else sees its states.
    """
    mask_BS = torch.cat([text_mask_BL, text_mask_BL.new_ones(len(text_mask_BL), extra)], dim=1)
    total = mask_BS.shape[1]
    causal = torch.ones(total, total, dtype=torch.bool, device=text_mask_BL.device).tril()
    itself = torch.eye(total, dtype=torch.bool, device=text_mask_BL.device)
    return ((causal & mask_BS[:, None, :]) | itself)[:, None]
