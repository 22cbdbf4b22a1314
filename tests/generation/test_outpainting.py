"""Outpainting: windows go outwards from what is known, each sees what is there, and what is known stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genpipe.generation.outpainting import bordered, outpaint

SIZE = 8


class Painter:
    """Draws the number of its call, and keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: list[int] = []

    def __call__(self, images: Tensor, keep: Tensor) -> Tensor:
        assert images.shape == (1, 3, SIZE, SIZE) and keep.shape == (1, 1, SIZE, SIZE)
        assert not keep.all(), "there is something to draw"
        self.shown.append(int(keep.sum()))
        return torch.where(keep, images, torch.full_like(images, float(len(self.shown))))


@pytest.mark.parametrize("border", [(4, 0, 0, 0), (0, 0, 3, 11), (6, 6, 6, 6), (20, 1, 0, 9)])
def test_all_is_drawn_from_the_picture_outwards(border: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = border
    picture = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) - 1
    canvas, known = bordered(picture, left=left, top=top, right=right, bottom=bottom)
    painter = Painter()
    made = outpaint(canvas, known, size=SIZE, fill=painter)
    assert made.shape == (1, 3, SIZE + top + bottom, SIZE + left + right)
    assert torch.equal(made[..., top : top + SIZE, left : left + SIZE], picture)
    drawn = made[~known.expand_as(made)]
    assert (drawn >= 1).all() and set(drawn.tolist()) == {float(i + 1) for i in range(len(painter.shown))}
    assert min(painter.shown) >= SIZE * SIZE // 4, "each window sees what it is to go on with"


def test_nothing_is_drawn_where_all_is_known() -> None:
    canvas, known = bordered(torch.zeros(1, 3, SIZE, SIZE), left=0, top=0, right=0, bottom=0)
    painter = Painter()
    assert torch.equal(outpaint(canvas, known, size=SIZE, fill=painter), canvas) and not painter.shown


def test_what_cannot_be_extended_is_refused() -> None:
    canvas, known = bordered(torch.zeros(1, 3, 4, 4), left=2, top=0, right=0, bottom=0)
    with pytest.raises(ValueError, match="6 x 4 is smaller"):
        outpaint(canvas, known, size=SIZE, fill=Painter())
    with pytest.raises(ValueError, match="nothing of the picture is kept"):
        outpaint(torch.zeros(1, 3, 9, 9), torch.zeros(1, 1, 9, 9, dtype=torch.bool), size=SIZE, fill=Painter())
    with pytest.raises(ValueError, match="0 or more"):
        bordered(torch.zeros(1, 3, 4, 4), left=-1, top=0, right=0, bottom=0)
