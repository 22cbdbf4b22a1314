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
from genpipe.data.shard_dataset import Member, ShardDataset

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
    """Collates `images`, uint8 [B, C, H, W]: squares of side `size`, or whole as they are stored if `size` is None.

    Images that are taken whole must be of one size in a batch. With `labels` there are the samples' classes, `labels`
    int64 [B], -1 for none; with `condition` their conditioning images, `condition` uint8 [B, C, H, W], cut as the
    images are.
    """

    dataset: ShardDataset
    size: int | None
    crop: Crop = "center"
    seed: int = 0
    labels: bool = False
    condition: bool = False

    def __call__(self, indices: np.ndarray, positions: np.ndarray) -> Batch:
        """The batch of these samples, which stand at `positions` of the stream: int64 [B] each."""
        draws = crop_draws(positions, crop=self.crop, seed=self.seed)
        images, whose = self._read(indices, draws, "image")
        batch = {"images": images}
        if self.condition:
            batch["condition"], indices = self._read(whose, draws, "condition")
            if (indices != whose).any():  # a damaged one takes another sample's, whose image is then wanted
                return self(indices, positions)
        if self.labels:
            batch["labels"] = torch.from_numpy(self.dataset.labels(whose))
        return batch

    def _read(self, indices: np.ndarray, draws: np.ndarray | None, member: Member) -> tuple[torch.Tensor, np.ndarray]:
        if self.size is None:
            return read_whole(self.dataset, indices, member=member)
        (images,), whose = read_images(self.dataset, indices, sizes=(self.size,), draws=draws, member=member)
        return images, whose


def crop_draws(positions: np.ndarray, *, crop: Crop, seed: int) -> np.ndarray | None:
    """Where `read_images` crops the samples at these positions: float64 [B] in [0, 1), or None for the center."""
    return uniform(positions, seed=seed, salt=_CROP) if crop == "random" else None


