"""Pictures of pictures, by their pixels."""

from __future__ import annotations

import numpy as np

from genpipe.evaluation.grids import LABEL_WIDTH, MARGIN, labeled_grid, tile


def flat(value: int, size: int = 4) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def test_tiles_stand_where_their_images_do() -> None:
    picture = tile([[flat(10), flat(20), flat(30)], [flat(40), flat(50)]], cell=8)
    assert picture.shape == (16, 24, 3) and picture.dtype == np.uint8
    for row, column, value in ((0, 0, 10), (0, 1, 20), (0, 2, 30), (1, 0, 40), (1, 1, 50), (1, 2, 255)):
        assert (picture[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] == value).all()


def test_a_labeled_grid_shows_every_image_whole() -> None:
    colors = {value: (value, 0, 200) for value in (10, 20, 30, 40, 50, 60)}  # no gray, which text is drawn in
    images = {value: np.broadcast_to(np.uint8(color), (4, 4, 3)) for value, color in colors.items()}
    rows = [[images[10], images[20]], [images[30], images[40]], [images[50], images[60]]]
    captions = ["a red apple", "e\u0301 日本 🍎", "a caption so long that it takes several lines to write " * 3]
    picture = labeled_grid(rows, captions=captions, columns=["first", "second"], cell=40)
    for value, color in colors.items():
        where = np.argwhere((picture == color).all(-1))
        (top, left), (bottom, right) = where.min(0), where.max(0)
        assert (bottom - top, right - left) == (39, 39)
        assert left == LABEL_WIDTH + (40 + MARGIN) * ((value // 10 - 1) % 2)
    dark = (picture[:, :LABEL_WIDTH] < 128).all(-1).any(1)
    head = len(picture) - 3 * (40 + MARGIN)
    assert [dark[head + 46 * row : head + 46 * row + 40].any() for row in range(3)] == [True] * 3, (
        "captions are written"
    )
    assert not any(dark[head + 46 * row + 40 : head + 46 * row + 46].any() for row in range(3)), "each in its own row"
