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
from PIL import Image, UnidentifiedImageError
from pydantic import Field
from torch.nn import functional as F

from genpipe.config import Config

ImageFormat = Literal["jpeg", "png", "webp"]
SUFFIX = {"jpeg": "jpg", "png": "png", "webp": "webp", "gif": "gif", "bmp": "bmp", "tiff": "tif"}
"""Formats that a shard may hold, as Pillow calls them, and the suffix of their members."""
MAX_PIXELS = 2**27  # 11585 x 11585; Pillow itself refuses some 13377 x 13377

Byte = Annotated[int, Field(ge=0, le=255)]
RGB = tuple[Byte, Byte, Byte]
WHITE = (255, 255, 255)

# Of libjpeg-turbo's factors n/8, those that cost less than decoding everything.
_JPEG_EIGHTHS = (1, 2, 4)
# A picture reduced while it is decoded keeps this much more than is asked for: what the rest of the way gives is then
# as close to an exact resize as averaging areas is (tests/data/test_images.py), at less than half the time.
_JPEG_ROOM = 1.3
# What Pillow may open: not all that it knows, of which some run other programs (EPS: Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_ORIENTATION = 0x0112
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


class ImageError(ValueError):
    """An unusable image.

    `reason` is one of empty, not_an_image, too_large, truncated, corrupt, unsupported, aspect; `detail` is for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


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
        return self.orientation >= 5

    @property
    def stored(self) -> tuple[int, int]:
        """Height and width as the bytes lie."""
        return (self.width, self.height) if self.on_its_side else (self.height, self.width)


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """What the header says; nothing is decoded. Raises ImageError, too_large beyond `max_pixels`."""
    height, width, format, orientation = _jpeg_header(data) or _any_header(data)
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width} x {height} is more than {max_pixels} pixels")
    if orientation >= 5:  # on its side
        height, width = width, height
    return Picture(data, format, height, width, orientation)


def check_kept(picture: Picture) -> None:
    """Whether its bytes may be stored as they are, found without decoding. Raises ImageError.

    unsupported: a format that no shard holds; truncated: a JPEG or PNG without its end mark, a download that stopped.
    """
    if picture.format not in SUFFIX:
        raise ImageError("unsupported", f"{picture.format} files are not kept (but {', '.join(SUFFIX)} are)")
    mark = _ENDS.get(picture.format)
    start = max((end for _, end in _ahead(picture.data)), default=0)  # the thumbnail in a JPEG has a mark of its own
    if mark is not None and picture.data.rfind(mark, start) < 0:
        raise ImageError("truncated", f"{len(picture.data)} bytes without the end mark of {picture.format}")


def prepare(
    picture: Picture,
    *,
    resize: CenterCrop | ShorterSide | Buckets,
    size: int,
    background: RGB = WHITE,
    beside: Picture | None = None,
) -> np.ndarray:
    """Decode, upright by EXIF, alpha on `background`, crop in the middle, resize: uint8 [H, W, C].

    Gray, palette, CMYK and 16-bit images become RGB; of an animation the first frame is taken. The resize is
    bicubic (a = -0.5) and antialiased. A JPEG that is to become much smaller is reduced as it is decoded
    (libjpeg's scaled inverse DCT). A conditioning image is cut and resized as the image `beside` is, whatever its own
    resolution. Raises ImageError with the reason.
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
    """Raise ImageError, aspect, for a conditioning image that is no scaled copy of the image's frame.

    Sides may be off by the pixel that rounding costs.
    """
    off = abs(condition.height * image.width - condition.width * image.height)
    if off > image.height + image.width:
        raise ImageError(
            "aspect",
            f"the conditioning image is {condition.width} x {condition.height}, the image {image.width} x "
            f"{image.height}; give it the same aspect",
        )


def fit(
    resize: CenterCrop | ShorterSide | Buckets, *, height: int, width: int, size: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of an image of this size, the (height, width) of the middle part to take, and those to scale it to."""
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
    if not least and simplejpeg.is_jpeg(data):
        try:
            return _turned(np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB")), _exif_orientation(data))
        except ValueError:
            pass  # CMYK or damaged: Pillow converts the one and names the reason for the other
    picture = read_header(data)
    share = least / min(picture.stored) if least else 1.0
    return _turned(_decode(data, size=picture.stored, least=share, background=WHITE)[0], picture.orientation)


def _jpeg_header(data: bytes) -> tuple[int, int, str, int] | None:
    """Height, width, format, orientation as the bytes lie; None unless it is a sound JPEG in a usual color space."""
    if not simplejpeg.is_jpeg(data):
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return height, width, "jpeg", _exif_orientation(data)


def _any_header(data: bytes) -> tuple[int, int, str, int]:
    image = _open(data)
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
        try:
            image_HWC = simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=height, min_width=width)
            if image_HWC.shape[:2] == (height, width):
                return np.asarray(image_HWC), eighths / 8
        except ValueError:
            pass  # CMYK or damaged: Pillow converts the one and names the reason for the other
    image = _load(data, background=background)
    if (image.height, image.width) != size:
        raise ImageError("corrupt", f"decodes to {image.width} x {image.height}, its header says {size[1]} x {size[0]}")
    return np.array(image), 1.0


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


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("empty", "the file has no bytes")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise ImageError("not_an_image", f"starts with {data[:16]!r}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_large", str(error)) from None
    except Exception as error:  # readers of damaged headers raise anything: OSError, RuntimeError, struct.error, ...
        raise _damaged(error) from None


def _load(data: bytes, *, background: RGB) -> Image.Image:
    """The first frame in mode RGB, as the bytes lie."""
    image = _open(data)
    try:
        image.load()
        key = image.info.get("transparency")
        if image.format == "PNG" and image.mode == "L" and key is not None:
            depth = data[24]  # Pillow brings 1, 2 and 4 bits of gray to 8, but not the level that is transparent
            image.info["transparency"] = key * 255 // (2**depth - 1)
        return _to_rgb(image, background)
    except Exception as error:  # decoders of damaged data raise anything: OSError, SyntaxError, struct.error, ...
        raise _damaged(error) from None


def _damaged(error: Exception) -> ImageError:
    reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
    return ImageError(reason, f"{type(error).__name__}: {error}")


def _exif_orientation(data: bytes) -> int:
    """The orientation that a JPEG's EXIF segment gives; 1 where there is none or it is damaged.

    It stands before all tables (EXIF 2.32, section 4.5.4): what looks like one behind them is not looked for, so that
    most files tell by their first bytes that they have none (`pixels.py`).
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
    """The orientation of an image that is no JPEG; 1 where there is none or its EXIF block is damaged."""
    if image.format == "PNG" and "exif" not in image.info and (late := _png_exif(data)):
        image.info["exif"] = late
    try:
        return _valid(Image.Image.getexif(image).get(_ORIENTATION))  # PNG's own method decodes the image first
    except Exception:
        return 1


def _png_exif(data: bytes) -> bytes:
    """The EXIF block of a PNG, which may stand behind the pixels; empty if it has none."""
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


def _to_rgb(image: Image.Image, background: RGB) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of gray, which convert() would clip at 255 rather than scale
        deep, key = np.asarray(image).astype(np.int64), image.info.get("transparency")
        image = Image.fromarray((deep.clip(0, 65535) // 257).astype(np.uint8))
        if key is not None:
            image.putalpha(Image.fromarray(deep != key).convert("L"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(below, image).convert("RGB")
    return image.convert("RGB")
