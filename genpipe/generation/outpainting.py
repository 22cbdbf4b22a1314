"""Outpainting: a picture with more around it, drawn window by window. For systems of all kinds.

Each window is an inpainting (`inpainting`) that sees what is there already, as DALL-E 2's users extend pictures.
Shape legend: H, W the canvas in pixels, `size` the side of the system's pictures.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Fill = Callable[[Tensor, Tensor], Tensor]
"""(images [1, 3, size, size], keep bool [1, 1, size, size]) -> the images with the rest drawn, kept pixels exactly."""


def outpaint(canvas: Tensor, known: Tensor, *, size: int, fill: Fill) -> Tensor:
    """The canvas [1, 3, H, W] in [-1, 1] with all drawn that is not `known`, bool [1, 1, H, W], which stays exactly.

    Windows overlap by half where they can. The next is always the one that shows the most of what is known of those
    with something to draw, so drawing goes outwards. Raises ValueError for a canvas that is smaller than `size`, or of
    which nothing is known.
    """
    height, width = canvas.shape[-2:]
    if min(height, width) < size:
        raise ValueError(f"the canvas of {width} x {height} is smaller than the system's pictures, {size} px")
    if not known.any():
        raise ValueError("nothing of the picture is kept, so there is nothing to extend; draw one from a prompt")
    canvas, known = canvas.clone(), known.clone()
    while not known.all():
        top, left = _next_window(known, size)
        window = (..., slice(top, top + size), slice(left, left + size))
        canvas[window] = fill(canvas[window], known[window])
        known[window] = True
    return canvas


def bordered(image: Tensor, *, left: int, top: int, right: int, bottom: int) -> tuple[Tensor, Tensor]:
    """A picture [1, 3, H, W] with a border that is yet to be drawn, and what is known, bool [1, 1, H + ..., W + ...].

    The border repeats the edge, for encoders that look beyond their cell. Raises ValueError for negative sizes.
    """
    if min(left, top, right, bottom) < 0:
        raise ValueError(f"extend: widths of borders are 0 or more, not {left}, {top}, {right}, {bottom}")
    sides = (left, right, top, bottom)
    canvas = torch.nn.functional.pad(image, sides, mode="replicate")
    known = torch.nn.functional.pad(torch.ones_like(image[:, :1], dtype=torch.bool), sides)
    return canvas, known


def _next_window(known: Tensor, size: int) -> tuple[int, int]:
    """Top and left of the window that shows the most that is known of those with something to draw."""
    height, width = known.shape[-2:]
    places = [(top, left) for top in _starts(height, size) for left in _starts(width, size)]
    shown = {(top, left): int(known[..., top : top + size, left : left + size].sum()) for top, left in places}
    return max((place for place in places if shown[place] < size * size), key=lambda place: shown[place])


def _starts(length: int, size: int) -> list[int]:
    """Where windows begin along an axis: every half of one, and at the end."""
    return [*range(0, length - size, max(1, size // 2)), length - size]
