"""Image files opened by Pillow, as 8 bits of sRGB: every mode, depth and profile is converted or refused."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import Field

from genpipe.data.color import encoded_with, to_srgb

Byte = Annotated[int, Field(ge=0, le=255)]
RGB = tuple[Byte, Byte, Byte]
WHITE = (255, 255, 255)

# What Pillow may open: not everything that it knows, as some formats run other programs (EPS: Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_BITS, _LARGEST, _SUBFILE, _DNG = 258, 281, 254, 50706  # tags of TIFF
# Files, by their first bytes, that are images but are not supported.
_UNREADABLE = (
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL file"),
    (b"\xff\x0a", "a JPEG XL file"),
    (b"8BPS", "a Photoshop file"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript file"),
    (b"<svg", "an SVG drawing"),
    (b"\x76\x2f\x31\x01", "an OpenEXR file"),
)
_READABLE = (
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"RIFF", "WebP"),
    (b"BM", "BMP"),
    (b"GIF8", "GIF"),
)
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
_CONVERT = "which is not read; convert it to JPEG or PNG"


class ImageError(ValueError):
    """An unusable image.

    `reason` is one of empty, not_an_image, too_large, truncated, corrupt, unsupported, condition_aspect; `detail` is
    for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def open_image(data: bytes) -> Image.Image:
    """Open an image without decoding it. Raises ImageError if it is none, or cannot be converted correctly."""
    if not data:
        raise ImageError("empty", "the file has no bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_large", str(error)) from None
    except Exception as error:  # readers of damaged headers raise anything: OSError, RuntimeError, struct.error, ...
        raise _damaged(error) from None
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # of PPM Pillow makes 16 bits in mode I
        numbers = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise ImageError("unsupported", f"{numbers} pixels, whose range is unknown; convert it to 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})
    if _DNG in tags or (isinstance(tags.get(_SUBFILE), int) and tags[_SUBFILE] & 1):
        raise ImageError("unsupported", f"a camera raw file or one that begins with its thumbnail, {_CONVERT}")
    return image


def _unidentified(data: bytes) -> ImageError:
    """Why Pillow does not know what this is: another kind of file, or a kind of image that it does not read."""
    start, brand = data[:4096].lstrip(), data[8:12] if data[4:8] == b"ftyp" else b""
    kinds = [kind for mark, kind in _UNREADABLE if data.startswith(mark) or start.startswith(mark)]
    if brand in _HEIF_BRANDS:
        kinds = ["a HEIC (HEIF) file"]
    elif start.startswith(b"<?xml") and b"<svg" in start:
        kinds = ["an SVG drawing"]
    if kinds:
        return ImageError("unsupported", f"{kinds[0]}, {_CONVERT}")
    known = ["AVIF"] if brand in (b"avif", b"avis") else [kind for mark, kind in _READABLE if data.startswith(mark)]
    if known:
        what = f"a {known[0]} file that is damaged, or whose pixels are of a kind that is not read"
        return ImageError("corrupt", f"{what}; replace it with an intact copy, or convert it to an 8-bit PNG")
    return ImageError("not_an_image", f"starts with {data[:16]!r}")


def load_rgb(data: bytes, *, background: RGB) -> Image.Image:
    """The first frame in mode RGB, as the bytes lie."""
    image = open_image(data)
    try:
        if getattr(image, "default_image", False):  # of an animated PNG, which only readers of still ones show
            image.seek(1)
        image.load()
        key = image.info.get("transparency")
        if image.format == "PNG" and image.mode == "L" and key is not None:
            depth = data[24]  # Pillow brings 1, 2 and 4 bits of gray to 8, but not the level that is transparent
            image.info["transparency"] = key * 255 // (2**depth - 1)
        return _to_rgb(image, background)
    except ImageError:
        raise
    except Exception as error:  # decoders of damaged data raise anything: OSError, SyntaxError, struct.error, ...
        raise _damaged(error) from None


def _damaged(error: Exception) -> ImageError:
    reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
    return ImageError(reason, f"{type(error).__name__}: {error}")


def _to_rgb(image: Image.Image, background: RGB) -> Image.Image:
    """8 bits of sRGB, laid on `background` where the image is transparent. Raises ImageError."""
    profile, gamma = image.info.get("icc_profile"), image.info.get("gamma")
    alpha = None
    if image.mode.startswith("I"):
        image, alpha = _eight_bits(image)
    elif image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        is_gray = image.mode in ("L", "LA")
        with_alpha = image.convert("RGBA")
        alpha, image = with_alpha.getchannel("A"), with_alpha.convert("L" if is_gray else "RGB")
    if image.mode == "P":
        image = image.convert("RGB")
    if gamma and not profile and image.format in ("PNG", None):
        image = encoded_with(image, gamma)
    image = to_srgb(image, profile)
    return image if alpha is None else Image.composite(image, Image.new("RGB", image.size, background), alpha)


def _eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16 bits of gray as 8, which convert() would clip at 255 rather than scale; and the alpha of a transparent level.

    Raises ImageError for fewer bits stored in 16 without a tag that gives their range.
    """
    deep, key = np.asarray(image).astype(np.int64), image.info.get("transparency")
    full = _largest(getattr(image, "tag_v2", {}))
    peak = int(deep.max(initial=0))
    if 0 < peak < 4096 and full > 4095:
        raise ImageError(
            "unsupported",
            f"its 16-bit pixels reach {peak} only, as 12 bits in 16 do; convert it to 8 bits, or scale it to 65535",
        )
    gray = Image.fromarray((deep.clip(0, full) * 255 // full).astype(np.uint8))
    return gray, None if key is None else Image.fromarray(deep != key).convert("L")


def _largest(tags: Mapping[int, Any]) -> int:
    """The value of white in a TIFF of one channel of up to 16 bits; that of 16 bits for anything else."""
    found: Any
    of_tag: dict[int, Callable[[int], int]] = {_LARGEST: lambda value: value, _BITS: lambda bits: 2**bits - 1}
    for tag, value_of in of_tag.items():
        found = tags.get(tag)
        found = found[0] if isinstance(found, tuple) and found else found
        if isinstance(found, int) and 0 < value_of(found) <= 65535:
            return value_of(found)
    return 65535
