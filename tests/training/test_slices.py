"""Boxes against masks of numpy, and shares that put whole tensors together again."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from genpipe.training.slices import Box, overlap, share_of, within

SIDES = st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, *, of: tuple[int, ...]) -> Box:
    starts = tuple(draw(st.integers(0, side)) for side in of)
    return Box(starts, tuple(draw(st.integers(0, side - start)) for side, start in zip(of, starts, strict=True)))


def mask(box: Box, *, of: tuple[int, ...]) -> np.ndarray:
    inside = np.zeros(of, dtype=bool)
    inside[within(Box((0,) * len(of), of), box)] = True
    return inside


@given(st.data())
def test_an_overlap_is_where_both_masks_are(data: st.DataObject) -> None:
    whole = data.draw(SIDES)
    one, other = data.draw(boxes(of=whole)), data.draw(boxes(of=whole))
    both = mask(one, of=whole) & mask(other, of=whole)
    common = overlap(one, other)
    assert (0 if common is None else common.numel) == both.sum()
    if common is not None:
        np.testing.assert_array_equal(mask(common, of=whole), both)
        values = np.arange(both.size).reshape(whole)
        for box in (one, other):
            part = values[within(Box((0,) * len(whole), whole), box)]
            np.testing.assert_array_equal(part[within(box, common)].ravel(), values[both])


@given(st.dictionaries(st.text(min_size=1, max_size=3), SIDES, max_size=6), st.integers(1, 7))
def test_all_ranks_together_write_every_element_once(shapes: dict[str, tuple[int, ...]], ranks: int) -> None:
    tensors = {name: torch.arange(np.prod(shape), dtype=torch.float64).view(shape) for name, shape in shapes.items()}
    shares = [share_of(tensors, rank=rank, world_size=ranks) for rank in range(ranks)]
    for name, tensor in tensors.items():
        times = torch.zeros(tensor.shape)
        for share in shares:
            if name in share:
                local, box, whole = share[name]
                index = within(Box((0,) * tensor.ndim, whole), box)
                assert torch.equal(tensor[index], local) and local.data_ptr() >= tensor.data_ptr(), "it is no copy"
                times[index] += 1
        assert (times == 1).all()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=10), st.integers(1, 8))
def test_shares_are_equal_up_to_a_row(rows: list[int], ranks: int) -> None:
    tensors: dict[str, Tensor] = {str(i): torch.zeros(n, 3) for i, n in enumerate(rows)}
    shares = [share_of(tensors, rank=rank, world_size=ranks) for rank in range(ranks)]
    sizes = [sum(piece.local.nbytes for piece in share.values()) for share in shares]
    assert all(abs(size - sum(sizes) / ranks) <= 12 for size in sizes), "a row of three floats"


def test_an_empty_tensor_is_nobodys() -> None:
    assert share_of({"empty": torch.zeros(0, 4)}, rank=0, world_size=1) == {}
