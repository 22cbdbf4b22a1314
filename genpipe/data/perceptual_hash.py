"""Perceptual hashes of images, and near duplicates among many of them.

Shape legend: H height, W width, C = 3 channels (RGB), N hashes, P pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

_SIDE = 32
_LOW = 8
_BITS = _LOW * _LOW
_FLAT = 1.0
_FEW_PAIRS = 2**20  # that are compared without a second thought
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def perceptual_hash(image_HWC: np.ndarray) -> int | None:
    """The 64-bit DCT hash of uint8 [H, W, 3]; None for a flat image, whose hash would be noise.

    The image is squashed to 32 x 32 of gray; the bits say which of the 8 x 8 lowest DCT-II coefficients lie above
    their median, row by row from the highest bit (Zauner 2010, section 3.2.1, in the variant of the library
    `imagehash`). Copies that were resized or compressed again differ in a few bits, different images in some 32; the
    same shape in another color counts as a copy.
    """
    image_NCHW = torch.from_numpy(np.require(image_HWC, requirements=["C", "W"])).permute(2, 0, 1)[None]
    small = F.interpolate(image_NCHW, size=(_SIDE, _SIDE), mode="bicubic", antialias=True)
    gray = small[0].permute(1, 2, 0).numpy().astype(np.float32) @ _LUMA
    basis = _dct_basis()
    low = basis @ gray @ basis.T
    if np.abs(low.ravel()[1:]).max() < _FLAT:
        return None
    bits = (low > np.median(low)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def nearest_kept(hashes: np.ndarray, *, distance: int) -> np.ndarray:
    """Which hash stands for each: int64 [N] from uint64 [N].

    In their order, a hash is kept unless an earlier kept one differs in at most `distance` bits; then the first
    such stands for it. A kept hash stands for itself. So no two that are kept are near, and all others are near
    to one that is. In a crowd of near hashes each is compared with the kept ones alone: time and memory do not grow
    with the square of their number.
    """
    values, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    # Number the different values in the order in which they come.
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    stands = np.arange(len(values))
    _settle(stands, np.arange(len(values)), hashes=values[order], distance=distance)
    found: np.ndarray = first[order][stands[rank[inverse]]]
    return found.astype(np.int64)


def _settle(stands: np.ndarray, rows: np.ndarray, *, hashes: np.ndarray, distance: int) -> None:
    """Find which of `rows`, that are in order, stands for which, and put it into `stands`, where each is its own."""
    masks = _masks(len(rows), distance=distance)
    if not _crowded(hashes[rows], masks):
        for later, earlier in zip(*_close_pairs(hashes[rows], masks, distance=distance), strict=True):
            if stands[rows[later]] == rows[later] and stands[rows[earlier]] == rows[earlier]:
                stands[rows[later]] = rows[earlier]
        return
    early, late = np.split(rows, [len(rows) // 2])
    _settle(stands, early, hashes=hashes, distance=distance)
    kept = early[stands[early] == early]
    nearest = _first_near(hashes[late], hashes[kept], distance=distance)
    is_near = nearest < len(kept)
    stands[late[is_near]] = kept[nearest[is_near]]
    _settle(stands, late[~is_near], hashes=hashes, distance=distance)


def _masks(n: int, *, distance: int) -> list[np.uint64]:
    """Bits such that two of `n` hashes that differ in at most `distance` bits agree in all of one mask or another.

    They agree in some `chosen` of `distance + chosen` bands of bits (Manku, Jain & Das Sarma 2007, section 3). Each
    band has bits of all frequencies, as pictures that are alike agree in the low ones.
    """
    bands, chosen = _best_bands(n, distance=distance)
    edges = [_BITS * band // bands for band in range(bands + 1)]
    bits = [sum(1 << 45 * place % _BITS for place in range(*edge)) for edge in itertools.pairwise(edges)]
    return [np.uint64(sum(picked)) for picked in itertools.combinations(bits, chosen)]


def _crowded(hashes: np.ndarray, masks: Sequence[np.uint64]) -> bool:
    """Whether many more pairs of them agree under a mask than would by chance, too many to compare each."""
    by_chance = sum(len(hashes) ** 2 / 2 ** (1 + int(mask).bit_count()) for mask in masks)
    agreeing = 0
    for mask in masks:
        keys = np.sort(hashes & mask)
        counts = np.diff(np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]])))
        agreeing += int((counts * (counts - 1) // 2).sum())
    return agreeing > 4 * by_chance + _FEW_PAIRS


def _close_pairs(hashes: np.ndarray, masks: Sequence[np.uint64], *, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """All j and i < j of different hashes [N] that differ in at most `distance` bits: int64 [P] each, by j, then i."""
    codes = [np.empty(0, np.int64)]
    for mask in masks:
        codes += [np.unique(j * len(hashes) + i) for j, i in _pairs_that_agree(hashes, mask=mask, distance=distance)]
    return np.divmod(np.unique(np.concatenate(codes)), len(hashes))


def _pairs_that_agree(hashes: np.ndarray, *, mask: np.uint64, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """j and i < j, int64 [P] each, within `distance`, among hashes that are equal under `mask`."""
    keys = hashes & mask
    by_key = np.argsort(keys, kind="stable")
    keys = keys[by_key]
    at = np.arange(len(keys))
    for step in itertools.count(1):
        at = at[: np.searchsorted(at, len(keys) - step)]
        at = at[keys[at] == keys[at + step]]  # what differs from the one `step` on differs from all beyond
        if not len(at):
            return
        i, j = by_key[at], by_key[at + step]
        near = np.bitwise_count(hashes[i] ^ hashes[j]) <= distance
        yield j[near], i[near]


def _first_near(hashes: np.ndarray, kept: np.ndarray, *, distance: int) -> np.ndarray:
    """For each hash [N] the first of `kept` that differs in at most `distance` bits: its place, or their number."""
    found = np.full(len(hashes), len(kept))
    for mask in _masks(len(kept), distance=distance):
        by_key = np.argsort(kept & mask, kind="stable")
        keys = (kept & mask)[by_key]
        start, stop = (np.searchsorted(keys, hashes & mask, side=side) for side in ("left", "right"))
        at = np.flatnonzero(start < stop)
        while len(at):
            place = by_key[start[at]]
            near = np.bitwise_count(hashes[at] ^ kept[place]) <= distance
            found[at[near]] = np.minimum(found[at[near]], place[near])
            at = at[~near]  # the first that is near comes first among those that agree
            start[at] += 1
            at = at[start[at] < stop[at]]
    return found


def _best_bands(n: int, *, distance: int) -> tuple[int, int]:
    """(bands, bands to agree): what makes sorting and comparing cheapest for `n` hashes."""

    def cost(chosen: int) -> float:
        agreeing = n / 2 ** (_BITS * chosen / (distance + chosen))
        return math.comb(distance + chosen, chosen) * (math.log2(n + 1) + agreeing)

    chosen = min(range(1, 5), key=cost)
    return distance + chosen, chosen


@lru_cache
def _dct_basis() -> np.ndarray:
    """The orthonormal DCT-II's first rows, float32 [8, 32]."""
    frequency, x = np.mgrid[0:_LOW, 0:_SIDE]
    basis: np.ndarray = np.cos(np.pi / _SIDE * frequency * (x + 0.5)) * np.sqrt(2 / _SIDE)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)
