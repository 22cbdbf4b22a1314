"""ICC profiles against the arithmetic of the color spaces: primaries and white as their standards say."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from genpipe.data.color import to_srgb
from genpipe.data.image_batches import read_images
from genpipe.data.images import CenterCrop, decode, encode, prepare, read_header
from genpipe.data.shard_dataset import ShardDataset
from genpipe.data.shards import ShardWriter

CASES = Path(__file__).parents[1] / "cases" / "icc"
SRGB = [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)]
P3 = [(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)]
ADOBE = [(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)]
WHITE = (0.3127, 0.3290)


def to_xyz(primaries: list[tuple[float, float]]) -> np.ndarray:
    """The matrix from linear RGB to XYZ (SMPTE RP 177)."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    x, y = WHITE
    return columns * np.linalg.solve(columns, [x / y, 1, (1 - x - y) / y])


def srgb_of(pixels: np.ndarray, space: str) -> np.ndarray:
    """uint8 [..., 3] in the primaries of a color space as sRGB, clipped; the profiles here have sRGB's curve."""
    values = pixels / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = linear @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(P3 if space == "display_p3" else ADOBE)).T
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def profile(space: str) -> bytes:
    found = Image.open(CASES / f"{space}.jpg").info["icc_profile"]
    assert isinstance(found, bytes)
    return found


@pytest.mark.parametrize("space, red", [("display_p3", (217, 42, 52)), ("adobe_rgb", (230, 60, 60))])
def test_a_photograph_in_another_color_space(space: str, red: tuple[int, int, int]) -> None:
    """Decoded whole, reduced, and as a shard stores it."""
    assert np.abs(srgb_of(np.array([200, 60, 60]), space) - red).max() < 1
    data = (CASES / f"{space}.jpg").read_bytes()
    raw = np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(decode(data) - srgb_of(raw, space)).max() < 1
    half = np.asarray(Image.fromarray(raw).reduce(2))
    stored = prepare(read_header(data), resize=CenterCrop(), size=32)
    for pixels in (decode(data, least=32), stored, decode(encode(stored, format="png"))):
        assert np.abs(pixels - srgb_of(half, space)).mean() < 2


@pytest.mark.parametrize("space", ["display_p3", "adobe_rgb"])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_colors_of_every_kind(space: str, format: str) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    buffer = io.BytesIO()
    lossless = (
        {"lossless": True} if format == "WEBP" else {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    )
    Image.fromarray(pixels).save(buffer, format, icc_profile=profile(space), **lossless)
    found = decode(buffer.getvalue())[4::8, 4::8]
    assert np.abs(found - srgb_of(pixels[4::8, 4::8], space)).max() <= (8 if format == "JPEG" else 1)


def test_transparency_and_grays_keep_their_profile() -> None:
    image = Image.new("RGBA", (8, 8), (200, 60, 60, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", icc_profile=profile("adobe_rgb"))
    pixels = decode(buffer.getvalue())
    assert pixels[0, 0].tolist() == [255, 255, 255] and np.abs(pixels[4, 4].astype(int) - (230, 60, 60)).max() <= 1
    gray = Image.new("L", (8, 8), 100)
    assert to_srgb(gray, profile("display_p3")).getpixel((0, 0)) == (100, 100, 100), "gray axis of the same curve"


def test_srgb_is_left_alone_to_the_bit() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (np.asarray(to_srgb(Image.fromarray(pixels), srgb)) == pixels).all()


@pytest.mark.parametrize("broken", [b"", b"no profile", bytes(200), b"x" * 16 + b"RGB " + bytes(200)])
def test_a_damaged_profile_is_taken_for_srgb(broken: bytes) -> None:
    image = Image.new("RGB", (4, 4), (200, 60, 60))
    assert to_srgb(image, broken).getpixel((0, 0)) == (200, 60, 60)
    assert to_srgb(image, profile("display_p3")[:300]).getpixel((0, 0)) == (200, 60, 60)


def test_a_profile_for_other_pixels_is_ignored() -> None:
    cmyk = Image.new("CMYK", (4, 4), (0, 200, 200, 20))
    assert to_srgb(cmyk, profile("adobe_rgb")).getpixel((0, 0)) == cmyk.convert("RGB").getpixel((0, 0))


def test_kept_images_are_converted_as_they_are_read(tmp_path: Path) -> None:
    data = (CASES / "display_p3.jpg").read_bytes()
    height, width = decode(data).shape[:2]
    with ShardWriter(tmp_path, split="train", part=0, max_samples=9, max_bytes=10**6) as writer:
        facts: dict[str, Any] = {"group": "g", "format": "jpeg", "captions": ["x"], "meta": {}}
        writer.write("a", image=data, height=height, width=width, **facts)
    (images,), _ = read_images(ShardDataset(tmp_path, split="train"), np.array([0]), sizes=(height,))
    assert (images[0].permute(1, 2, 0).numpy() == decode(data)).all()
