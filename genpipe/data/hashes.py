"""Perceptual hashes of images, and near duplicates among many of them.

Shape legend: H height, W width, C = 3 channels (RGB), N hashes, P pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

_SIDE = 32
_LOW = 8
_BITS = _LOW * _LOW
_FLAT = 1.0
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def perceptual_hash(image_HWC: np.ndarray) -> int | None:
    """The 64-bit DCT hash of uint8 [H, W, 3]; None for a flat image, whose hash would be noise.

    The image is squashed to 32 x 32 of gray; the bits say which of the 8 x 8 lowest DCT-II coefficients lie above
    their median, row by row from the highest bit (Zauner 2010, section 3.2.1, in the variant of the library
    `imagehash`). Copies that were resized or compressed again differ in a few bits, different images in some 32; the
    same shape in another colour counts as a copy.
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
    to one that is.
    """
    values, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    # Number the different values in the order in which they come.
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    kept = np.arange(len(values))
    for later, earlier in zip(*_close_pairs(values[order], distance=distance), strict=True):
        if kept[later] == later and kept[earlier] == earlier:
            kept[later] = earlier
    found: np.ndarray = first[order][kept[rank[inverse]]]
    return found.astype(np.int64)


def _close_pairs(hashes: np.ndarray, *, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """All j and i < j of different hashes [N] that differ in at most `distance` bits: int64 [P] each, by j, then i.

    Two such hashes agree in some `chosen` of `distance + chosen` bands of bits, so that sorting by each choice of
    bands brings them together (Manku, Jain & Das Sarma 2007, section 3); only what agrees there is compared.
    """
    n = len(hashes)
    bands, chosen = _best_bands(n, distance=distance)
    edges = [_BITS * band // bands for band in range(bands + 1)]
    masks = [sum(1 << bit for bit in range(low, high)) for low, high in itertools.pairwise(edges)]
    codes = [np.empty(0, np.int64)]
    for picked in itertools.combinations(masks, chosen):
        codes += [np.unique(j * n + i) for j, i in _pairs_that_agree(hashes, mask=sum(picked), distance=distance)]
    return np.divmod(np.unique(np.concatenate(codes)), n)


def _pairs_that_agree(hashes: np.ndarray, *, mask: int, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """j and i < j, int64 [P] each, within `distance`, among hashes that are equal under `mask`."""
    keys = hashes & np.uint64(mask)
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
