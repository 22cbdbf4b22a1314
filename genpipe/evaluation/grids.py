"""Pictures for people: tiles of images with captions. Arrays are uint8, HWC."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from genpipe.data.sheets import letters_of, wrapped

MARGIN = 6
TEXT = 14
TITLE_LINES = 2
LABEL_WIDTH = 190


def tile(rows: Sequence[Sequence[np.ndarray]], *, cell: int) -> np.ndarray:
    """Rows of images as one picture without text, each image scaled to `cell` pixels."""
    canvas = Image.new("RGB", (max(len(row) for row in rows) * cell, len(rows) * cell), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            canvas.paste(_scaled(image, cell), (x * cell, y * cell))
    return np.asarray(canvas)


def labeled_grid(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    captions: Sequence[str],
    columns: Sequence[str],
    cell: int = 128,
    title: str = "",
) -> np.ndarray:
    """One row of images for each caption, captions at the left, column titles above, the `title` in the corner."""
    letters, line = letters_of("", size=TEXT), TEXT + 4
    head = MARGIN + (TITLE_LINES * line if title or any(columns) else 0)
    width = LABEL_WIDTH + len(columns) * (cell + MARGIN) + MARGIN
    canvas = Image.new("RGB", (width, head + len(rows) * (cell + MARGIN)), "white")
    draw = ImageDraw.Draw(canvas)

    def write(text: str, *, left: int, top: int, width: int, lines: int) -> None:
        for number, words in enumerate(wrapped(text, letters=letters, width=width, lines=lines)):
            draw.text((left, top + number * line), words, fill="black", font=letters)

    write(title.upper(), left=MARGIN, top=MARGIN, width=LABEL_WIDTH - 2 * MARGIN, lines=TITLE_LINES)
    for x, column in enumerate(columns):
        write(column, left=LABEL_WIDTH + x * (cell + MARGIN), top=MARGIN, width=cell, lines=TITLE_LINES)
    for y, (caption, row) in enumerate(zip(captions, rows, strict=True)):
        top = head + y * (cell + MARGIN)
        write(caption, left=MARGIN, top=top, width=LABEL_WIDTH - 2 * MARGIN, lines=max(1, cell // line))
        for x, image in enumerate(row):
            canvas.paste(_scaled(image, cell), (LABEL_WIDTH + x * (cell + MARGIN), top))
    return np.asarray(canvas)


def beside(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures side by side, their tops in line, white below the shorter ones."""
    height = max(len(picture) for picture in pictures)
    pad = [((0, height - len(picture)), (0, 0), (0, 0)) for picture in pictures]
    return np.concatenate([np.pad(*of, constant_values=255) for of in zip(pictures, pad, strict=True)], axis=1)


def _scaled(image: np.ndarray, cell: int) -> Image.Image:
    picture = Image.fromarray(image)
    return picture if picture.size == (cell, cell) else picture.resize((cell, cell), Image.Resampling.NEAREST)


def hwc(images: Tensor) -> list[np.ndarray]:
    """uint8 [B, C, H, W] as a list of HWC arrays."""
    return list(images.permute(0, 2, 3, 1).cpu().numpy())
