"""Which part of a tensor a rank holds, which of it it writes, and where two parts overlap.

A part is a box: where it begins and how far it reaches along each axis of the whole tensor. Checkpoints are written
and read by boxes, so that the ranks that read one need not be cut as those that wrote it were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from genpipe.training.sharding import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Box(NamedTuple):
    """Part of a tensor: its first index and its length along each axis."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in it."""
        return math.prod(self.shape)


class Piece(NamedTuple):
    """What this rank holds of a tensor of shape `whole`: `local`, whose place is `box`."""

    local: Tensor
    box: Box
    whole: tuple[int, ...]


def overlap(one: Box, other: Box) -> Box | None:
    """The box of what two boxes of one tensor have in common; None if that is nothing."""
    start = tuple(map(max, one.start, other.start))
    stop = [min(a + n, b + m) for a, n, b, m in zip(one.start, one.shape, other.start, other.shape, strict=True)]
    shape = tuple(b - a for a, b in zip(start, stop, strict=True))
    return Box(start, shape) if all(n > 0 for n in shape) else None


def within(outer: Box, inner: Box) -> tuple[slice, ...]:
    """The index of `inner` in the tensor that `outer` is the place of."""
    return tuple(slice(a - b, a - b + n) for a, n, b in zip(inner.start, inner.shape, outer.start, strict=True))


def local_piece(tensor: Tensor) -> Piece:
    """What this rank holds of a tensor: all of a plain one, its shard of a DTensor (sharded or replicated)."""
    whole = tuple(tensor.shape)
    if not is_sharded(tensor):
        return Piece(tensor.detach(), Box((0,) * len(whole), whole), whole)
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert all(isinstance(p, Shard | Replicate) for p in tensor.placements), "no sums that are still to be made"
    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Piece(tensor.to_local().detach(), Box(tuple(start), tuple(shape)), whole)


def share_of(tensors: Mapping[str, Tensor], *, rank: int, world_size: int) -> dict[str, Piece]:
    """What `rank` writes, so that all ranks together write every element once, and about equally many bytes each.

    Of what only this rank holds, all; of what several ranks hold (plain tensors, those replicated over an axis of
    their mesh) its share, cut along the first axis. `tensors` has the same names in the same order on every rank.
    """
    alike: dict[object, dict[str, Piece]] = {}
    copies: dict[object, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        key = (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None
        copies[key] = _copies(tensor) if is_sharded(tensor) else (rank, world_size)
        alike.setdefault(key, {})[name] = local_piece(tensor)
    return {name: piece for key, pieces in alike.items() for name, piece in _cut(pieces, *copies[key]).items()}


def _copies(tensor: DTensor) -> tuple[int, int]:
    """Which of the ranks that hold the same shard this one is, and how many they are."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is part of the mesh"
    index, count = 0, 1
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            size = tensor.device_mesh.size(axis)
            index, count = index * size + coordinate[axis], count * size
    return index, count


def _cut(pieces: dict[str, Piece], index: int, count: int) -> dict[str, Piece]:
    """The `index`-th of `count` about equal shares of some pieces, in whole rows."""
    total = sum(piece.local.nbytes for piece in pieces.values())
    low, high = total * index // count, total * (index + 1) // count
    share: dict[str, Piece] = {}
    before = 0
    for name, piece in pieces.items():
        size = piece.local.nbytes
        rows = piece.box.shape[0] if piece.box.shape else 1
        if size:
            first, last = (_row(at - before, row_size=size // rows, rows=rows) for at in (low, high))
            if first < last:
                share[name] = _rows(piece, first, last)
        before += size
    return share


def _row(offset: int, *, row_size: int, rows: int) -> int:
    """The first row that begins at this byte or after it."""
    return min(max(-(-offset // row_size), 0), rows)


def _rows(piece: Piece, first: int, last: int) -> Piece:
    if not piece.box.shape or (first, last) == (0, piece.box.shape[0]):
        return piece
    start, shape = piece.box
    box = Box((start[0] + first, *start[1:]), (last - first, *shape[1:]))
    return Piece(piece.local[first:last], box, piece.whole)
