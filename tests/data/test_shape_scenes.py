"""Scenes of shapes: captions are read back, and the places are as they are asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genpipe.data.shape_scenes import (
    COLORS,
    GAP,
    SHAPES,
    TASKS,
    Asked,
    Task,
    Thing,
    askable,
    caption_of,
    parse,
    render,
    scene_of,
    subject_of,
    task_of,
)

ALL = [(task, asked) for task in TASKS for asked in askable(task)]


def test_every_caption_is_read_back_and_belongs_to_its_task() -> None:
    captions = [caption_of(asked) for _, asked in ALL]
    assert len(set(captions)) == len(captions)
    for task, asked in ALL:
        assert parse(caption_of(asked)) == asked and task_of(asked) == task


@pytest.mark.parametrize(
    ("caption", "asked"),
    [
        ("a circle", Asked((Thing("circle"),))),
        ("three crosses", Asked((Thing("cross"),) * 3)),
        ("a red circle", Asked((Thing("circle", "red"),))),
        ("a circle to the left of a cross", Asked((Thing("circle"), Thing("cross")), "left")),
        ("a red square above a blue square", Asked((Thing("square", "red"), Thing("square", "blue")), "above")),
        ("a black cross and a green triangle", Asked((Thing("cross", "black"), Thing("triangle", "green")))),
    ],
)
def test_captions_are_english(caption: str, asked: Asked) -> None:
    assert caption_of(asked) == caption and parse(caption) == asked


@pytest.mark.parametrize("caption", ["", "a dog", "a red circle!", "five circles", "a circle beside a square", "a"])
def test_other_words_are_no_prompts(caption: str) -> None:
    assert parse(caption) is None


def test_what_means_the_same_is_one_subject() -> None:
    def subjects(*captions: str) -> set[str]:
        return {subject_of(asked) for caption in captions if (asked := parse(caption))}

    assert len(subjects("a cross below a circle", "a circle above a cross")) == 1
    assert len(subjects("a cross and a circle", "a circle and a cross")) == 1
    assert len(subjects("a cross below a circle", "a circle below a cross", "a cross and a circle")) == 3
    assert len(subjects("a red cross above a blue cross", "a blue cross above a red cross")) == 2


@given(st.sampled_from(ALL), st.integers(0, 2**32))
def test_shapes_are_where_they_were_asked_for(chosen: tuple[Task, Asked], seed: int) -> None:
    _, asked = chosen
    scene = scene_of(asked, np.random.default_rng(seed))
    assert [(of.shape, of.color) for of in scene] == [
        (thing.shape, thing.color or of.color) for thing, of in zip(asked.things, scene, strict=True)
    ]
    for i, one in enumerate(scene):
        assert one.radius + GAP <= min(one.x, one.y, 1 - one.x, 1 - one.y) + 1e-9
        for other in scene[:i]:
            assert max(abs(one.x - other.x), abs(one.y - other.y)) >= one.radius + other.radius + GAP
    if asked.relation is not None:
        one, other = scene
        across, down = other.x - one.x, other.y - one.y
        along, aside = (across, down) if asked.relation in ("left", "right") else (down, across)
        assert abs(along) > 2 * abs(aside) and (along > 0) == (asked.relation in ("left", "above"))


@pytest.mark.parametrize(
    ("shape", "area"), [("circle", np.pi / 4), ("square", 1.0), ("triangle", 0.5), ("cross", 5 / 9)]
)
def test_areas_are_those_of_geometry(shape: str, area: float) -> None:
    """From how dark the picture is; a triangle stands on its base."""
    assert shape in SHAPES
    [placed] = scene_of(Asked((Thing(shape, "black"),)), np.random.default_rng(0))  # type: ignore[arg-type]
    ink = (255.0 - render([placed], size=200)[..., 0]) / (255 - COLORS["black"][0])
    assert ink.mean() == pytest.approx(area * (2 * placed.radius) ** 2, rel=0.02)
    rows = ink.sum(1) @ (np.arange(200) + 0.5) / ink.sum() / 200 - placed.y
    assert rows == pytest.approx(placed.radius / 3 if shape == "triangle" else 0.0, abs=0.01)
