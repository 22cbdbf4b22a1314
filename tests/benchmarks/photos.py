"""Photographs to measure with: cut from those on this machine, or artwork rendered with a photograph's spectrum.

Photographs are taken from the folder that GENPIPE_PHOTOS names, else from where Debian's wallpapers are installed
(`apt-get install mate-backgrounds`).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

FOLDERS = ("/usr/share/backgrounds", "/usr/share/wallpapers")
LEAST_SIDE = 1000


def describe() -> str:
    """What `photographs` cuts from, in words for the head of a table."""
    found = _found()
    return f"cuts from {len(found)} photographs in {found[0].parents[1]}" if found else "rendered artwork"


def photographs(count: int, *, height: int, width: int, quality: int = 90) -> list[bytes]:
    """`count` different JPEGs of this size, the same each time."""
    encoded = []
    for image in _views(count, aspect=width / height):
        buffer = io.BytesIO()
        image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3).save(buffer, "jpeg", quality=quality)
        encoded.append(buffer.getvalue())
    return encoded


def _views(count: int, *, aspect: float) -> Iterator[Image.Image]:
    """Parts of different size, from everywhere."""
    random = np.random.default_rng(0)
    for number in range(count):
        image = _photograph(number % len(_found())) if _found() else _artwork(number % 12)
        high = min(image.height, image.width / aspect) * random.uniform(0.25, 1)
        left, top = (
            random.uniform(0, whole - part) for whole, part in zip(image.size, (high * aspect, high), strict=True)
        )
        yield image.crop((round(left), round(top), round(left + high * aspect), round(top + high)))


@cache
def _found() -> list[Path]:
    folders = [os.environ["GENPIPE_PHOTOS"]] if "GENPIPE_PHOTOS" in os.environ else FOLDERS
    files = [path for folder in folders for path in sorted(Path(folder).rglob("*.jp*g"))]
    return [path for path in files if min(Image.open(path).size) >= LEAST_SIDE]


@cache
def _photograph(number: int) -> Image.Image:
    image = Image.open(_found()[number]).convert("RGB")
    image.thumbnail((3000, 3000))
    return image


@cache
def _artwork(number: int) -> Image.Image:
    """Noise whose amplitude falls with its frequency, as in photographs, under some hard-edged discs."""
    random, side = np.random.default_rng(number), 1200
    total = np.zeros((side, side, 3))
    for octave in range(1, 10):
        cells = 2**octave + 1
        grid = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC), float) / 1.7**octave
    y, x = np.mgrid[0:side, 0:side]
    for _ in range(12):
        row, column, radius = (int(random.integers(*span)) for span in ((0, side), (0, side), (20, 250)))
        inside = (y - row) ** 2 + (x - column) ** 2 < radius**2
        total[inside] = 0.5 * total[inside] + random.uniform(0, 150, 3)
    scaled = (total - total.min()) / (total.max() - total.min()) * 255
    return Image.fromarray(scaled.astype(np.uint8))
