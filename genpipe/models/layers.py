"""Building blocks shared by the networks.

Shapes: B batch, L tokens (Q queries, K keys), D width, H heads, E width of a head, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genpipe.config import Config

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


class TransformerConfig(Config):
    """Size of a transformer."""

    width: PositiveInt = Field(description="dimensions of a token")
    depth: PositiveInt = Field(description="blocks")
    heads: PositiveInt = Field(4, description="attention heads of a block")
    mlp_ratio: PositiveFloat = Field(4.0, description="width of the MLPs' hidden layer, as a multiple of the width")

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}; change one")
        return self


class LayerNorm(nn.LayerNorm):
    """torch's, whose gradients hold in bf16 on a CPU, too.

    There torch 2.13 sums the gradients of its weights in bf16: of 512 rows they are 3 % off, of 32,768 rows 19 %. So it
    is computed in fp32, as under CUDA's autocast; output in the input's dtype.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize over the last axis."""
        if input.device.type != "cpu" or input.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(input)
        return super().forward(input.float()).to(input.dtype)


def attend(q_BHQE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Softmax attention [B, H, Q, E]; bool `mask`, True where a query may attend, broadcasts to [B, H, Q, K].

    Every query needs at least one key that it may attend to.
    """
    if q_BHQE.device.type != "cpu" or not q_BHQE.requires_grad:
        return F.scaled_dot_product_attention(q_BHQE, k_BHKE, v_BHKE, attn_mask=mask)
    # On CPU the fused kernel's bf16 backward is 4 to 9 times slower than these three lines at 16 to 64
    # tokens.
    scores = (q_BHQE * q_BHQE.shape[-1] ** -0.5) @ k_BHKE.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v_BHKE


def split_heads(x_BLD: Tensor, heads: int) -> Tensor:
    """[B, L, D] -> [B, H, L, E]."""
    return x_BLD.unflatten(-1, (heads, -1)).transpose(1, 2)


class KeyValueCache:
    """Keys and values of the tokens that an attention has seen, [B, T, D] each, with room for `tokens`."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.length = tokens, 0

    def extended(self, k_BLD: Tensor, v_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values so far, with those of L more tokens appended."""
        if self.length == 0:
            room = (len(k_BLD), self.tokens, k_BLD.shape[2])
            self.k_BTD, self.v_BTD = k_BLD.new_empty(room), v_BLD.new_empty(room)
        start, self.length = self.length, self.length + k_BLD.shape[1]
        self.k_BTD[:, start : self.length] = k_BLD
        self.v_BTD[:, start : self.length] = v_BLD
        return self.k_BTD[:, : self.length], self.v_BTD[:, : self.length]


