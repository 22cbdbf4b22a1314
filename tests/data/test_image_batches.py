from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genpipe.data.image_batches import (
    Images,
    crop_draws,
    cut,
    empty_images,
    image_batch,
    read_images,
    read_whole,
    to_float,
    to_uint8,
)
from genpipe.data.images import encode, read_header
from genpipe.data.shard_dataset import ShardDataset, collect_damaged
from genpipe.data.shards import ShardWriter

SIDE = 16


def picture(number: int, *, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Waves of different direction in each color, as a photograph's low frequencies."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = np.stack([np.sin(9 * x + 5 * y), np.cos(14 * y), np.sin(20 * x * y)], axis=-1)
    return np.rint(waves * 110 + 128).astype(np.uint8)


def shards(folder: Path, images: list[bytes], *, format: str = "png", sizes: list[tuple[int, int]]) -> ShardDataset:
    with ShardWriter(folder, split="train", part=0, max_samples=99, max_bytes=10**8) as writer:
        for number, (image, (height, width)) in enumerate(zip(images, sizes, strict=True)):
            writer.write(
                f"key-{number}",
                group="g",
                image=image,
                format=format,
                height=height,
                width=width,
                captions=["c"],
                meta={},
            )
    return ShardDataset(folder, split="train")


@pytest.fixture
def squares(tmp_path: Path) -> ShardDataset:
    return shards(tmp_path, [encode(picture(i), format="png") for i in range(8)], sizes=[(SIDE, SIDE)] * 8)


def test_images_at_their_own_size_and_averaged_over_boxes(squares: ShardDataset) -> None:
    indices = np.array([7, 0])
    stored = torch.stack([torch.from_numpy(picture(i)).permute(2, 0, 1) for i in (7, 0)])
    full = image_batch(squares, indices, size=SIDE)
    assert full.dtype == torch.uint8 and torch.equal(full, stored)
    for size in (8, 4):
        means = torch.nn.functional.avg_pool2d(stored.double(), SIDE // size)
        half_up = torch.floor(means + 0.5).to(torch.uint8)
        assert torch.equal(image_batch(squares, indices, size=size), half_up)
    for size in (12, 24):
        assert image_batch(squares, indices, size=size).shape == (2, 3, size, size)


def test_several_sizes_of_one_decoding(squares: ShardDataset) -> None:
    indices = np.array([3, 1, 2])
    for sizes in ((16, 8), (8, 12), (12, 16)):
        images, read = read_images(squares, indices, sizes=sizes)
        assert read.tolist() == [3, 1, 2]
        for size, batch in zip(sizes, images, strict=True):
            alone = image_batch(squares, indices, size=size)
            if all(SIDE % s == 0 for s in sizes) or SIDE % size:
                assert torch.equal(batch, alone)
            else:  # beside a size that is no divisor boxes give way to the other filter
                assert batch.shape == alone.shape


def test_another_shape_is_cut_and_resized_with_antialiasing(tmp_path: Path) -> None:
    """Against torch's antialiased bicubic in double precision, on the middle and on either end."""
    sizes = [(40, 100), (100, 40), (64, 64), (23, 37)]
    pictures = [smooth(*size) for size in sizes]
    dataset = shards(tmp_path, [encode(p, format="png") for p in pictures], sizes=sizes)
    for draw, place in ((None, 0.5), (0.0, 0.0), (np.nextafter(1, 0), 1.0)):
        draws = None if draw is None else np.full(4, draw)
        (batch,), _ = read_images(dataset, np.arange(4), sizes=(20,), draws=draws)
        for image, got in zip(pictures, batch, strict=True):
            height, width = image.shape[:2]
            side = min(height, width)
            top, left = int((height - side) * place), int((width - side) * place)
            crop = torch.from_numpy(image[top : top + side, left : left + side]).permute(2, 0, 1)[None].double()
            expected = torch.nn.functional.interpolate(crop, (20, 20), mode="bicubic", antialias=True)[0]
            # Both of its passes round to 8 bits.
            assert (got.double() - expected.clamp(0, 255)).abs().max() <= 1.5


def test_a_large_jpeg_is_as_good_when_it_is_reduced_while_decoding(tmp_path: Path) -> None:
    image = smooth(900, 1200)
    dataset = shards(tmp_path, [encode(image, format="jpeg")], format="jpeg", sizes=[(900, 1200)])
    got = image_batch(dataset, np.array([0]), size=64)[0].permute(1, 2, 0).numpy().astype(float)
    middle = Image.fromarray(image[:, 150:1050]).resize((64, 64), Image.Resampling.BICUBIC)
    error = got - np.asarray(middle, float)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 40  # decibels; half a pixel's shift gives 33


def test_the_index_may_err_about_the_shape(tmp_path: Path) -> None:
    """An image larger or smaller than its row says is still read whole."""
    pictures = [smooth(16, 16), smooth(32, 32), smooth(12, 12)]
    data = [encode(p, format="jpeg", quality=100) for p in pictures]
    dataset = shards(tmp_path, data, format="jpeg", sizes=[(16, 16)] * 3)
    batch = image_batch(dataset, np.arange(3), size=16).permute(0, 2, 3, 1).numpy().astype(int)
    for got, image in zip(batch, pictures, strict=True):
        assert np.abs(got - cut(image, height=16, width=16).astype(int)).max() <= 6


def test_turned_and_gray_and_four_colored_images_are_read_upright_in_rgb(tmp_path: Path) -> None:
    image = Image.fromarray(smooth(24, 48))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera stood on its side: turn clockwise
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    gray = Image.fromarray(smooth(32, 32)[:, :, 0])
    files = [tmp_path / name for name in ("turned.jpg", "gray.jpg", "cmyk.jpg")]
    image.save(files[0], quality=100, subsampling=0, exif=exif)
    gray.save(files[1], quality=100)
    gray.convert("CMYK").save(files[2], quality=100)
    data, sizes = [path.read_bytes() for path in files], [(48, 24), (32, 32), (32, 32)]
    dataset = shards(tmp_path, data, format="jpeg", sizes=sizes)
    batch = image_batch(dataset, np.arange(3), size=24).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(batch[0] - cut(upright, height=24, width=24)).max() <= 8
    in_rgb = cut(np.asarray(gray.convert("RGB")), height=24, width=24)
    assert np.abs(batch[1] - in_rgb).max() <= 8 and np.abs(batch[2] - in_rgb).max() <= 8


@pytest.mark.parametrize("ahead", [0, 200])
def test_a_kept_square_is_read_upright_wherever_its_exif_stands(tmp_path: Path, ahead: int) -> None:
    image = Image.fromarray(smooth(24, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    image.save(path, quality=100, subsampling=0, exif=exif)
    data = path.read_bytes()
    comment = b"\xff\xfe" + (ahead + 2).to_bytes(2, "big") + bytes(ahead)
    dataset = shards(tmp_path, [data[:2] + comment + data[2:]], format="jpeg", sizes=[(24, 24)])
    got = image_batch(dataset, np.arange(1), size=24)[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(got - np.asarray(image.transpose(Image.Transpose.ROTATE_270))).max() <= 8


def test_exif_behind_the_tables_turns_an_image_nowhere(tmp_path: Path) -> None:
    image = Image.fromarray(smooth(24, 24))
    path = tmp_path / "plain.jpg"
    image.save(path, quality=100, subsampling=0)
    data = path.read_bytes()
    frame = data.index(b"\xff\xc0")
    exif = Image.Exif()
    exif[0x0112] = 6
    segment = exif.tobytes()
    data = data[:frame] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[frame:]
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6  # as the file stands there, others would turn it
    assert read_header(data).orientation == 1
    dataset = shards(tmp_path, [data], format="jpeg", sizes=[(24, 24)])
    batch, decoded = image_batch(dataset, np.arange(1), size=24)[0].permute(1, 2, 0).numpy(), dataset.image(0)
    assert np.array_equal(batch, decoded) and np.abs(decoded.astype(int) - np.asarray(image)).max() <= 8


def test_random_crops_follow_the_position_and_reach_both_ends(tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(40, dtype=np.uint8)[None, :, None], 8, 0).repeat(3, 2)
    dataset = shards(tmp_path, [encode(ramp, format="png")], sizes=[(8, 40)])
    collate = Images(dataset, 8, crop="random", seed=4)
    positions = np.arange(400)
    lefts = collate(np.zeros(400, int), positions)["images"][:, 0, 0, 0]
    assert set(lefts.tolist()) == set(range(33))
    assert torch.equal(collate(np.zeros(2, int), positions[7:9])["images"][:, 0, 0, 0], lefts[7:9])
    assert Images(dataset, 8)(np.zeros(1, int), positions[:1])["images"][0, 0, 0, 0] == 16
    assert crop_draws(positions, crop="center", seed=4) is None


def conditioned(folder: Path, sizes: list[tuple[int, int]], *, damaged: tuple[int, ...] = ()) -> ShardDataset:
    """Noise with its negative as conditioning image, cut off of those `damaged`; labels 10, 11, ... and one without."""
    with ShardWriter(folder, split="train", part=0, max_samples=3, max_bytes=10**8) as writer:
        for number, (height, width) in enumerate(sizes):
            image = picture(number, height=height, width=width)
            condition = encode(255 - image, format="png")
            writer.write(
                f"key-{number}",
                group="g",
                image=encode(image, format="png"),
                format="png",
                height=height,
                width=width,
                captions=["c"],
                label=10 + number if number else -1,
                condition=condition[: len(condition) // 2] if number in damaged else condition,
                condition_format="png",
                meta={},
            )
    return ShardDataset(folder, split="train")


@pytest.mark.parametrize("size", [12, SIDE])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_conditions_and_labels_come_with_their_images(tmp_path: Path, size: int, crop: Any) -> None:
    """A negative stays the negative of its image under any crop and resize, up to the rounding of both."""
    dataset = conditioned(tmp_path, [(SIDE, 40), (40, SIDE), (SIDE, SIDE), (30, 20)])
    indices = np.array([3, 0, 1, 0, 2])
    batch = Images(dataset, size, crop, labels=True, condition=True)(indices, np.arange(5))
    assert batch["condition"].shape == (5, 3, size, size) and batch["condition"].dtype == torch.uint8
    assert (255 - batch["condition"].int() - batch["images"].int()).abs().max() <= 1
    assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == [13, -1, 11, -1, 12]
    assert set(Images(dataset, size, crop)(indices, np.arange(5))) == {"images"}


def test_a_damaged_condition_gives_way_with_its_image(tmp_path: Path) -> None:
    dataset = conditioned(tmp_path, [(SIDE, SIDE)] * 5, damaged=(1, 2))
    collate = Images(dataset, SIDE, labels=True, condition=True)
    with collect_damaged() as damaged:
        batch = collate(np.array([0, 1, 4]), np.arange(3))
    assert batch["labels"].tolist() == [-1, 13, 14]
    for image, condition, number in zip(batch["images"], batch["condition"], (0, 3, 4), strict=True):
        assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(picture(number)))
        assert torch.equal(condition, 255 - image)
    assert {reject.key for reject in damaged} == {"key-1", "key-2"}


def test_whole_images_of_one_size(tmp_path: Path) -> None:
    """The bytes as they were written; the next of the same size stands in for a damaged one."""
    sizes = [(24, 40), (40, 24), (24, 40), (40, 24), (24, 40)]
    data = [encode(picture(i, height=h, width=w), format="png") for i, (h, w) in enumerate(sizes)]
    data[2] = data[2][:99]
    dataset = shards(tmp_path, data, sizes=sizes)
    assert {size: rows.tolist() for size, rows in dataset.sizes().items()} == {(24, 40): [0, 2, 4], (40, 24): [1, 3]}
    images, whose = read_whole(dataset, np.array([2, 0, 4]))
    assert images.shape == (3, 3, 24, 40) and whose.tolist() == [4, 0, 4]
    for image, number in zip(images, whose.tolist(), strict=True):
        assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(picture(number, height=24, width=40)))
    tall = Images(dataset, None)(np.array([3, 1]), np.arange(2))["images"]
    assert tall.shape == (2, 3, 40, 24)


def test_normalization_and_back() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = to_float(values)
    assert torch.equal(to_float(values.repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last))[:, :1], floats)
    assert floats.dtype == torch.float32 and floats.min() == -1 and floats.max() == 1
    assert torch.equal(to_uint8(floats), values)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_batches_lie_where_jpegs_are_decoded_fastest() -> None:
    for count, size in ((1, 64), (64, 64), (3, 256)):
        images = empty_images(count, height=size, width=size)
        assert images.shape == (count, size, size, 3) and images.flags.c_contiguous
        assert all(image.ctypes.data % 32 == 16 for image in images)
