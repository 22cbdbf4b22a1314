"""Encoded image bytes to uint8 RGB arrays and back.

Shape legend: H height, W width, C = 3 channels (RGB). All arrays are uint8 in [0, 255].
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

ImageFormat = Literal["jpeg", "png", "webp"]
SUFFIX: dict[ImageFormat, str] = {"jpeg": "jpg", "png": "png", "webp": "webp"}
MAX_PIXELS = 2**26  # 8192 x 8192


class ImageError(ValueError):
    """An unusable image. `reason` is one of empty, not_an_image, too_large, truncated, corrupt."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def prepare(data: bytes, *, size: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode, upright by EXIF, alpha on white, centre crop, resize antialiased: uint8 [size, size, 3].

    Gray, palette, CMYK and 16-bit images become RGB; of an animation the first frame is taken. Nothing is
    decoded before the header says that it has at most `max_pixels`. Raises ImageError with the reason.
    """
    image = _to_rgb(_upright(_load(data, max_pixels=max_pixels)))
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    # Crop and resize in one call: a 1 x 20000 image never becomes 64 x 1280000 on the way.
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box))


def encode(image_HWC: np.ndarray, *, format: ImageFormat, quality: int = 95) -> bytes:
    """uint8 [H, W, 3] to bytes. `quality` 1-100 is for jpeg and webp; jpeg keeps full colour (4:4:4)."""
    image_HWC = np.ascontiguousarray(image_HWC)
    if format == "jpeg":
        return bytes(simplejpeg.encode_jpeg(image_HWC, quality=quality, colorspace="RGB", colorsubsampling="444"))
    buffer = io.BytesIO()
    options = {"quality": quality} if format == "webp" else {}
    Image.fromarray(image_HWC).save(buffer, format=format, **options)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    """Bytes of any image to uint8 [H, W, 3], by libjpeg-turbo where it can. Raises ImageError."""
    if simplejpeg.is_jpeg(data):
        try:
            return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB"))
        except ValueError:
            # CMYK or damaged: Pillow converts the one and names the reason for the other.
            pass
    return np.asarray(_to_rgb(_load(data, max_pixels=MAX_PIXELS)))


def contact_sheet(images: list[np.ndarray], *, columns: int) -> bytes:
    """PNG of equally sized uint8 [H, W, 3] images in rows of `columns`, two white pixels apart."""
    height, width, channels = images[0].shape
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, channels), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = 2 + number // columns * (height + 2), 2 + number % columns * (width + 2)
        sheet[top : top + height, left : left + width] = image
    return encode(sheet, format="png")


def _load(data: bytes, *, max_pixels: int) -> Image.Image:
    if not data:
        raise ImageError("empty", "the file has no bytes")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ImageError("not_an_image", f"starts with {data[:16]!r}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_large", str(error)) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise _damaged(error) from None
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width} x {height} is more than {max_pixels} pixels")
    try:
        image.load()
    except Exception as error:  # decoders of damaged data raise anything: OSError, SyntaxError, struct.error, ...
        raise _damaged(error) from None
    return image


def _damaged(error: Exception) -> ImageError:
    reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
    return ImageError(reason, f"{type(error).__name__}: {error}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # A damaged EXIF block says nothing about the pixels, which decoded: take them as they lie.
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of gray, which convert() would clip at 255 rather than scale
        gray = np.asarray(image).astype(np.int64)
        return Image.fromarray((gray.clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
