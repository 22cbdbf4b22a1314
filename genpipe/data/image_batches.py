"""Batches of images out of shards: decoded, cropped and resized to what a stage asks for.

Shape legend: B samples, C = 3 channels (RGB), H height, W width; S the side of a square.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image

from genpipe.data.images import ImageError, decode
from genpipe.data.loader import Batch
from genpipe.data.order import uniform
from genpipe.data.shard_dataset import ShardDataset

Crop = Literal["center", "random"]

MAX_BAD_RUN = 100
"""Damaged samples in a row after which reading gives up."""

ROOM = 1.25
"""A JPEG that is much too large is reduced while it is decoded, to no less than this much more than is asked for."""

JFIF, TABLES = b"\xff\xd8\xff\xe0\x00\x10", b"\xff\xdb"
"""How a JPEG begins that has JFIF's segment, of 16 bytes; and how the segment of its tables begins."""

_CROP = 0x9FB21C651E98DF25  # keeps its draws apart from others at the same position


@dataclass(frozen=True)
class Images:
    """Collates squares alone: `images`, uint8 [B, C, size, size]."""

    dataset: ShardDataset
    size: int
    crop: Crop = "center"
    seed: int = 0

    def __call__(self, indices: np.ndarray, positions: np.ndarray) -> Batch:
        draws = crop_draws(positions, crop=self.crop, seed=self.seed)
        (images,), _ = read_images(self.dataset, indices, sizes=(self.size,), draws=draws)
        return {"images": images}


def crop_draws(positions: np.ndarray, *, crop: Crop, seed: int) -> np.ndarray | None:
    """Where `read_images` crops the samples at these positions: float64 [B] in [0, 1), or None for the center."""
    return uniform(positions, seed=seed, salt=_CROP) if crop == "random" else None


