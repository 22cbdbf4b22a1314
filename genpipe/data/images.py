"""Encoded image bytes to uint8 RGB arrays and back.

Shape legend: H height, W width, C = 3 channels (RGB). All arrays are uint8 in [0, 255] unless said otherwise.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image
from pydantic import Field
from torch.nn import functional as F

from genpipe.config import Config
from genpipe.data.color import to_srgb
from genpipe.data.image_files import RGB, WHITE, ImageError, load_rgb, open_image

ImageFormat = Literal["jpeg", "png", "webp"]
SUFFIX = {"jpeg": "jpg", "png": "png", "webp": "webp", "gif": "gif", "bmp": "bmp", "tiff": "tif"}
"""Formats that a shard may hold, as Pillow calls them, and the suffix of their members."""
MAX_PIXELS = 2**27  # 11585 x 11585; Pillow itself refuses some 13377 x 13377

# Of libjpeg-turbo's factors n/8, those that cost less than decoding everything.
_JPEG_EIGHTHS = (1, 2, 4)
# A picture reduced while it is decoded keeps this much more than is asked for: what the rest of the way gives is then
# as close to an exact resize as averaging areas is (tests/data/test_images.py), at less than half the time.
_JPEG_ROOM = 1.3
_ORIENTATION = 0x0112
_ICC = b"ICC_PROFILE\0"
# Markers that may stand before a JPEG's tables: fill bytes, application segments and comments.
_JPEG_AHEAD = frozenset(bytes([marker]) for marker in (0xFF, *range(0xE0, 0xF0), 0xFE))
_ENDS = {"jpeg": b"\xff\xd9", "png": b"IEND"}


class CenterCrop(Config):
    """The largest square in the middle, `image_size` on each side."""

    kind: Literal["center_crop"] = "center_crop"


class ShorterSide(Config):
    """The shorter side becomes `image_size`, so that training may crop along the longer one."""

    kind: Literal["shorter_side"]
    max_aspect: float = Field(2.0, ge=1, le=16, description="longer images are cut in the middle to this aspect")


class Buckets(Config):
    """The rectangle of about `image_size`^2 pixels that is nearest in aspect, after the least cut."""

    kind: Literal["buckets"]
    step: int = Field(32, ge=1, description="sides are multiples of this")
    max_aspect: float = Field(2.0, ge=1, le=16, description="longer side / shorter side of the longest bucket")


class Keep(Config):
    """The source's bytes, untouched; sizes and crops are left to training. Only their header is looked at."""

    kind: Literal["keep"]


ResizeConfig = Annotated[CenterCrop | ShorterSide | Buckets | Keep, Field(discriminator="kind")]


