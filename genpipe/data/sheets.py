"""Contact sheets, and text beside pictures."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from genpipe.data.images import encode

Letters = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(
    images: Sequence[np.ndarray], *, columns: int, cell: int, captions: Sequence[str] = (), font: str = ""
) -> bytes:
    """PNG of uint8 [H, W, 3] images in rows of `columns`, two white pixels apart, each fitted into `cell` pixels.

    `captions`, one an image, are drawn below them, as much as fits three lines. `font` is a file with their letters;
    without one that of Debian and Ubuntu is looked for, as Pillow's own has little more than ASCII.
    """
    line = 12
    high = cell + (3 * line + 4 if captions else 0) + 2
    sheet = Image.new("RGB", (columns * (cell + 2) + 2, -(-len(images) // columns) * high + 2), "white")
    draw, letters = ImageDraw.Draw(sheet), letters_of(font, size=line - 2)
    for number, image in enumerate(images):
        left, top = 2 + number % columns * (cell + 2), 2 + number // columns * high
        small = Image.fromarray(image)
        if small.size != (cell, cell):
            small.thumbnail((cell, cell))
        sheet.paste(small, (left + (cell - small.width) // 2, top + (cell - small.height) // 2))
        if captions:
            for row, text in enumerate(wrapped(captions[number], letters=letters, width=cell, lines=3)):
                draw.text((left, top + cell + 1 + row * line), text, fill="black", font=letters)
    return encode(np.asarray(sheet), format="png")


def letters_of(font: str, *, size: int) -> Letters:
    """A font file's letters; without one DejaVu's if installed, else Pillow's own. Raises ValueError for no font."""
    try:
        return ImageFont.truetype(font or "DejaVuSans.ttf", size)
    except OSError as error:
        if font:
            raise ValueError(f"{font}: not a font that can be read ({error}); give a .ttf, .otf or .ttc file") from None
        return ImageFont.load_default(size)


def wrapped(text: str, *, letters: Letters, width: int, lines: int) -> list[str]:
    """The first `lines` lines of a text, each at most `width` pixels wide; broken at spaces where there are some."""
    found: list[str] = []
    while text and len(found) < lines:
        lengths = [math.ceil(letters.getlength(text[:n])) for n in range(1, min(len(text), width) + 1)]
        fits = bisect_right(lengths, width)
        space = text.rfind(" ", 0, fits + 1) if fits < len(text) else -1
        end = space if space > 0 else max(1, fits)
        found.append(text[:end])
        text = text[end:].lstrip()
    while text and letters.getlength(f"{found[-1]} ...") > width and found[-1]:
        found[-1] = found[-1][:-1]
    return [*found[:-1], f"{found[-1]} ..."] if text else found
