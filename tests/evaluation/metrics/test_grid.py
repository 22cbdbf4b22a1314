"""The grid's pictures, by their pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gallery import SIDE, Gallery, measured
from PIL import Image

from genpipe.artifacts import Artifact
from genpipe.evaluation.grids import LABEL_WIDTH, MARGIN
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


def cells(path: Path, *, rows: int, columns: int) -> list[list[tuple[int, ...]]]:
    """The color at the middle of each cell."""
    image = np.asarray(Image.open(path))
    head = len(image) - rows * (CELL + MARGIN)
    assert image.shape[1] == LABEL_WIDTH + columns * (CELL + MARGIN) + MARGIN
    middle = CELL // 2
    return [
        [tuple(image[head + y * (CELL + MARGIN) + middle, LABEL_WIDTH + x * (CELL + MARGIN) + middle].tolist())
         for x in range(columns)]
        for y in range(rows)
    ]  # fmt: skip


WHITE = (255, 255, 255)


def test_real_pictures_stand_beside_generated_ones(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    assert measured(GridConfig(), inputs, tmp_path) == {}
    assert cells(tmp_path / "grid.png", rows=2, columns=2) == [
        [COLORS["blue"], DARKER["blue"]],
        [COLORS["red"], DARKER["red"]],
    ]
    assert cells(tmp_path / "heldout.png", rows=2, columns=2) == [[COLORS["pink"], DARKER["pink"]], [WHITE, (1, 2, 3)]]


def test_chosen_pictures_stand_in_for_the_first(gallery: Gallery, inputs: dict[str, Artifact], tmp_path: Path) -> None:
    chosen = [(flat(DARKER[name]), name) for name in ("green", "red", "red")]
    inputs = inputs | {"grid_sample": gallery.shards({"train": chosen}, kind="samples", name="chosen")}
    measured(GridConfig(each=2), inputs, tmp_path)
    assert cells(tmp_path / "grid.png", rows=2, columns=3) == [
        [COLORS["green"], DARKER["green"], WHITE],
        [COLORS["red"], DARKER["red"], DARKER["red"]],
    ]
    cells(tmp_path / "heldout.png", rows=2, columns=2)


def test_rows_are_as_many_as_were_asked_for(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    measured(GridConfig(rows=1), inputs, tmp_path)
    assert cells(tmp_path / "grid.png", rows=1, columns=2) == [[COLORS["blue"], DARKER["blue"]]]


def test_pictures_of_prompts_of_nobody_stand_alone(
    gallery: Gallery, inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    inputs = inputs | {"sample": gallery.shards({"heldout": [(flat((1, 2, 3)), "nobody's")]}, kind="samples")}
    measured(GridConfig(), inputs, tmp_path)
    assert cells(tmp_path / "heldout.png", rows=1, columns=1) == [[(1, 2, 3)]]
    assert not (tmp_path / "grid.png").exists()