class Attention(nn.Module):
    """Self-attention, whose keys may be extended by a context, as in GLIDE (Nichol et al. 2021, sec. 2.2).

    With `qk_norm` queries and keys are layer-normalized before the split into heads, over the whole width (cheaper
    than per head): it bounds the logits, the usual source of divergence in bf16 (Dehghani et al. 2023, sec. 3.1).
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        head_width: int | None = None,
        context_dim: int | None = None,
        qk_norm: bool = True,
        qkv_bias: bool = True,
    ) -> None:
        """The heads share `width` evenly, or are each `head_width` wide, however wide the tokens are."""
        super().__init__()
        assert head_width or width % heads == 0, "checked in TransformerConfig"
        inner = heads * head_width if head_width else width
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * inner, bias=qkv_bias)
        self.q_norm = LayerNorm(inner) if qk_norm else nn.Identity()
        self.k_norm = LayerNorm(inner) if qk_norm else nn.Identity()
        self.context_kv = None if context_dim is None else nn.Linear(context_dim, 2 * inner)
        self.out = nn.Linear(inner, width)

    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        rotary: Rotary | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x [B, L, D] -> [B, L, D]; `context` [B, M, context_dim]; `mask` broadcasts to [B, H, L, L + M].

        With a `cache` of T tokens x comes after them, and attends to all T + L: `mask` is [B, H, L, T + L].
        """
        q, k, v = self.qkv(x_BLD).chunk(3, dim=-1)
        q = split_heads(self.q_norm(q), self.heads)
        k = self.k_norm(k)
        if rotary is not None:
            q = rotary(q)
            k = rotary(split_heads(k, self.heads)).transpose(1, 2).flatten(2)
        if context is not None:
            assert self.context_kv is not None, "context given to an attention built without context_dim"
            context_k, context_v = self.context_kv(context).chunk(2, dim=-1)
            k = torch.cat([k, self.k_norm(context_k)], dim=1)
            v = torch.cat([v, context_v], dim=1)
        if cache is not None:
            k, v = cache.extended(k, v)
        attended = attend(q, split_heads(k, self.heads), split_heads(v, self.heads), mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of tokens to a context alone; queries and keys normed as in `Attention`."""

    def __init__(
        self, width: int, *, heads: int, context_dim: int, qk_norm: bool = True, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        assert width % heads == 0, "checked in TransformerConfig"
        self.heads = heads
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.kv = nn.Linear(context_dim, 2 * width, bias=qkv_bias)
        self.q_norm = LayerNorm(width) if qk_norm else nn.Identity()
        self.k_norm = LayerNorm(width) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, *, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, L, D] -> [B, L, D]; `context` [B, M, context_dim]; `mask` broadcasts to [B, H, L, M]."""
        k, v = self.kv(context).chunk(2, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in (self.q_norm(self.q(x_BLD)), self.k_norm(k), v))
        return self.out(attend(q, k, v, mask=mask).transpose(1, 2).flatten(2))


def joint_mask(context_mask_BM: Tensor, *, tokens: int) -> Tensor:
    """Keys are an image's own tokens, which always count, then the context's: bool [B, 1, 1, tokens + M]."""
    own = context_mask_BM.new_ones(len(context_mask_BM), tokens)
    return torch.cat([own, context_mask_BM], dim=1)[:, None, None]


def zeroed(layer: Layer) -> Layer:
    """The layer with weights and bias of zero, so that what it closes is the identity at the start."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def recomputed(block: Callable[..., Tensor], *inputs: object, **options: Any) -> Tensor:
    """block(*inputs, **options), whose activations are computed again in backward instead of kept (Chen et al. 2016).

    Random numbers of torch's default generators are the same again; a block must draw none from another one.
    """
    output: Tensor = checkpoint(block, *inputs, use_reentrant=False, **options)
    return output


def dropout(x: Tensor, share: float, *, generator: torch.Generator, number: int) -> Tensor:
    """x with a random `share` of its elements at 0 and the others divided by 1 - share (Srivastava et al. 2014).

    The elements follow from the seed of `generator` and the `number` of the layer alone: nothing is drawn from the
    generator, so that a block that is computed again in the backward pass drops the same ones.
    """
    own = torch.Generator(generator.device).manual_seed((generator.initial_seed() + number) % 2**63)
    kept = torch.rand(x.shape, generator=own, device=x.device) >= share
    return x * kept / (1 - share)


class Mlp(nn.Module):
    """Linear, GELU, Linear. The exact GELU: its tanh approximation is four times slower in bf16 on CPU.

    OpenAI trained CLIP with `quick_gelu`, x sigmoid(1.702 x), and DiT has `gelu_tanh`; weights of one do not serve
    the other.
    """

    def __init__(self, width: int, *, ratio: float, activation: Activation = "gelu") -> None:
        super().__init__()
        self.activation = activation
        hidden = int(width * ratio)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        hidden = self.up(x_BLD)
        if self.activation == "quick_gelu":
            return self.down(hidden * torch.sigmoid(1.702 * hidden))
        return self.down(F.gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class ResidualBlock(nn.Module):
    """A block whose output is added to its input.

    The matrices of such blocks are the hidden ones, which Muon optimizes (`training.optim`): a network of one's own
    derives its blocks from this class.
    """


class Modulation(nn.Linear):
    """A conditioning vector [B, D] to a block's shifts, scales and gates; in a block, but none of its matrices."""


class TransformerBlock(ResidualBlock):
    """Pre-norm transformer block: attention, then MLP, each added to the residual stream."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        head_width: int | None = None,
        mlp_ratio: float = 4.0,
        qk_norm: bool = True,
        qkv_bias: bool = True,
        activation: Activation = "gelu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, heads=heads, head_width=head_width, qk_norm=qk_norm, qkv_bias=qkv_bias)
        self.mlp_norm = LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, ratio=mlp_ratio, activation=activation)

    def forward(self, x_BLD: Tensor, *, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """x [B, L, D] -> [B, L, D]; `mask` and `cache` as in `Attention`."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), mask=mask, cache=cache)
        return x_BLD + self.mlp(self.mlp_norm(x_BLD))


def sinusoid(x: Tensor, *, dim: int, max_period: float = 10_000.0) -> Tensor:
    """[cos | sin] of x (any shape) at geometric frequencies, fp32 [..., dim]; Vaswani et al. 2017."""
    if dim % 2:
        raise ValueError(f"a sinusoidal embedding needs an even width, got {dim}")
    steps = torch.arange(dim // 2, device=x.device, dtype=torch.float32) / (dim // 2)
    angles = x.float()[..., None] * torch.exp(-math.log(max_period) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class LevelEmbedding(nn.Module):
    """Embeds times or noise levels in [0, 1] [B] as [B, width]: sinusoid of 1000 level, then an MLP."""

    def __init__(self, width: int, *, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.up = nn.Linear(frequencies, width)
        self.down = nn.Linear(width, width)

    def forward(self, level_B: Tensor) -> Tensor:
        """Levels [B] in [0, 1] -> [B, width]."""
        return self.down(F.silu(self.up(sinusoid(1000.0 * level_B, dim=self.frequencies))))


def label_table(classes: int, width: int) -> nn.Embedding | None:
    """Embeddings [classes + 1, width] of class labels, N(0, 0.02) at the start, or None for no classes.

    The last row is the null class, which replaces a dropped label (Ho & Salimans 2022, sec. 3.2); the table is
    DiT's (Peebles & Xie 2023), and added to the time embedding as in ADM (Dhariwal & Nichol 2021, sec. 3.1).
    """
    if not classes:
        return None
    table = nn.Embedding(classes + 1, width)
    nn.init.normal_(table.weight, std=0.02)
    return table


def grid_coordinates(height: int, width: int, *, device: torch.device) -> Tensor:
    """Row and column of each cell of a grid in row-major order, fp32 [height * width, 2]."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1).float()


class Rotary:
    """2-D rotary positions (Su et al. 2021; Heo et al. 2024), half by the row and half by the column.

    Attention then sees differences of coordinates only, so a crop and a whole image are treated alike.
    """

    def __init__(self, coordinates_L2: Tensor, *, head_dim: int, max_period: float = 100.0) -> None:
        if head_dim % 4:
            raise ValueError(f"rotary positions in 2-D need a head width divisible by 4, got {head_dim}")
        quarter = head_dim // 4
        steps = torch.arange(quarter, device=coordinates_L2.device, dtype=torch.float32) / quarter
        angles = (coordinates_L2[:, :, None] * torch.exp(-math.log(max_period) * steps)).flatten(1)
        self.cos_LE, self.sin_LE = angles.cos(), angles.sin()

    def __call__(self, x_BHLE: Tensor) -> Tensor:
        """Queries or keys [B, H, L, E], rotated by the coordinates of their tokens."""
        first, second = x_BHLE.chunk(2, dim=-1)
        cos, sin = self.cos_LE.to(x_BHLE.dtype), self.sin_LE.to(x_BHLE.dtype)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def patchify(x_BCHW: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> tokens in row-major order [B, H W / patch^2, C patch^2]."""
    height, width = x_BCHW.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(f"a {height}x{width} grid does not divide into patches of {patch}")
    return F.pixel_unshuffle(x_BCHW, patch).flatten(2).transpose(1, 2)


def unpatchify(x_BLD: Tensor, patch: int, *, height: int, width: int) -> Tensor:
    """Inverse of `patchify` for a grid of height x width pixels."""
    grid = x_BLD.transpose(1, 2).unflatten(2, (height // patch, width // patch))
    return F.pixel_shuffle(grid, patch)
