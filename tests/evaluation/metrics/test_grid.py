"""The grid's pictures, by their pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gallery import SIDE, Gallery, measured
from PIL import Image

from genpipe.artifacts import Artifact
from genpipe.evaluation.grids import LABEL_WIDTH, MARGIN, TEXT, TITLE_LINES
from genpipe.evaluation.metrics.grid import CELL, GridConfig

COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "pink": (250, 150, 180)}
DARKER = {name: (red // 2, green // 2, blue // 2 + 1) for name, (red, green, blue) in COLORS.items()}


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return Gallery(tmp_path_factory.mktemp("store"))


def flat(color: tuple[int, int, int]) -> np.ndarray:
    return np.broadcast_to(np.uint8(color), (SIDE, SIDE, 3))


@pytest.fixture(scope="module")
def inputs(gallery: Gallery) -> dict[str, Artifact]:
    """Real pictures in bright colors; generated ones of the same captions are darker."""
    real = {"train": [(flat(COLORS[name]), name) for name in ("red", "green", "blue")]}
    real["heldout"] = [(flat(COLORS["pink"]), "pink")]
    drawn = {"train": [(flat(DARKER[name]), name) for name in ("blue", "blue", "red")]}
    drawn["heldout"] = [(flat(DARKER["pink"]), "pink"), (flat((1, 2, 3)), "a caption of nobody")]
    return {
        "shard": gallery.shards(real),  # type: ignore[arg-type]
        "sample": gallery.shards(drawn, kind="samples", each=2),  # type: ignore[arg-type]
    }


def cells(picture: np.ndarray, *, rows: int, columns: int) -> list[list[tuple[int, ...]]]:
    """The color at the middle of each cell of a split's rows; below them it is white."""
    assert picture.shape[1] == width_of(columns)
    height = CELL + MARGIN
    middle = CELL // 2
    assert (picture[HEAD + rows * height :] == 255).all()
    return [
        [tuple(picture[HEAD + y * height + middle, LABEL_WIDTH + x * height + middle].tolist()) for x in range(columns)]
        for y in range(rows)
    ]


def drawn(folder: Path) -> np.ndarray:
    return np.asarray(Image.open(folder / "grid.png"))


HEAD = MARGIN + TITLE_LINES * (TEXT + 4)


def width_of(columns: int) -> int:
    return LABEL_WIDTH + columns * (CELL + MARGIN) + MARGIN


WHITE = (255, 255, 255)


def test_real_pictures_stand_beside_generated_ones(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    assert measured(GridConfig(), inputs, tmp_path) == {}
    picture = drawn(tmp_path)
    assert cells(picture[:, : width_of(2)], rows=2, columns=2) == [
        [COLORS["blue"], DARKER["blue"]],
        [COLORS["red"], DARKER["red"]],
    ]
    assert cells(picture[:, width_of(2) :], rows=2, columns=2) == [[COLORS["pink"], DARKER["pink"]], [WHITE, (1, 2, 3)]]


def test_combinations_stand_between(gallery: Gallery, tmp_path: Path) -> None:
    """Each split under its own name."""
    names = {"train": "red", "combinations": "green", "heldout": "blue"}
    real = {split: [(flat(COLORS[name]), name)] for split, name in names.items()}
    made = {split: [(flat(DARKER[name]), name)] for split, name in reversed(names.items())}
    inputs = {
        "shard": gallery.shards(real, name="three"),  # type: ignore[arg-type]
        "sample": gallery.shards(made, kind="samples", name="three"),  # type: ignore[arg-type]
    }
    measured(GridConfig(), inputs, tmp_path)
    thirds = np.split(drawn(tmp_path), 3, axis=1)
    assert [cells(third, rows=1, columns=2) for third in thirds] == [
        [[COLORS[name], DARKER[name]]] for name in names.values()
    ]
    corners = [third[:HEAD, :LABEL_WIDTH] for third in thirds]
    assert all((corner < 128).any() for corner in corners), "they are named"
    assert len({corner.tobytes() for corner in corners}) == 3


def test_chosen_pictures_stand_in_for_the_first(gallery: Gallery, inputs: dict[str, Artifact], tmp_path: Path) -> None:
    chosen = [(flat(DARKER[name]), name) for name in ("green", "red", "red")]
    inputs = inputs | {"grid_sample": gallery.shards({"train": chosen}, kind="samples", name="chosen")}
    measured(GridConfig(each=2), inputs, tmp_path)
    picture = drawn(tmp_path)
    assert cells(picture[:, : width_of(3)], rows=2, columns=3) == [
        [COLORS["green"], DARKER["green"], WHITE],
        [COLORS["red"], DARKER["red"], DARKER["red"]],
    ]
    cells(picture[:, width_of(3) :], rows=2, columns=2)


def test_rows_are_as_many_as_were_asked_for(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    measured(GridConfig(rows=1), inputs, tmp_path)
    assert cells(drawn(tmp_path)[:, : width_of(2)], rows=1, columns=2) == [[COLORS["blue"], DARKER["blue"]]]


def test_pictures_of_prompts_of_nobody_stand_alone(
    gallery: Gallery, inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    inputs = inputs | {"sample": gallery.shards({"heldout": [(flat((1, 2, 3)), "nobody's")]}, kind="samples")}
    measured(GridConfig(), inputs, tmp_path)
    assert cells(drawn(tmp_path), rows=1, columns=1) == [[(1, 2, 3)]]
