"""Attention, positions and patches against torch's own and closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import genpipe.models
from genpipe.models.layers import (
    LayerNorm,
    Rotary,
    TransformerConfig,
    attend,
    grid_coordinates,
    patchify,
    sinusoid,
    unpatchify,
)


def test_attend_equals_torch_attention_with_and_without_gradients() -> None:
    gen = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 8, generator=gen)
    mask = torch.rand(2, 1, 7, 7, generator=gen) > 0.4
    mask[..., 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attend(q, k, v, mask=mask), expected)
    torch.testing.assert_close(attend(q.requires_grad_(), k, v, mask=mask), expected)


def test_a_norms_gradients_hold_in_bf16_over_many_rows() -> None:
    """Against fp32 on the same rounded inputs; torch's own is 19 % off."""
    gen = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(32_768, 64, generator=gen).bfloat16() for _ in range(2))

    def gradients(norm: nn.LayerNorm, dtype: torch.dtype) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = norm(x.to(dtype))
        assert out.dtype == dtype
        return list(torch.autograd.grad(out, list(norm.parameters()), grad.to(dtype)))

    pairs = zip(gradients(LayerNorm(64), torch.bfloat16), gradients(nn.LayerNorm(64), torch.float32), strict=True)
    for found, expected in pairs:
        assert (found - expected).norm() < 0.005 * expected.norm()


def test_no_model_takes_torchs_own_norm() -> None:
    [room] = genpipe.models.__path__
    texts = {path.name: path.read_text() for path in Path(room).rglob("*.py")}
    assert not [name for name, text in texts.items() if "nn.LayerNorm(" in text.replace("(nn.LayerNorm):", "")]


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="width 10 is not divisible by heads 3"):
        TransformerConfig(width=10, depth=1, heads=3)


@given(patch=st.sampled_from([1, 2, 4]), rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_patchify_is_row_major_and_inverted(patch: int, rows: int, columns: int) -> None:
    height, width = rows * patch, columns * patch
    x = torch.arange(2 * 3 * height * width, dtype=torch.float32).view(2, 3, height, width)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, rows * columns, 3 * patch**2)
    last = x[:, :, -patch:, -patch:].flatten(1)
    torch.testing.assert_close(tokens[:, -1], last)
    assert torch.equal(unpatchify(tokens, patch, height=height, width=width), x)


def test_patchify_refuses_a_ragged_grid() -> None:
    with pytest.raises(ValueError, match="patches of 4"):
        patchify(torch.zeros(1, 3, 6, 8), 4)


def test_rotary_products_depend_on_differences_only() -> None:
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=gen).expand(2, 1, 1, 9, 16)
    coordinates = grid_coordinates(3, 3, device=torch.device("cpu"))
    here, there = Rotary(coordinates, head_dim=16), Rotary(coordinates + 5.0, head_dim=16)
    products = here(q) @ here(k).transpose(-1, -2)
    torch.testing.assert_close(there(q) @ there(k).transpose(-1, -2), products, atol=1e-5, rtol=1e-5)
    # One step right is the same product wherever it is taken; a step right and a step down differ.
    torch.testing.assert_close(products[0, 0, 0, 1], products[0, 0, 7, 8])
    assert not torch.allclose(products[0, 0, 0, 1], products[0, 0, 0, 3])


def test_sinusoid_closed_form() -> None:
    x = torch.tensor([0.0, 2.0])
    expected = torch.stack([x.cos(), (x / 100).cos(), x.sin(), (x / 100).sin()], dim=-1)
    torch.testing.assert_close(sinusoid(x, dim=4), expected)
    with pytest.raises(ValueError, match="even"):
        sinusoid(x, dim=3)