def read_images(
    dataset: ShardDataset,
    indices: np.ndarray,
    *,
    sizes: Sequence[int],
    draws: np.ndarray | None = None,
    member: Member = "image",
) -> tuple[list[torch.Tensor], np.ndarray]:
    """For each of `sizes` uint8 [B, C, size, size]; and whose images they are: int64 [B].

    The channels lie last in memory, as they are decoded; `to_float` puts them in front, on a GPU if there is one.
    The largest square of an image is taken, in its center or where `draws` in [0, 1) puts it along the longer side,
    and resized with antialiasing: averaged over boxes where all are squares of one whole multiple of the sizes, else
    bicubic (a = -0.5). A damaged image is noticed and gives way to the next sample of its source. Raises ValueError
    after 100 damaged ones in a row.
    """
    side = _common_side(dataset, indices)
    multiple = side > 0 and all(side % size == 0 for size in sizes)
    buffers = [empty_images(len(indices), height=s, width=s) for s in ((side,) if multiple else sizes)]
    reader = _Reader(dataset, member, least=round(ROOM * max(sizes)))
    indices = reader.read(indices, buffers, draws)
    if multiple:
        buffers = [_box_downsample(buffers[0], factor=side // size) for size in sizes]
    return [torch.from_numpy(images).permute(0, 3, 1, 2) for images in buffers], indices


def read_whole(
    dataset: ShardDataset, indices: np.ndarray, *, member: Member = "image"
) -> tuple[torch.Tensor, np.ndarray]:
    """uint8 [B, C, H, W], images that are all stored with one size, as they are; and whose they are: int64 [B].

    A damaged image is noticed and gives way to the next of its source that is stored with the same size.
    """
    height, width = dataset.stored_sizes(indices)[0].tolist()
    buffer = empty_images(len(indices), height=height, width=width)
    reader = _Reader(dataset, member, least=max(height, width), same_size=True)
    indices = reader.read(indices, [buffer], None)
    return torch.from_numpy(buffer).permute(0, 3, 1, 2), indices


def empty_images(count: int, *, height: int, width: int) -> np.ndarray:
    """uint8 [count, height, width, C], uninitialized; begins 16 bytes past a multiple of 32.

    JPEGs are decoded fastest to there: at 64 pixels a side an image whose rows lie at multiples of 32 bytes takes a
    sixth longer, presumably because libjpeg-turbo then writes them past the caches.
    """
    size = count * height * width * 3
    memory = np.empty(size + 32, np.uint8)
    start = (16 - memory.ctypes.data) % 32
    return memory[start : start + size].reshape(count, height, width, 3)


def image_batch(dataset: ShardDataset, indices: np.ndarray, *, size: int) -> torch.Tensor:
    """uint8 [B, C, size, size]: the centers of these images, as `read_images` has them."""
    return read_images(dataset, indices, sizes=(size,))[0][0]


def cut(image_HWC: np.ndarray, *, height: int, width: int, draw: float | None = None) -> np.ndarray:
    """uint8 [height, width, C]: the largest part of an image that has this aspect, resized with antialiasing.

    It is taken from the middle, or from where `draw` in [0, 1) puts it along the side that is too long.
    """
    scale = min(image_HWC.shape[0] / height, image_HWC.shape[1] / width)
    span = min(image_HWC.shape[0], round(scale * height)), min(image_HWC.shape[1], round(scale * width))
    slack = [whole - part for whole, part in zip(image_HWC.shape[:2], span, strict=True)]
    top, left = (rest // 2 if draw is None else int(draw * (rest + 1)) for rest in slack)
    part_HWC = image_HWC[top : top + span[0], left : left + span[1]]
    if span == (height, width):
        return part_HWC
    return np.asarray(Image.fromarray(part_HWC).resize((width, height), Image.Resampling.BICUBIC))


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


@dataclass(frozen=True)
class _Reader:
    """Reads and decodes one member of samples; a JPEG to no fewer than `least` pixels on its shorter side."""

    dataset: ShardDataset
    member: Member
    least: int
    same_size: bool = False

    def read(self, indices: np.ndarray, buffers: Sequence[np.ndarray], draws: np.ndarray | None) -> np.ndarray:
        """Fill buffers [B, H, W, C] with the images of int64 [B]; whose they are, as others stand in for damaged."""
        indices = np.array(indices, np.int64)
        encoded = enumerate(self.dataset.images_bytes(indices, member=self.member))
        for at, data in _others(encoded, buffers[0]) if len(buffers) == 1 else encoded:
            outs, draw = [images[at] for images in buffers], None if draws is None else float(draws[at])
            try:
                self._decode(outs, data, draw)
            except ImageError as error:
                indices[at] = self._stand_in(outs, int(indices[at]), error, draw)
        return indices

    def _decode(self, outs: Sequence[np.ndarray], data: bytes, draw: float | None) -> None:
        """Fill [H, W, C] each with an image. Raises ImageError."""
        image_HWC = decode(data, least=self.least)
        for out_HWC in outs:
            height, width = out_HWC.shape[:2]
            whole = image_HWC.shape == out_HWC.shape
            out_HWC[:] = image_HWC if whole else cut(image_HWC, height=height, width=width, draw=draw)

    def _stand_in(self, outs: Sequence[np.ndarray], i: int, error: ImageError, draw: float | None) -> int:
        """Fill `outs` with the image of the first whole sample after the damaged i; which it is."""
        first = self.dataset.key(i)
        for _ in range(MAX_BAD_RUN):
            i = self.dataset.skip(i, error, member=self.member, same_size=self.same_size)
            try:
                self._decode(outs, self.dataset.image_bytes(i, member=self.member), draw)
            except ImageError as another:
                error = another
                continue
            return i
        raise ValueError(
            f"{self.dataset.folder}: {MAX_BAD_RUN} samples in a row are damaged, from {first!r} on; `genpipe data "
            "verify` says what is wrong with the shards"
        )


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
