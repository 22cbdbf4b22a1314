"""Pictures that people bring, as a system takes them. H height, W width, S the side of a square."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from genpipe.data.image_batches import cut, to_float
from genpipe.data.image_files import ImageError, open_image
from genpipe.data.images import decode
from genpipe.storage import read_file

Picture = str | Path | Image.Image
"""A file, also under s3://, or an image in memory."""

_AS_PNG = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")


def read_picture(picture: Picture, *, setting: str = "picture") -> np.ndarray:
    """uint8 [H, W, 3], upright and in sRGB, on white where it is transparent. Raises ValueError, naming `setting`."""
    try:
        return decode(_encoded(picture, setting=setting))
    except ImageError as error:
        raise ValueError(f"{setting}: {_name(picture)} is no usable picture: {error}") from None


def square(pixels: np.ndarray, *, size: int, device: torch.device) -> Tensor:
    """The middle of a picture [H, W, 3] as fp32 [1, 3, size, size] in [-1, 1]."""
    part = np.array(cut(pixels, height=size, width=size))  # a copy, as what is cut out may be read-only
    return to_float(torch.from_numpy(part).to(device).permute(2, 0, 1)[None])


def read_hole(picture: Picture, mask: Picture | None, *, size: int, device: torch.device) -> Tensor:
    """What of a picture's middle is to be drawn, bool [1, 1, size, size]: where the mask is white.

    Without a mask, where the picture is transparent. Raises ValueError for a mask of another shape, and where there is
    nothing to draw.
    """
    shown = read_picture(picture)
    if mask is None:
        hole = 255 - _alpha(picture)
        missing = "picture: nothing of it is transparent; give a mask, white where it is to be drawn anew"
    else:
        hole = read_picture(mask, setting="mask").mean(2).round().astype(np.uint8)
        missing = f"mask: nothing of {_name(mask)} is white where the picture is seen, so there is nothing to draw"
    if hole.shape != shown.shape[:2]:
        sizes = [f"{width} x {height}" for height, width in (hole.shape, shown.shape[:2])]
        raise ValueError(f"mask: is {sizes[0]} pixels and the picture {sizes[1]}; give it the same size")
    part = np.array(cut(np.repeat(hole[..., None], 3, axis=2), height=size, width=size)[..., 0])
    found = torch.from_numpy(part >= 128).to(device)[None, None]
    if not found.any():
        raise ValueError(missing)
    return found


def png_file(picture: Image.Image) -> bytes:
    """A picture as a PNG, with what its `info` says in the file's text fields."""
    fields, out = PngInfo(), io.BytesIO()
    for name, text in picture.info.items():
        fields.add_text(str(name), text)
    picture.save(out, "png", pnginfo=fields)
    return out.getvalue()


def _alpha(picture: Picture) -> np.ndarray:
    """Opacity uint8 [H, W] of a picture that was read, upright."""
    image = open_image(_encoded(picture, setting="picture"))
    return np.asarray(ImageOps.exif_transpose(image).convert("RGBA").getchannel("A"))


def _encoded(picture: Picture, *, setting: str) -> bytes:
    if isinstance(picture, Image.Image):
        upright = ImageOps.exif_transpose(picture)
        out = io.BytesIO()
        (upright if upright.mode in _AS_PNG else upright.convert("RGB")).save(out, "png")
        return out.getvalue()
    try:
        return read_file(str(picture))
    except OSError as error:
        raise ValueError(f"{setting}: {picture} cannot be read ({error}); correct the path") from None


def _name(picture: Picture) -> str:
    return f"the image of {picture.width} x {picture.height}" if isinstance(picture, Image.Image) else str(picture)
