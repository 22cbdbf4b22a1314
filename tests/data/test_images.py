from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from genpipe.data import images
from genpipe.data.images import (
    Buckets,
    CenterCrop,
    ImageError,
    Picture,
    ShorterSide,
    buckets,
    check_kept,
    decode,
    encode,
    fit,
    read_header,
)

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def prepare(data: bytes, *, size: int, max_pixels: int = 2**26, **options: Any) -> np.ndarray:
    """The stage's way: header first, then pixels; a center crop unless told otherwise."""
    picture = read_header(data, max_pixels=max_pixels)
    return images.prepare(picture, size=size, **{"resize": CenterCrop(), **options})


def halves(size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Red above blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (0, size[1] // 2, size[0], size[1]))
    return image


def photo(side: int = 64) -> Image.Image:
    """Smooth color, so that JPEG stays close to it."""
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


def turned(format: str, orientation: int, size: tuple[int, int] = (48, 32)) -> bytes:
    """A picture whose four corners differ, with an EXIF orientation."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (0, size[1] // 2, size[0], size[1]))
    image.paste(WHITE, (0, 0, size[0] // 2, size[1] // 2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a maker, so that the tag is not the first"
    options = {"quality": 95, "subsampling": 0 if format == "JPEG" else "4:4:4"}
    options = {"JPEG": options, "AVIF": options, "WEBP": {"lossless": True}}.get(format, {})
    return saved(image, format, exif=exif if format == "TIFF" else exif.tobytes(), **options)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(format: str, orientation: int) -> None:
    data = turned(format, orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    header = read_header(data)
    assert (header.width, header.height) == upright.size
    assert np.abs(decode(data).astype(int) - np.asarray(upright)).max() <= 4
    for resize in (CenterCrop(), ShorterSide(kind="shorter_side")):
        out = prepare(data, size=16, resize=resize)
        span, shape = fit(resize, height=upright.height, width=upright.width, size=16)
        left, top = (upright.width - span[1]) // 2, (upright.height - span[0]) // 2
        box = (left, top, left + span[1], top + span[0])
        reference = np.asarray(upright.resize(shape[::-1], Image.Resampling.BICUBIC, box=box)).astype(int)
        assert np.abs(out - reference).mean() < 3, orientation


def chunks(png: bytes) -> list[bytes]:
    """Those of a PNG, each as it lies: length, name, content, checksum."""
    found, at = [], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        found.append(png[at:end])
        at = end
    return found


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def test_the_exif_block_of_a_png_may_stand_behind_its_pixels() -> None:
    plain, marked = saved(photo()), chunks(turned("PNG", 6))
    (exif,) = [piece for piece in marked if piece[4:8] == b"eXIf"]
    assert read_header(plain[:-12] + exif + plain[-12:]).orientation == 6


def test_an_orientation_that_is_none_is_ignored() -> None:
    for orientation in (0, 9, 60000):
        assert read_header(turned("JPEG", orientation)).orientation == 1


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
    assert (prepare(saved(clear), size=8, background=(1, 2, 3)) == (1, 2, 3)).all()
    assert np.abs(prepare(saved(half), size=8, background=BLUE).astype(int) - (128, 0, 127)).max() <= 1


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_level_of_gray_may_be_transparent(depth: int) -> None:
    """A PNG of two levels, the brighter one in its tRNS chunk."""
    top = 2**depth - 1
    rows = np.repeat([[top - 1], [top]], 8, axis=1).repeat(4, axis=0)
    bits = (rows[..., None] >> np.arange(depth)[::-1] & 1).astype(np.uint8).reshape(8, -1)
    packed = b"".join(b"\0" + bytes(row) for row in np.packbits(bits, axis=1))
    pieces = [chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, 0, 0, 0, 0)), chunk(b"tRNS", struct.pack(">H", top))]
    data = b"\x89PNG\r\n\x1a\n" + b"".join([*pieces, chunk(b"IDAT", zlib.compress(packed)), chunk(b"IEND", b"")])
    out = prepare(data, size=8, background=BLUE)
    assert (out[4:] == BLUE).all()
    assert (out[:4] == (top - 1) * 255 // top).all()


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


def natural(height: int, width: int, seed: int = 0) -> Image.Image:
    """Color noise whose amplitude falls as 1 / frequency, as in photographs (Field 1987), with sharp edges on it."""
    rng = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    decay = 1 / np.maximum(np.hypot(rows, columns), 1 / max(height, width))
    shared, own = rng.normal(size=(height, width)), rng.normal(size=(height, width, 3))
    noise = [np.fft.irfft2(np.fft.rfft2(shared + 0.5 * own[..., c]) * decay, (height, width)) for c in range(3)]
    pixels = np.stack([128 + 48 * (plane - plane.mean()) / plane.std() for plane in noise], axis=-1)
    pixels[height // 5 : height // 2, width // 3 : width // 2] = (200, 60, 40)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def exact_resize(image: Image.Image, *, box: tuple[float, ...], shape: tuple[int, int]) -> np.ndarray:
    """Lanczos in floats, channel by channel, from the full resolution."""
    planes = np.moveaxis(np.asarray(image).astype(np.float32), -1, 0)
    resized = [Image.fromarray(plane).resize(shape[::-1], Image.Resampling.LANCZOS, box=box) for plane in planes]
    return np.stack([np.asarray(plane) for plane in resized], axis=-1).clip(0, 255)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(((a.astype(float) - b) ** 2).mean() / 255**2))


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("side, size", [(1000, 64), (500, 64), (333, 64), (1000, 96), (400, 256)])
def test_a_jpeg_reduced_as_it_is_decoded_is_as_close_to_an_exact_resize_as_area_averages(
    side: int, size: int, orientation: int
) -> None:
    for seed, slack in enumerate((0, 160, 496)):  # multiples of 16, so that the crop begins on a reduced pixel
        data = saved(natural(side, side + slack, seed), "JPEG", quality=90, exif=saved_exif(orientation))
        full = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        left, top = (full.width - side) // 2, (full.height - side) // 2
        box = (left, top, left + side, top + side)
        reference = exact_resize(full, box=box, shape=(size, size))
        averages = np.asarray(full.resize((size, size), Image.Resampling.BOX, box=box))
        assert psnr(prepare(data, size=size), reference) > max(33, psnr(averages, reference) - 0.5)


@given(height=st.integers(1, 300), width=st.integers(1, 300), size=st.integers(8, 64), shape=st.sampled_from("csb"))
@settings(deadline=None, max_examples=200)
def test_a_reduced_jpeg_shows_what_the_whole_one_shows(height: int, width: int, size: int, shape: str) -> None:
    """A smooth picture at any size: the crop may be off by half a reduced pixel, 4 of the original, and no more."""
    slope = 255 / max(height, width, 64)
    y, x = np.mgrid[0:height, 0:width] * slope
    data = saved(Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)), "JPEG", quality=98, subsampling=0)
    resize: Any = {"c": CenterCrop(), "s": ShorterSide(kind="shorter_side"), "b": Buckets(kind="buckets", step=1)}[
        shape
    ]
    span, out = fit(resize, height=height, width=width, size=size)
    left, top = (width - span[1]) / 2, (height - span[0]) / 2
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    box = (left, top, left + span[1], top + span[0])
    reference = np.asarray(whole.resize(out[::-1], Image.Resampling.BICUBIC, box=box)).astype(float)
    made = prepare(data, size=size, resize=resize)
    assert made.shape == reference.shape
    assert np.abs(made - reference)[1:-1, 1:-1, :2].max(initial=0) <= 4 * slope + 4


def test_a_reduced_jpeg_is_not_shifted_or_stretched() -> None:
    """Sides that no factor divides: the last, partial pixel of what libjpeg gives must not count as a whole one."""
    ramp = np.linspace(0, 255, 501)
    image = Image.fromarray(np.repeat(np.broadcast_to(ramp, (501, 501))[..., None], 3, axis=2).round().astype(np.uint8))
    centers = (np.arange(64) + 0.5) * 501 / 64 - 0.5
    expected = np.interp(centers, np.arange(501), ramp)
    row = prepare(saved(image, "JPEG", quality=98), size=64)[32, :, 0].astype(float)
    assert np.abs(row - expected)[2:-2].max() < 1.0  # one source pixel is half a level


def test_decode_to_a_least_size() -> None:
    data = saved(natural(600, 900), "JPEG", quality=90, exif=saved_exif(6))
    for least, shape in ((0, (900, 600)), (1, (113, 75)), (75, (113, 75)), (76, (225, 150)), (500, (900, 600))):
        assert decode(data, least=least).shape == (*shape, 3)
    assert decode(saved(natural(60, 90)), least=10).shape == (60, 90, 3)


def saved_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


@pytest.mark.parametrize(
    "height, width, span, out",
    [
        (100, 150, (100, 150), (32, 48)),
        (150, 100, (150, 100), (48, 32)),
        (100, 500, (100, 200), (32, 64)),
        (20_000, 1, (2, 1), (64, 32)),
        (100, 100, (100, 100), (32, 32)),
        (7, 13, (7, 13), (32, 59)),
    ],
)
def test_the_shorter_side(height: int, width: int, span: Any, out: Any) -> None:
    resize = ShorterSide(kind="shorter_side", max_aspect=2)
    assert fit(resize, height=height, width=width, size=32) == (span, out)
    assert prepare(saved(Image.new("RGB", (width, height), RED)), size=32, resize=resize).shape == (*out, 3)


def test_the_buckets_of_a_size() -> None:
    # By hand: at most 64 * 64 = 4096 pixels, sides multiples of 16, at most 2 : 1.
    assert buckets(Buckets(kind="buckets", step=16, max_aspect=2), size=64) == ((80, 48), (64, 64), (48, 80))
    assert buckets(Buckets(kind="buckets", step=64, max_aspect=1), size=64) == ((64, 64),)
    with pytest.raises(ValueError, match=r"image_size 100 is not a multiple of resize\.step 32; change one"):
        buckets(Buckets(kind="buckets"), size=100)


@given(step=st.sampled_from([1, 8, 16, 32, 64]), times=st.integers(1, 12), aspect=st.floats(1, 4))
def test_buckets_keep_the_budget(step: int, times: int, aspect: float) -> None:
    size = step * times
    found = buckets(Buckets(kind="buckets", step=step, max_aspect=aspect), size=size)
    assert (size, size) in found and len(set(found)) == len(found)
    for height, width in found:
        assert height % step == width % step == 0 and (width, height) in found
        assert height * width <= size * size < (max(height, width) + step) * (min(height, width) + step)
        assert max(height, width) <= aspect * min(height, width)


@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_a_bucket_is_near_in_aspect_and_cuts_one_side_only(height: int, width: int) -> None:
    resize = Buckets(kind="buckets", step=32)
    span, out = fit(resize, height=height, width=width, size=256)
    distance = {side: abs(np.log(side[0] / side[1]) - np.log(height / width)) for side in buckets(resize, size=256)}
    assert distance[out] == pytest.approx(min(distance.values()))
    assert span[0] == height or span[1] == width
    assert 1 <= span[0] <= height and 1 <= span[1] <= width
    exact = min(width, height * out[1] / out[0])
    assert abs(span[1] - max(1, exact)) <= 0.5 or abs(span[0] - max(1, min(height, width * out[0] / out[1]))) <= 0.5


def test_images_come_in_their_bucket() -> None:
    resize = Buckets(kind="buckets", step=16)
    wide = Image.new("RGB", (200, 100), RED)
    wide.paste(BLUE, (17, 0, 183, 100))  # 5 : 3 of it
    assert np.abs(prepare(saved(wide), size=64, resize=resize)[:, 1:-1].astype(int) - BLUE).max() <= 4
    assert prepare(saved(wide), size=64, resize=resize).shape == (48, 80, 3)


def test_what_may_be_kept() -> None:
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        check_kept(read_header(saved(photo(), format)))
    for format in ("JPEG", "PNG"):
        with pytest.raises(ImageError, match="truncated"):
            check_kept(read_header(saved(photo(), format)[:-20]))
    check_kept(read_header(saved(photo(), "JPEG") + b"bytes behind the end"))
    thumbnail = saved(photo(16), "JPEG")
    camera = saved(photo(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail)
    check_kept(read_header(camera))
    with pytest.raises(ImageError, match="truncated"):
        check_kept(read_header(camera[:-20]))
    with pytest.raises(ImageError, match="unsupported: ppm files are not kept"):
        check_kept(read_header(saved(photo(), "PPM")))


def test_formats_that_run_other_programs_are_not_opened() -> None:
    eps = saved(photo(), "EPS")
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    assert reason(eps) == "unsupported"


@pytest.mark.parametrize("format", ["TIFF", "AVIF", "GIF", "JPEG2000"])
def test_a_damaged_header_has_a_reason(format: str) -> None:
    """Whatever Pillow raises there is of this image, and not the end of the run."""
    data = turned(format, 6, (6, 4)) if format in ("TIFF", "AVIF") else saved(photo(8), format)
    for at in range(len(data)):
        for byte in (0, data[at] ^ 0xFF):
            with suppress(ImageError):
                read_header(data[:at] + bytes([byte]) + data[at + 1 :])


@settings(deadline=None, max_examples=300)
@given(
    data=st.sampled_from(
        [turned("JPEG", 6), turned("PNG", 3), turned("WEBP", 8), turned("TIFF", 5), turned("AVIF", 7)]
        + [saved(photo(), format) for format in ("GIF", "BMP", "PPM", "JPEG2000")]
    ),
    cuts=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4)), max_size=4),
    end=st.floats(0, 1),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_an_image_or_a_reason(data: bytes, cuts: list[tuple[float, bytes]], end: float) -> None:
    damaged = bytearray(data[: int(len(data) * end)] if end > 0.5 else data)
    for place, new in cuts:
        at = int(place * len(damaged))
        damaged[at : at + len(new)] = new
    reasons = {"empty", "not_an_image", "too_large", "truncated", "corrupt", "unsupported"}
    for attempt in (
        lambda: prepare(bytes(damaged), size=16, max_pixels=10**6),
        lambda: prepare(bytes(damaged), size=16, max_pixels=10**6, resize=ShorterSide(kind="shorter_side")),
        lambda: decode(bytes(damaged)),
        lambda: decode(bytes(damaged), least=8),
    ):
        try:
            assert attempt().shape[2] == 3
        except ImageError as error:
            assert error.reason in reasons


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "JPEG2000"])
def test_a_header_is_read_without_decoding(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a bomb is refused, and a file kept, for the price of its first bytes."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    data = saved(photo(), format)
    assert read_header(data) == Picture(data, format.lower(), 64, 64, 1)
    with pytest.raises(ImageError, match="too_large"):
        read_header(data, max_pixels=1000)
