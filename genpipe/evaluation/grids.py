"""Pictures for people: tiles of images with captions. Arrays are uint8, HWC."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN = 6
TEXT = 14
LABEL_WIDTH = 190


def tile(rows: Sequence[Sequence[np.ndarray]], *, cell: int) -> np.ndarray:
    """Rows of images as one picture without text, each image scaled to `cell` pixels."""
    canvas = Image.new("RGB", (max(len(row) for row in rows) * cell, len(rows) * cell), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            canvas.paste(_scaled(image, cell), (x * cell, y * cell))
    return np.asarray(canvas)


def labelled_grid(
    rows: Sequence[Sequence[np.ndarray]], *, captions: Sequence[str], columns: Sequence[str], cell: int = 128
) -> np.ndarray:
    """One row of images for each caption, captions at the left, column titles above."""
    font = ImageFont.load_default(TEXT)
    head = MARGIN + (2 * (TEXT + 4) if any(columns) else 0)
    width = LABEL_WIDTH + len(columns) * (cell + MARGIN) + MARGIN
    canvas = Image.new("RGB", (width, head + len(rows) * (cell + MARGIN)), "white")
    draw = ImageDraw.Draw(canvas)
    per_line = max(8, cell // 8)
    for x, title in enumerate(columns):
        text = textwrap.fill(title, per_line)
        draw.multiline_text((LABEL_WIDTH + x * (cell + MARGIN), MARGIN), text, fill="black", font=font)
    for y, (caption, row) in enumerate(zip(captions, rows, strict=True)):
        top = head + y * (cell + MARGIN)
        lines = textwrap.wrap(caption, 24, max_lines=max(1, cell // (TEXT + 4)), placeholder=" ...")
        draw.multiline_text((MARGIN, top), "\n".join(lines), fill="black", font=font)
        for x, image in enumerate(row):
            canvas.paste(_scaled(image, cell), (LABEL_WIDTH + x * (cell + MARGIN), top))
    return np.asarray(canvas)


def _scaled(image: np.ndarray, cell: int) -> Image.Image:
    picture = Image.fromarray(image)
    return picture if picture.size == (cell, cell) else picture.resize((cell, cell), Image.Resampling.NEAREST)
