"""Four colored quadrants, in every suffix, mode and depth: they come out right, or as a reject that says what to do."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from genpipe.data.images import CenterCrop, ImageError, decode, prepare, read_header
from genpipe.data.sources.listing import IMAGE_SUFFIXES

COLORS = np.array([[[220, 40, 30], [40, 200, 60]], [[50, 70, 210], [240, 220, 80]]], np.uint8)
RED_GREEN_BLUE_YELLOW = COLORS.repeat(16, axis=0).repeat(16, axis=1)
GRAYS = np.array([[20, 90], [160, 230]], np.uint8).repeat(16, axis=0).repeat(16, axis=1)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def shows(data: bytes, expected: np.ndarray = RED_GREEN_BLUE_YELLOW, *, off: int = 0) -> bool:
    """Whether both ways of reading it give these pixels, with the middles of the quadrants off by at most `off`."""
    if expected.ndim == 2:
        expected = expected[..., None].repeat(3, axis=2)
    ways = [decode(data), prepare(read_header(data), resize=CenterCrop(), size=32)]
    middles = slice(4, None, 8)
    return all(
        (np.abs(found.astype(int) - expected)[middles, middles] <= off).all() and found.shape == expected.shape
        for found in ways
    )


def refusal(data: bytes) -> str:
    with pytest.raises(ImageError) as error:
        prepare(read_header(data), resize=CenterCrop(), size=32)
    assert error.value.reason == "unsupported" and "convert" in error.value.detail
    return error.value.detail


FORMATS = {
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".j2k", ".jp2"),
    "PPM": (".ppm", ".pnm"),
    "AVIF": (".avif",),
}
GRAY_FORMATS = {"PPM": (".pgm", ".pbm")}
UNSUPPORTED = {
    "HEIC": (".heic", ".heif"),
    "JPEG XL": (".jxl",),
}


def test_every_suffix_on_the_list_is_covered() -> None:
    covered = [
        suffix for table in (FORMATS, GRAY_FORMATS, UNSUPPORTED) for suffixes in table.values() for suffix in suffixes
    ]
    assert sorted(covered) == sorted(IMAGE_SUFFIXES)


@pytest.mark.parametrize("format", FORMATS)
def test_quadrants_of_every_format(format: str) -> None:
    options = {"quality": 95, "subsampling": 0} if format in ("JPEG", "AVIF") else {"lossless": True}
    if format == "AVIF":
        options = {"quality": 95, "subsampling": "4:4:4"}
    data = saved(Image.fromarray(RED_GREEN_BLUE_YELLOW), format, **({} if format == "BMP" else options))
    assert shows(data, off={"JPEG": 4, "AVIF": 4, "JPEG2000": 1}.get(format, 0))


def test_quadrants_of_the_gray_formats() -> None:
    gray = Image.fromarray(GRAYS)
    assert shows(saved(gray, "PPM"), GRAYS)
    bits = Image.fromarray(GRAYS > 100)
    assert shows(saved(bits, "PPM"), (GRAYS > 100) * np.uint8(255))


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


@pytest.mark.parametrize(
    "data, what",
    [
        (box(b"ftyp", b"heic\0\0\0\0mif1heic") + box(b"meta", b""), "HEIC"),
        (box(b"ftyp", b"mif1\0\0\0\0mif1heic") + box(b"meta", b""), "HEIC"),
        (b"\xff\x0a" + bytes(64), "JPEG XL"),
        (box(b"JXL ", b"\r\n\x87\n") + bytes(64), "JPEG XL"),
        (b"8BPS" + bytes(64), "Photoshop"),
        (b"\n <svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<?xml version='1.0'?>\n<svg/>", "SVG"),
        (b"%PDF-1.7" + bytes(64), "PDF"),
    ],
)
def test_what_is_an_image_that_nothing_here_reads_says_so(data: bytes, what: str) -> None:
    assert what in refusal(data)


def rgba() -> Image.Image:
    image = Image.fromarray(RED_GREEN_BLUE_YELLOW).convert("RGBA")
    image.putpixel((0, 0), (0, 0, 0, 0))
    return image


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"])
def test_modes_of_tiff(mode: str) -> None:
    color = Image.fromarray(RED_GREEN_BLUE_YELLOW)
    gray = Image.fromarray(GRAYS)
    if mode == "PA":  # which TIFF does not hold, but PNG as a palette with transparency
        palette = color.quantize(4)
        assert shows(saved(palette, "PNG", transparency=bytes([255, 255, 255, 254])), off=2)
    elif mode == "1":
        assert shows(saved(Image.fromarray(GRAYS > 100), "TIFF"), (GRAYS > 100) * np.uint8(255))
    elif mode in ("L", "LA"):
        assert shows(saved(gray.convert(mode), "TIFF"), GRAYS)
    elif mode == "I;16":
        assert shows(saved(Image.fromarray(GRAYS.astype(np.uint16) * 257), "TIFF"), GRAYS)
    elif mode == "LAB":
        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        lab = ImageCms.applyTransform(color, to_lab)
        assert lab is not None
        assert shows(saved(lab, "TIFF"), off=12)  # a step of 8 bits in Lab is that much of a saturated blue
    else:
        image = color.quantize(4) if mode == "P" else color.convert(mode)
        assert shows(saved(image, "TIFF"), off=3 if mode == "YCbCr" else 0)


def test_transparent_pixels_lie_on_the_background() -> None:
    for mode in ("RGBA", "LA"):
        data = saved(rgba().convert(mode), "PNG")
        pixels = prepare(read_header(data), resize=CenterCrop(), size=32, background=(1, 2, 3))
        assert pixels[0, 0].tolist() == [1, 2, 3] and pixels[0, 1].tolist() != [1, 2, 3]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_unknown_range_are_refused_by_their_header(dtype: type) -> None:
    data = saved(Image.fromarray((GRAYS / 255).astype(dtype)), "TIFF")
    with pytest.raises(ImageError, match=r"unsupported.*convert it to 8 or 16 bits"):
        read_header(data)


def test_twelve_bits_in_sixteen() -> None:
    """Scanners and microscopes store them: by their tags they are scaled, without those refused, and never black."""
    twelve = Image.fromarray(GRAYS.astype(np.uint16) * 16)
    assert shows(saved(twelve, "TIFF", tiffinfo={281: 4095}), GRAYS, off=1)
    for data in (saved(twelve, "TIFF"), saved(twelve, "PNG")):
        assert "12 bits" in refusal(data).replace("\n", " ")
    assert shows(saved(Image.fromarray(np.zeros((32, 32), np.uint16)), "PNG"), np.zeros((32, 32), np.uint8))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_an_animated_png_gives_its_first_frame_and_not_the_hidden_one() -> None:
    frames = [Image.fromarray(RED_GREEN_BLUE_YELLOW), Image.new("RGB", (32, 32), "white")]
    hidden = Image.new("RGB", (32, 32), "black")
    data = saved(hidden, "PNG", save_all=True, append_images=frames, default_image=True)
    assert shows(data)
    assert shows(saved(frames[0], "PNG", save_all=True, append_images=frames[1:]))


def test_the_gamma_of_a_png() -> None:
    """Linear light in 8 bits, as renderers write it, is shown as browsers do."""
    plain = saved(Image.fromarray(GRAYS), "PNG")
    linear = plain[:33] + chunk(b"gAMA", struct.pack(">I", 100_000)) + plain[33:]
    assert shows(linear, np.round(255 * (GRAYS / 255) ** (1 / 2.2)).astype(np.uint8))
    assert shows(plain[:33] + chunk(b"gAMA", struct.pack(">I", 45_455)) + plain[33:], GRAYS)


def test_a_thumbnail_ahead_of_the_picture_is_refused() -> None:
    data = saved(Image.fromarray(RED_GREEN_BLUE_YELLOW), "TIFF", tiffinfo={254: 1})
    assert "thumbnail" in refusal(data)
