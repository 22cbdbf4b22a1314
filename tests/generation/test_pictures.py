"""Pictures that people bring: turned upright, laid on white, cut to their middle; and masks of what is to be drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genpipe.generation.pictures import read_hole, read_picture, square

CPU = torch.device("cpu")
RED, BLUE = (255, 0, 0), (0, 0, 255)


def two_colors(mode: str = "RGB") -> Image.Image:
    """8 x 4: red at the left, blue at the right."""
    image = Image.new("RGB", (8, 4), RED)
    image.paste(BLUE, (4, 0, 8, 4))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_an_image_in_memory_is_read_as_its_file_is(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    two_colors().save(path)
    expected = np.asarray(two_colors())
    assert np.array_equal(read_picture(two_colors(mode)), expected)
    assert np.array_equal(read_picture(path), expected) and np.array_equal(read_picture(str(path)), expected)


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    """EXIF orientation 6: the camera was turned, and the picture is to be rotated by 90 degrees clockwise."""
    path, exif = tmp_path / "image.png", Image.Exif()
    exif[0x0112] = 6
    two_colors().save(path, exif=exif)
    expected = np.rot90(np.asarray(two_colors()), -1)
    assert np.array_equal(read_picture(path), expected)
    assert np.array_equal(read_picture(Image.open(path)), expected)


def test_the_middle_is_taken() -> None:
    found = square(read_picture(two_colors()), size=4, device=CPU)
    assert found.shape == (1, 3, 4, 4)
    assert torch.equal(found[0, 0], torch.tensor([1.0, 1.0, -1.0, -1.0]).expand(4, 4)), "red in the left half"


def test_holes_are_white_in_the_mask_or_transparent_in_the_picture() -> None:
    mask = Image.new("L", (8, 4), 0)
    mask.paste(255, (3, 0, 4, 4))
    expected = torch.tensor([False, True, False, False]).expand(1, 1, 4, 4)
    assert torch.equal(read_hole(two_colors(), mask, size=4, device=CPU), expected)
    clear = two_colors()
    clear.putalpha(mask.point(lambda value: 255 - value))
    assert torch.equal(read_hole(clear, None, size=4, device=CPU), expected)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("no picture")
    with pytest.raises(ValueError, match=r"picture: .*notes\.png is no usable picture: not_an_image"):
        read_picture(path)
    with pytest.raises(ValueError, match=r"mask: .*absent\.png cannot be read"):
        read_picture(tmp_path / "absent.png", setting="mask")
    outside = Image.new("L", (8, 4), 0)
    outside.putpixel((0, 0), 255)
    with pytest.raises(ValueError, match="white where the picture is seen"):
        read_hole(two_colors(), outside, size=4, device=CPU)
