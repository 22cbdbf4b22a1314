"""Large grids in overlapping tiles, so that memory follows the tile and not the image.

Shapes: B batch, C channels, H and W of the grid that goes in, h and w of the one that comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor


def tiled(function: Callable[[Tensor], Tensor], x_BCHW: Tensor, *, tile: int, overlap: int, scale: Fraction) -> Tensor:
    """`function` on tiles of `tile` cells that share at least `overlap`, blended with linear ramps.

    `function` multiplies the sides by `scale`. Where tiles do not overlap, the result is that of the whole if no
    output depends on inputs more than `overlap` cells away; where they do, errors at a tile's border weigh least.
    """
    if not 0 < 2 * overlap <= tile:
        raise ValueError(f"tile {tile} must be at least twice the overlap {overlap}, and overlap at least 1")
    height, width = x_BCHW.shape[-2:]
    total: Tensor | None = None
    weights = x_BCHW.new_zeros((1, 1, int(height * scale), int(width * scale)), dtype=torch.float32)
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            out = function(x_BCHW[..., top : top + tile, left : left + tile])
            if total is None:
                total = out.new_zeros((*out.shape[:2], *weights.shape[-2:]))
            ramp = int(overlap * scale)
            weight_hw = _window(out.shape[-2], ramp, out)[:, None] * _window(out.shape[-1], ramp, out)
            place = (..., slice(int(top * scale), int(top * scale) + out.shape[-2]),
                     slice(int(left * scale), int(left * scale) + out.shape[-1]))  # fmt: skip
            total[place] += out * weight_hw
            weights[place] += weight_hw
    assert total is not None, "a grid has cells"
    return total / weights


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one axis; the last ends with the grid."""
    if side <= tile:
        return [0]
    return [*range(0, side - tile, tile - overlap), side - tile]


def _window(size: int, ramp: int, like: Tensor) -> Tensor:
    """Weights that rise from both ends over `ramp` cells; nowhere zero, as the grid's own edges lie in one tile."""
    distance = torch.arange(size, device=like.device, dtype=torch.float32) + 0.5
    return (torch.minimum(distance, size - distance) / ramp).clamp(max=1.0)
