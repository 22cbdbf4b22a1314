"""Pictures of the same prompts beside each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gallery import Gallery, picture, pictures
from PIL import Image

from genpipe.evaluation.grids import LABEL_WIDTH, MARGIN, TEXT, TITLE_LINES
from genpipe.evaluation.side_by_side import CELL, side_by_side

HEAD = MARGIN + TITLE_LINES * (TEXT + 4)


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    return Gallery(tmp_path)


def cell(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = HEAD + row * (CELL + MARGIN), LABEL_WIDTH + column * (CELL + MARGIN)
    return sheet[top : top + CELL, left : left + CELL]


def enlarged(seed: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture(seed)).resize((CELL, CELL), Image.Resampling.NEAREST))


def test_a_row_is_a_prompt_and_a_column_a_system(gallery: Gallery) -> None:
    """In the order of the first; what one has not drawn is left out, and of several pictures the first is shown."""
    one = {"train": pictures([1, 2, 3, 4], ["cat", "dog", "cow", "cat"]), "heldout": pictures([5], ["owl"])}
    other = {"train": pictures([6, 7, 8], ["cow", "ant", "cat"]), "heldout": pictures([9], ["owl"])}
    samples = {
        "A": gallery.shards(one, kind="samples", name="one"),  # type: ignore[arg-type]
        "B": gallery.shards(other, kind="samples", name="other"),  # type: ignore[arg-type]
    }
    sheet = side_by_side(samples, rows=5)
    assert sheet is not None and sheet.shape[0] == HEAD + 3 * (CELL + MARGIN)
    for row, seeds in enumerate([(1, 8), (3, 6), (5, 9)]):
        for column, seed in enumerate(seeds):
            assert np.array_equal(cell(sheet, row, column), enlarged(seed)), (row, column)
    few = side_by_side(samples, rows=1)
    assert few is not None and few.shape[0] == HEAD + 2 * (CELL + MARGIN), "one of each split"


def test_there_may_be_nothing_to_show(gallery: Gallery) -> None:
    cat = gallery.shards({"train": pictures([1], ["cat"])}, kind="samples", name="cat")
    dog = gallery.shards({"train": pictures([1], ["dog"])}, kind="samples", name="dog")
    heldout = gallery.shards({"heldout": pictures([1], ["cat"])}, kind="samples", name="heldout")
    assert side_by_side({"A": cat, "B": dog}, rows=3) is None
    assert side_by_side({"A": cat, "B": heldout}, rows=3) is None
