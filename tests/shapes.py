"""Pictures of shapes with captions, which tests train on."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 60, 220),
    "yellow": (230, 200, 40),
    "black": (20, 20, 20),
    "purple": (140, 40, 160),
}
SIZES = {"small": 8, "large": 14}
SHAPES = ("circle", "square", "triangle", "bar", "cross")


def draw_shapes(folder: Path) -> None:
    """Write 60 pictures of 40 pixels into a folder, each with its caption in a `.txt` beside it."""
    for (color, rgb), shape, (size, radius) in product(COLORS.items(), SHAPES, SIZES.items()):
        name = folder / f"{size}-{color}-{shape}"
        draw_shape(shape, rgb=rgb, radius=radius).save(name.with_suffix(".png"))
        name.with_suffix(".txt").write_text(f"a {size} {color} {shape}\n")


def draw_shape(shape: str, *, rgb: tuple[int, int, int], radius: int) -> Image.Image:
    image = Image.new("RGB", (40, 40), "white")
    draw = ImageDraw.Draw(image)
    low, high = 20 - radius, 20 + radius
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=rgb)
    if shape == "square":
        draw.rectangle((low, low, high, high), fill=rgb)
    if shape == "triangle":
        draw.polygon([(20, low), (high, high), (low, high)], fill=rgb)
    if shape in ("bar", "cross"):
        draw.rectangle((low, 17, high, 23), fill=rgb)
    if shape == "cross":
        draw.rectangle((17, low, 23, high), fill=rgb)
    return image