@dataclass(frozen=True)
class Picture:
    """An encoded image whose header was read. `height` and `width` are those of the upright image."""

    data: bytes
    format: str
    height: int
    width: int
    orientation: int  # EXIF's, 1 to 8

    @property
    def on_its_side(self) -> bool:
        """Whether the stored pixels are turned by 90 degrees."""
        return self.orientation >= 5

    @property
    def stored(self) -> tuple[int, int]:
        """Height and width as the bytes lie."""
        return (self.width, self.height) if self.on_its_side else (self.height, self.width)


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read the header without decoding anything. Raises ImageError: too_large beyond `max_pixels`."""
    height, width, format, orientation = _jpeg_header(data) or _any_header(data)
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width} x {height} is more than {max_pixels} pixels")
    if orientation >= 5:  # on its side
        height, width = width, height
    return Picture(data, format, height, width, orientation)


def check_kept(picture: Picture) -> None:
    """Check, without decoding, that an image's bytes may be stored as they are. Raises ImageError.

    unsupported: a format that no shard holds; truncated: a JPEG or PNG without its end marker, as an aborted download.
    """
    if picture.format not in SUFFIX:
        raise ImageError("unsupported", f"{picture.format} files are not kept (but {', '.join(SUFFIX)} are)")
    mark = _ENDS.get(picture.format)
    start = max((end for _, end in _ahead(picture.data)), default=0)  # the thumbnail in a JPEG has a mark of its own
    if mark is not None and picture.data.rfind(mark, start) < 0:
        raise ImageError("truncated", f"{len(picture.data)} bytes without the end marker of {picture.format}")


def prepare(
    picture: Picture,
    *,
    resize: CenterCrop | ShorterSide | Buckets,
    size: int,
    background: RGB = WHITE,
    beside: Picture | None = None,
) -> np.ndarray:
    """Decode, orient by EXIF, composite on `background`, center-crop and resize: uint8 [H, W, C].

    All modes and depths become sRGB; of an animation the first frame is taken. The resize is bicubic (a = -0.5) and
    antialiased. A JPEG that is to become much smaller is reduced as it is decoded (libjpeg's scaled inverse DCT). A
    conditioning image is cropped and resized as the image `beside` is, whatever its own resolution. Raises ImageError.
    """
    like = beside or picture
    (rows, columns), out = fit(resize, height=like.height, width=like.width, size=size)
    span = (rows * picture.height / like.height, columns * picture.width / like.width)
    if picture.on_its_side:  # the crop is central, so that it can be taken before the image is turned
        span, out = span[::-1], out[::-1]
    least = max(_JPEG_ROOM * goal / part for goal, part in zip(out, span, strict=True))
    image_HWC, scale = _decode(picture.data, size=picture.stored, least=least, background=background)
    return _turned(_resample(image_HWC, size=picture.stored, scale=scale, span=span, out=out), picture.orientation)


def check_same_aspect(condition: Picture, image: Picture) -> None:
    """Raise ImageError, condition_aspect, unless a conditioning image has the aspect of its image.

    Sides may be off by one pixel of rounding.
    """
    off = abs(condition.height * image.width - condition.width * image.height)
    if off > image.height + image.width:
        raise ImageError(
            "condition_aspect",
            f"the conditioning image is {condition.width} x {condition.height}, the image {image.width} x "
            f"{image.height}; give it the same aspect",
        )


def fit(
    resize: CenterCrop | ShorterSide | Buckets, *, height: int, width: int, size: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The (height, width) of the central region to take from an image of this size, and those to scale it to."""
    if isinstance(resize, CenterCrop):
        side = min(height, width)
        return (side, side), (size, size)
    if isinstance(resize, ShorterSide):
        longest = max(1, math.floor(min(height, width) * resize.max_aspect))
        height, width = min(height, longest), min(width, longest)
        scale = size / min(height, width)
        return (height, width), (max(size, round(height * scale)), max(size, round(width * scale)))
    sides = buckets(resize, size=size)
    goal = min(sides, key=lambda side: abs(math.log(side[0] / side[1] / (height / width))))
    scale = max(goal[0] / height, goal[1] / width)
    return (min(height, max(1, round(goal[0] / scale))), min(width, max(1, round(goal[1] / scale)))), goal


@lru_cache
def buckets(resize: Buckets, *, size: int) -> tuple[tuple[int, int], ...]:
    """The (height, width) of every bucket, tall to wide: of each aspect the largest within size^2 pixels.

    Sides are multiples of `step`. Raises ValueError if `size` is not one.
    """
    step = resize.step
    if size % step:
        raise ValueError(f"image_size {size} is not a multiple of resize.step {step}; change one")
    longest = [(side, size * size // side // step * step) for side in range(size, size * size // step + 1, step)]
    wide = [(short, side) for side, short in longest if short and side / short <= resize.max_aspect]
    # Of buckets with the same shorter side the longest holds all of the others' pixels and more.
    widest = {short: side for short, side in wide}
    found = {(short, side) for short, side in widest.items()} | {(side, short) for short, side in widest.items()}
    return tuple(sorted(found, reverse=True))


def encode(image_HWC: np.ndarray, *, format: ImageFormat, quality: int = 95) -> bytes:
    """uint8 [H, W, 3] to bytes. `quality` 1-100 is for jpeg and webp; jpeg keeps full color (4:4:4)."""
    image_HWC = np.ascontiguousarray(image_HWC)
    if format == "jpeg":
        return bytes(simplejpeg.encode_jpeg(image_HWC, quality=quality, colorspace="RGB", colorsubsampling="444"))
    buffer = io.BytesIO()
    options = {"quality": quality} if format == "webp" else {}
    Image.fromarray(image_HWC).save(buffer, format=format, **options)
    return buffer.getvalue()


def decode(data: bytes, *, least: int = 0) -> np.ndarray:
    """Bytes of any image to uint8 [H, W, 3], upright, alpha on white. Raises ImageError.

    With `least`, a JPEG may come reduced, to no fewer pixels than that on its shorter side.
    """
    if not least and simplejpeg.is_jpeg(data) and (image_HWC := _decode_jpeg(data)) is not None:
        return _turned(image_HWC, _exif_orientation(data))
    picture = read_header(data)
    share = least / min(picture.stored) if least else 1.0
    return _turned(_decode(data, size=picture.stored, least=share, background=WHITE)[0], picture.orientation)


def _jpeg_header(data: bytes) -> tuple[int, int, str, int] | None:
    """Height, width, format, orientation as the bytes lie; None unless it is an intact JPEG in a common color space."""
    if not simplejpeg.is_jpeg(data):
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return height, width, "jpeg", _exif_orientation(data)


def _any_header(data: bytes) -> tuple[int, int, str, int]:
    image = open_image(data)
    format = {"MPO": "JPEG"}.get(str(image.format), str(image.format)).lower()
    if format == "tiff":  # whose size Pillow gives upright, and whose pixels it turns
        return image.height, image.width, format, 1
    orientation = _exif_orientation(data) if format == "jpeg" else _orientation_of(image, data)
    return image.height, image.width, format, orientation


def _decode(data: bytes, *, size: tuple[int, int], least: float, background: RGB) -> tuple[np.ndarray, float]:
    """uint8 [H, W, 3] as the bytes lie, and its scale: less than 1, but no less than `least`, if a JPEG was reduced."""
    if simplejpeg.is_jpeg(data):
        eighths = next((n for n in _JPEG_EIGHTHS if n / 8 >= least), 8)
        height, width = (-(-side * eighths // 8) for side in size)
        image_HWC = _decode_jpeg(data, min_height=height, min_width=width)
        if image_HWC is not None and image_HWC.shape[:2] == (height, width):
            return image_HWC, eighths / 8
    image = load_rgb(data, background=background)
    if (image.height, image.width) != size:
        raise ImageError("corrupt", f"decodes to {image.width} x {image.height}, its header says {size[1]} x {size[0]}")
    return np.array(image), 1.0


def _decode_jpeg(data: bytes, **least: int) -> np.ndarray | None:
    """uint8 [H, W, 3] in sRGB; None for CMYK, which Pillow converts, and for damage, for which it names the reason."""
    try:
        image_HWC = np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB", **least))
    except ValueError:
        return None
    profile = _jpeg_profile(data)
    return image_HWC if profile is None else np.array(to_srgb(Image.fromarray(image_HWC), profile))


def _jpeg_profile(data: bytes) -> bytes | None:
    """The ICC profile of a JPEG, out of its segments (ICC.1:2022, annex B.4)."""
    chunks = {}
    for start, end in _ahead(data):
        if data[start + 1 : start + 2] == b"\xe2" and data[start + 4 : start + 16] == _ICC:
            chunks[data[start + 16]] = data[start + 18 : end]
    return b"".join(chunks[number] for number in sorted(chunks)) if chunks else None


def _resample(
    image_HWC: np.ndarray, *, size: tuple[int, int], scale: float, span: tuple[float, float], out: tuple[int, int]
) -> np.ndarray:
    """The middle `span` of an image of `size`, which is given at `scale`, as uint8 [*out, C].

    A reduced image has a fraction of a pixel at its end (its sides are rounded up), which must not be stretched.
    """
    top, left = (math.ceil((whole - part) * scale / 2 - 0.5) for whole, part in zip(size, span, strict=True))  # nearest
    spans = [part * scale for part in span]
    rows, columns = (math.ceil(part) for part in spans)
    image_HWC = image_HWC[top : top + rows, left : left + columns]
    if scale == 1 and tuple(span) == tuple(out):
        return image_HWC
    # The next float up, so that rounding never costs the last pixel.
    factors = tuple(math.nextafter(goal / part, math.inf) for goal, part in zip(out, spans, strict=True))
    image_NCHW = torch.from_numpy(image_HWC).permute(2, 0, 1)[None]
    resized = F.interpolate(
        image_NCHW, scale_factor=factors, mode="bicubic", antialias=True, recompute_scale_factor=False
    )
    return np.asarray(resized[0].permute(1, 2, 0).numpy())


def _exif_orientation(data: bytes) -> int:
    """The orientation that a JPEG's EXIF segment gives; 1 where there is none or it is damaged.

    It precedes all tables (EXIF 2.32, section 4.5.4). Nothing behind them is searched, so that the first bytes of most
    files tell that they have none (`image_batches.py`).
    """
    for start, end in _ahead(data):
        if data[start : start + 2] == b"\xff\xe1" and data[start + 4 : start + 10] == b"Exif\0\0":
            exif = Image.Exif()
            try:
                exif.load(data[start + 4 : end])
                return _valid(exif.get(_ORIENTATION))
            except Exception:  # Pillow's reader of damaged EXIF raises anything
                return 1
    return 1


def _ahead(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the segments of a JPEG that stand before its tables begin and end."""
    at = 2
    while data[at : at + 1] == b"\xff" and (marker := data[at + 1 : at + 2]) in _JPEG_AHEAD:
        if marker == b"\xff":  # a fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield at, end
        at = end


def _orientation_of(image: Image.Image, data: bytes) -> int:
    """The orientation of an image other than a JPEG; 1 where there is none or its EXIF block is damaged."""
    if image.format == "PNG" and "exif" not in image.info and (late := _png_exif(data)):
        image.info["exif"] = late
    try:
        return _valid(Image.Image.getexif(image).get(_ORIENTATION))  # PNG's own method decodes the image first
    except Exception:
        return 1


def _png_exif(data: bytes) -> bytes:
    """The EXIF block of a PNG, which may follow the pixels; empty if it has none."""
    at = 8
    while (kind := data[at + 4 : at + 8]) not in (b"", b"eXIf"):
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return data[at + 8 : at + 8 + int.from_bytes(data[at : at + 4], "big")] if kind else b""


def _valid(orientation: object) -> int:
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _turned(image_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """The upright image (EXIF 2.32, section 4.6.4 A, Orientation)."""
    if orientation >= 5:
        image_HWC = image_HWC.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image_HWC = image_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        image_HWC = image_HWC[:, ::-1]
    return image_HWC
