from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genpipe.data.images import ImageError, contact_sheet, decode, encode, prepare

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def halves(size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Red above blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (0, size[1] // 2, size[0], size[1]))
    return image


def photo(side: int = 64) -> Image.Image:
    """Smooth colour, so that JPEG stays close to it."""
    y, x = np.mgrid[0:side, 0:side] * 255 // (side - 1)
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def reason(data: bytes, **options: Any) -> str:
    with pytest.raises(ImageError) as error:
        prepare(data, size=8, **options)
    assert error.value.detail
    return error.value.reason


def test_the_middle_square_is_taken_and_scaled() -> None:
    wide = Image.new("RGB", (40, 10), RED)
    wide.paste(BLUE, (15, 0, 25, 10))
    assert (prepare(saved(wide), size=10) == BLUE).all()
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    assert (prepare(saved(tall), size=10) == BLUE).all()
    assert (prepare(saved(wide), size=40)[:, 12:-12] == BLUE).all()
    assert prepare(saved(wide), size=5).shape == (5, 5, 3)


def test_an_image_of_the_asked_size_is_untouched() -> None:
    image = photo()
    assert (prepare(saved(image), size=64) == np.asarray(image)).all()


def test_resizing_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = prepare(encode(stripes, format="png"), size=8)
    assert abs(small.astype(int) - 127).max() < 12  # without a filter it would be all 0 or all 255


@pytest.mark.parametrize("orientation, top, left", [(1, RED, None), (3, BLUE, None), (6, None, BLUE), (8, None, RED)])
def test_exif_orientation(orientation: int, top: Any, left: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = prepare(saved(halves(), exif=exif.tobytes()), size=16)
    if top is not None:
        assert tuple(out[2, 8]) == top
    if left is not None:
        assert tuple(out[8, 2]) == left


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_cost_the_image() -> None:
    data = saved(photo(), "JPEG", quality=95)
    broken = b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 16
    segment = b"\xff\xe1" + struct.pack(">H", len(broken) + 2) + broken
    out = prepare(data[:2] + segment + data[2:], size=64)
    assert np.abs(out.astype(int) - np.asarray(photo())).mean() < 3


def test_alpha_lies_on_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert (prepare(saved(clear), size=8) == WHITE).all()
    assert np.abs(prepare(saved(half), size=8).astype(int) - (255, 127, 127)).max() <= 1
    assert (prepare(saved(Image.new("LA", (8, 8), (0, 0))), size=8) == WHITE).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert (prepare(saved(palette), size=8) == RED).all()
    assert (prepare(saved(palette, transparency=0), size=8) == WHITE).all()


def test_gray_cmyk_and_16_bit() -> None:
    assert (prepare(saved(Image.new("L", (8, 8), 100)), size=8) == 100).all()
    assert (prepare(saved(Image.new("1", (8, 8), 1)), size=8) == 255).all()
    cmyk = prepare(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95), size=8)
    assert np.abs(cmyk.astype(int) - RED).max() < 10
    deep = Image.fromarray(np.full((8, 8), 0x8080, np.uint16))
    assert (prepare(saved(deep), size=8) == 0x80).all()


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (prepare(data, size=8) == RED).all()


def test_a_very_thin_image_is_no_memory_bomb() -> None:
    assert prepare(saved(Image.new("RGB", (1, 20_000), RED)), size=64).shape == (64, 64, 3)


def test_reasons() -> None:
    jpeg = saved(photo(), "JPEG")
    assert reason(b"") == "empty"
    assert reason(b"<!DOCTYPE html><html>404</html>") == "not_an_image"
    assert reason(jpeg[: len(jpeg) // 2]) == "truncated"
    assert reason(saved(photo())[:100]) == "truncated"
    assert reason(saved(photo()), max_pixels=64 * 64 - 1) == "too_large"


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("side", [9_000, 12_000, 30_000])
def test_a_pixel_bomb_is_refused_by_its_header(side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(b"\0" * 1000)]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )
    assert reason(data) == "too_large"


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_encode_and_decode(format: Any) -> None:
    image = np.asarray(photo())
    out = decode(encode(image, format=format, quality=95))
    assert out.shape == (64, 64, 3) and out.dtype == np.uint8
    error = np.abs(out.astype(int) - image)
    assert error.max() == 0 if format == "png" else error.mean() < 3


def test_the_fast_jpeg_path_agrees_with_pillow() -> None:
    data = saved(photo(), "JPEG", quality=90)
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode(data) - reference).max() <= 4


def test_decoding_what_only_looks_like_jpeg() -> None:
    cmyk = decode(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - RED).max() < 10
    with pytest.raises(ImageError):
        decode(b"\xff\xd8\xff" + b"\0" * 50)


def test_contact_sheet() -> None:
    red = np.full((4, 4, 3), RED, np.uint8)
    sheet = decode(contact_sheet([red, red, red], columns=2))
    assert sheet.shape == (2 + 2 * 6, 2 + 2 * 6, 3)
    assert tuple(sheet[3, 3]) == RED and tuple(sheet[-4, -4]) == WHITE and tuple(sheet[0, 0]) == WHITE
