"""Color management: pixels with an ICC profile (ICC.1:2022) to sRGB (IEC 61966-2-1)."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE  # the cache is not for several threads
_SAME = 3
"""Levels by which a profile may differ from sRGB and still be taken for it: many copies are rounded a little."""

_SRGB_GAMMA = 1 / 2.2


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image without alpha, of 8 bits, as RGB in sRGB.

    `profile` is an ICC profile: RGB, gray or CMYK; without one, and where it is damaged or for another kind of
    pixels, they are taken for sRGB, as browsers do. Colors are mapped relatively, with black point compensation.
    """
    if image.mode == "LAB":
        return _applied(_from_lab(), image)
    mode = _MODES.get(profile[16:20]) if profile else None
    if mode is not None and profile is not None:
        pixels = _in_mode(image, mode)
        transform = _transform(profile, mode) if pixels is not None else None
        if pixels is not None and transform is not None:
            return _applied(transform, pixels)
    return image.convert("RGB")


def encoded_with(image: Image.Image, gamma: float) -> Image.Image:
    """An image whose samples are light to the power of `gamma` (PNG's gAMA chunk), in the usual encoding."""
    exponent = _SRGB_GAMMA / gamma
    if abs(exponent - 1) < 0.02 or image.mode not in ("L", "RGB"):
        return image
    curve = [round(255 * (level / 255) ** exponent) for level in range(256)]
    return image.point(curve * len(image.getbands()))


def _in_mode(image: Image.Image, mode: str) -> Image.Image | None:
    """The image in the mode of a profile, None if the profile must be for something else."""
    if image.mode == mode:
        return image
    if "CMYK" in (image.mode, mode):
        return None
    if mode == "L" and image.mode != "1":
        red, green, blue = (np.asarray(band) for band in image.convert("RGB").split())
        return image.convert("L") if (red == green).all() and (green == blue).all() else None
    return image.convert(mode)


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None, "it is not done in place"
    return converted


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None for a profile that is damaged, or as good as sRGB."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=_FLAGS,
        )
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)  # black and white among them
    grid = levels[:, None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 1, 3)
    probe = Image.fromarray(grid)
    change = np.asarray(_applied(transform, probe)).astype(int) - np.asarray(probe.convert("RGB"))
    return transform if np.abs(change).max() > _SAME else None


@lru_cache(maxsize=1)
def _from_lab() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB", flags=ImageCms.Flags.NOCACHE)