def read_images(
    dataset: ShardDataset, indices: np.ndarray, *, sizes: Sequence[int], draws: np.ndarray | None = None
) -> tuple[list[torch.Tensor], np.ndarray]:
    """For each of `sizes` uint8 [B, C, size, size]; and whose images they are: int64 [B].

    The channels lie last in memory, as they are decoded; `to_float` puts them in front, on a GPU if there is one.
    The largest square of an image is taken, in its center or where `draws` in [0, 1) puts it along the longer side,
    and resized with antialiasing: averaged over boxes where all are squares of one whole multiple of the sizes, else
    bicubic (a = -0.5). A damaged image is noticed and gives way to the next sample of its source. Raises ValueError
    after 100 damaged ones in a row.
    """
    indices = np.array(indices, np.int64)
    side = _common_side(dataset, indices)
    multiple = side > 0 and all(side % size == 0 for size in sizes)
    buffers = [empty_images(len(indices), size=s) for s in ((side,) if multiple else sizes)]
    least = round(ROOM * max(sizes))
    encoded = enumerate(dataset.images_bytes(indices))
    for at, data in _others(encoded, buffers[0]) if len(buffers) == 1 else encoded:
        outs, draw = [images[at] for images in buffers], None if draws is None else float(draws[at])
        try:
            _decode_into(outs, data, draw=draw, least=least)
        except ImageError as error:
            indices[at] = _stand_in(outs, dataset, int(indices[at]), error, draw=draw, least=least)
    if multiple:
        buffers = [_box_downsample(buffers[0], factor=side // size) for size in sizes]
    return [torch.from_numpy(images).permute(0, 3, 1, 2) for images in buffers], indices


def empty_images(count: int, *, size: int) -> np.ndarray:
    """uint8 [count, size, size, C], uninitialized; begins 16 bytes past a multiple of 32.

    JPEGs are decoded fastest to there: at 64 pixels a side an image whose rows lie at multiples of 32 bytes takes a
    sixth longer, presumably because libjpeg-turbo then writes them past the caches.
    """
    memory = np.empty(count * size * size * 3 + 32, np.uint8)
    start = (16 - memory.ctypes.data) % 32
    return memory[start : start + count * size * size * 3].reshape(count, size, size, 3)


def image_batch(dataset: ShardDataset, indices: np.ndarray, *, size: int) -> torch.Tensor:
    """uint8 [B, C, size, size]: the centers of these images, as `read_images` has them."""
    return read_images(dataset, indices, sizes=(size,))[0][0]


def square(image_HWC: np.ndarray, *, size: int, draw: float | None = None) -> np.ndarray:
    """uint8 [size, size, C]: the largest square of an image, at its center or at `draw`, resized with antialiasing."""
    height, width = image_HWC.shape[:2]
    side = min(height, width)
    slack = max(height, width) - side
    start = slack // 2 if draw is None else int(draw * (slack + 1))
    left, top = (start, 0) if width > height else (0, start)
    crop_HWC = image_HWC[top : top + side, left : left + side]
    if side == size:
        return crop_HWC
    return np.asarray(Image.fromarray(crop_HWC).resize((size, size), Image.Resampling.BICUBIC))


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1], contiguous: the one place where images are normalized."""
    return images.contiguous().float() / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_float`, clamped: float in [-1, 1] to uint8 in [0, 255]."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _common_side(dataset: ShardDataset, indices: np.ndarray) -> int:
    """The side of these images if they are stored as squares of one side, else 0."""
    sizes = dataset.stored_sizes(indices)
    return int(sizes[0, 0]) if len(sizes) and (sizes == sizes[0, 0]).all() else 0


def _stand_in(
    outs: Sequence[np.ndarray], dataset: ShardDataset, i: int, error: ImageError, *, draw: float | None, least: int
) -> int:
    """Fill `outs` with the image of the first whole sample after the damaged i; which it is."""
    first = dataset.key(i)
    for _ in range(MAX_BAD_RUN):
        i = dataset.skip(i, error)
        try:
            _decode_into(outs, dataset.image_bytes(i), draw=draw, least=least)
        except ImageError as another:
            error = another
            continue
        return i
    raise ValueError(
        f"{dataset.folder}: {MAX_BAD_RUN} samples in a row are damaged, from {first!r} on; `genpipe data verify` "
        "says what is wrong with the shards"
    )


def _decode_into(outs: Sequence[np.ndarray], data: bytes, *, draw: float | None, least: int) -> None:
    """Fill squares [S, S, C] with an image; a JPEG may be decoded to no fewer than `least` pixels a side.

    Raises ImageError.
    """
    image_HWC = decode(data, least=least)
    for out_HWC in outs:
        whole = image_HWC.shape == out_HWC.shape
        out_HWC[:] = image_HWC if whole else square(image_HWC, size=len(out_HWC), draw=draw)


def _others(encoded: Iterable[tuple[int, bytes]], images_BHWC: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """Decode plain JPEGs of just this size to their places; all others, which are yet to be decoded.

    Plain are those whose header cannot say that they are to be turned, or of another color space. Most say at once:
    tables follow on the first segment, JFIF's. This loop runs for every sample of a training: a microsecond is a
    twentieth of decoding 64 pixels.
    """
    shape = images_BHWC.shape[1:]
    for at, data in encoded:
        if (data[:6] == JFIF and data[20:22] == TABLES) or (b"Exif\0" not in data and b"ICC_PROFILE\0" not in data):
            try:
                if simplejpeg.decode_jpeg(data, "RGB", buffer=images_BHWC[at]).shape == shape:
                    continue
            except ValueError:  # no JPEG, larger, damaged, or of another color space
                pass
        yield at, data


def _box_downsample(images_BHWC: np.ndarray, *, factor: int) -> np.ndarray:
    """The mean of every factor x factor box, rounded half up; in integers, where floats are much slower."""
    if factor == 1:
        return images_BHWC
    batch, height, width, channels = images_BHWC.shape
    dtype = np.uint32 if factor > 16 else np.uint16  # 16 * 16 * 255 fits 16 bits
    rows = np.zeros((batch, height // factor, width, channels), dtype)
    sums = np.zeros((batch, height // factor, width // factor, channels), dtype)
    for offset in range(factor):
        rows += images_BHWC[:, offset::factor]
    for offset in range(factor):
        sums += rows[:, :, offset::factor]
    means: np.ndarray = (sums + factor**2 // 2) // factor**2
    return means.astype(np.uint8)
